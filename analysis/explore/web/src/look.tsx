// How heat maps are drawn: on or off, and above which share of a latent's maximum. It is part of the address.
import { show } from "./format";
import { amend, type Route } from "./route";

export interface Look {
  overlay: boolean;
  /** Patches below this share of the maximum stay dark; 0 for a smooth map. */
  threshold: number;
}

export function readLook({ query }: Route): Look {
  return { overlay: query.get("heat") !== "off", threshold: Math.min(1, Math.max(0, Number(query.get("level")) || 0)) };
}

/** Turn the heat maps on or off, as the key h does. */
export function toggleHeat({ overlay }: Look): void {
  amend({ heat: overlay ? "off" : null });
}

export function Controls({ look }: { look: Look }) {
  const level = look.threshold ? `${show(100 * look.threshold)} % of the latent's maximum` : "off";
  return (
    <div class="controls" role="group" aria-label="Heat maps">
      <label><input type="checkbox" checked={look.overlay} onChange={() => toggleHeat(look)} /> heat maps</label>
      <label>only above <input type="range" min="0" max="1" step="0.05" value={look.threshold} disabled={!look.overlay}
        aria-valuetext={level} onInput={(event) => amend({ level: Number(event.currentTarget.value) || null }, true)} />
        <output>{level}</output></label>
    </div>
  );
}
