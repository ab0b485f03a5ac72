// What fires on an image, summed over all of its tokens or over chosen patches. The sums run over the record's entries.
import type { ImageRecord, Site } from "./types";

export interface Fired {
  latent: number;
  /** Sum of its values over the tokens, as a share of the sum of all latents there. */
  share: number;
  /** Its largest value there, and the token that has it. */
  peak: number;
  token: number;
  n_tokens: number;
}

/** [n_latents]: the maxima over all images of the latents of some records; 0 for the others. */
export function maximaOf(site: Site, records: ImageRecord[]): Float32Array {
  const found = new Float32Array(site.n_latents);
  for (const { latent, maxima } of records)
    [...new Set(latent)].sort((a, b) => a - b).forEach((each, i) => (found[each] = maxima[i] ?? 0));
  return found;
}

/** Latents that fire on some tokens, largest share first. */
export function sumTokens(record: ImageRecord, tokens: Iterable<number>): Fired[] {
  const found = new Map<number, Fired>();
  let total = 0;
  for (const token of tokens) {
    for (let i = record.indptr[token] ?? 0; i < (record.indptr[token + 1] ?? 0); i++) {
      const latent = record.latent[i] ?? 0;
      const value = record.value[i] ?? 0;
      total += value;
      const each = found.get(latent);
      if (!each) found.set(latent, { latent, share: value, peak: value, token, n_tokens: 1 });
      else {
        each.share += value;
        each.n_tokens += 1;
        if (value > each.peak) [each.peak, each.token] = [value, token];
      }
    }
  }
  for (const each of found.values()) each.share /= total || 1;
  return [...found.values()].sort((a, b) => b.share - a.share || a.latent - b.latent);
}

export function allTokens(record: ImageRecord): number[] {
  return Array.from({ length: Math.max(0, record.indptr.length - 1) }, (_, token) => token);
}

/** The patches of a latent on an image, as a heat map has them, and its value at CLS. */
export function heatOf(record: ImageRecord, latent: number): { at: number[]; heat: number[]; cls: number | null } {
  const at: number[] = [];
  const heat: number[] = [];
  let cls: number | null = null;
  for (let token = 0; token + 1 < record.indptr.length; token++)
    for (let i = record.indptr[token] ?? 0; i < (record.indptr[token + 1] ?? 0); i++) {
      if (record.latent[i] !== latent) continue;
      if (token === 0) cls = record.value[i] ?? 0;
      else {
        at.push(token - 1);
        heat.push(record.value[i] ?? 0);
      }
    }
  return { at, heat, cls };
}

/** "3,4,17" as patches that are on the grid; ascending. */
export function readPatches(site: Site, text: string | null): number[] {
  const n = site.grid[0] * site.grid[1];
  const patches = (text ?? "").split(",").filter(Boolean).map(Number);
  return [...new Set(patches)].filter((patch) => Number.isInteger(patch) && patch >= 0 && patch < n).sort((a, b) => a - b);
}
