// The latents that the atlas lists, in its order: what "next" means on the page of a latent.
import type { Site } from "./types";

let current: number[] | null = null;

export function keepOrder(latents: number[]): void {
  current = latents;
}

/** The order, and the place of a latent in it. All latents by number, where the atlas was not seen or does not list it. */
export function listed(site: Site, latent: number): { order: number[]; place: number } {
  const place = current?.indexOf(latent) ?? -1;
  if (current && place >= 0) return { order: current, place };
  return { order: Array.from({ length: site.n_latents }, (_, i) => i), place: latent };
}
