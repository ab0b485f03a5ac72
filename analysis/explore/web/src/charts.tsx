// Small pictures of numbers: how strongly a latent fires, where in the image, and for which classes.
import { percent, show } from "./format";
import type { Latent, Site } from "./types";

const WIDTH = 260;
const HEIGHT = 64;

/** Tokens by activation; both axes are logarithmic, as the bins are eight to an octave. */
export function Histogram({ histogram }: { histogram: NonNullable<Latent["histogram"]> }) {
  const { counts, edges } = histogram;
  const most = Math.max(...counts);
  const step = WIDTH / counts.length;
  const bars = counts
    .map((n, i) => {
      const height = n ? 2 + ((HEIGHT - 3) * Math.log1p(n)) / Math.log1p(most) : 0;
      return height ? `M${(i * step).toFixed(1)} ${HEIGHT}v${(-height).toFixed(1)}h${(step * 0.9).toFixed(1)}v${height.toFixed(1)}z` : "";
    })
    .join("");
  return (
    <svg class="chart" viewBox={`0 0 ${WIDTH} ${HEIGHT + 16}`} role="img"
      aria-label={`Histogram of activation: ${show(edges[0])} to ${show(edges.at(-1))}; the fullest bin has ${show(most)} tokens.`}>
      <path class="bars" d={bars} />
      <path class="axis" d={`M0 ${HEIGHT}H${WIDTH}`} />
      {ticks(edges, step).map(({ value, x, anchor }) => (
        <g key={value}>
          <path class="axis" d={`M${x} ${HEIGHT}v3`} />
          <text x={x} y={HEIGHT + 14} text-anchor={anchor}>{show(value)}</text>
        </g>
      ))}
    </svg>
  );
}

function ticks(edges: (number | null)[], step: number): { value: number; x: number; anchor: "start" | "middle" | "end" }[] {
  const logs = edges.map((edge) => (edge !== null && edge > 0 && Number.isFinite(edge) ? Math.log2(edge) : NaN));
  const first = logs.findIndex((log) => !Number.isNaN(log));
  const last = logs.findLastIndex((log) => !Number.isNaN(log));
  const low = logs[first];
  const high = logs[last];
  if (low === undefined || high === undefined || last <= first) return [];
  const span = high - low;
  const every = span <= 4 ? 1 : span <= 9 ? 2 : 4; // octaves between ticks
  const found = [];
  for (let power = Math.ceil(low / every) * every; power <= high; power += every) {
    const x = (first + ((power - low) / span) * (last - first)) * step;
    found.push({ value: 2 ** power, x, anchor: x < 10 ? ("start" as const) : x > WIDTH - 10 ? ("end" as const) : ("middle" as const) });
  }
  return found;
}

/** On how many images it fires at each patch. */
export function PositionMap({ site, counts }: { site: Site; counts: number[] }) {
  const [rows, columns] = site.grid;
  const most = Math.max(...counts);
  const where = counts.indexOf(most);
  const [row, column] = [Math.floor(where / columns), where % columns];
  return (
    <figure class="places">
      <svg viewBox={`0 0 ${columns} ${rows}`} role="img" aria-label={`It fires on most images at row ${row}, column ${column}: on ${show(most)}.`}>
        {counts.map((n, i) => (
          <rect key={i} x={i % columns} y={Math.floor(i / columns)} width="1.02" height="1.02" fill-opacity={most ? n / most : 0}>
            <title>{`row ${Math.floor(i / columns)}, column ${i % columns}: ${show(n)} images`}</title>
          </rect>
        ))}
      </svg>
      <figcaption class="soft">most at row {row}, column {column}: {show(most)} images</figcaption>
    </figure>
  );
}

export function ClassBars({ classes, n_classes }: Pick<Latent, "classes" | "n_classes">) {
  const largest = Math.max(...classes.map(({ share }) => share ?? 0));
  return (
    <>
      <table class="bars-table">
        <thead><tr><th scope="col">class</th><th scope="col" /><th scope="col">share of tokens</th><th scope="col">images</th></tr></thead>
        <tbody>
          {classes.map(({ name, share, n_images }) => (
            <tr key={name}>
              <td>{name}</td>
              <td class="bar"><i style={{ width: `${(100 * (share ?? 0)) / largest}%` }} /></td>
              <td class="number">{percent(share)}</td>
              <td class="number">{show(n_images)}</td>
            </tr>
          ))}
        </tbody>
      </table>
      {n_classes > classes.length && <p class="soft">and {n_classes - classes.length} more</p>}
    </>
  );
}
