// Colors of points: a scale for numbers that is read without color vision as well, and a palette for classes.

/** From dark blue over green to yellow; five stops of viridis (van der Walt and Smith 2015). */
const STOPS: [number, number, number][] = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
const STEPS = 64;
export const SCALE: string[] = Array.from({ length: STEPS }, (_, i) => {
  const place = (i / (STEPS - 1)) * (STOPS.length - 1);
  const first = Math.min(Math.floor(place), STOPS.length - 2);
  const mix = (channel: 0 | 1 | 2) => {
    const [a, b] = [STOPS[first]?.[channel] ?? 0, STOPS[first + 1]?.[channel] ?? 0];
    return Math.round(a + (place - first) * (b - a));
  };
  return `rgb(${mix(0)} ${mix(1)} ${mix(2)})`;
});

export const UNKNOWN = "#8888";

/** Ten hues for classes, then lighter and darker turns of them. */
export function classColor(index: number): string {
  const hue = (index * 137.508) % 360; // the golden angle: neighbors in the list differ most
  return `hsl(${hue.toFixed(0)} 62% ${index % 20 < 10 ? 48 : 62}%)`;
}

/** A function from values to the scale, between the 2nd and the 98th percentile, so that few outliers do not hide the rest. */
export function scaleOf(values: Float32Array, log: boolean): { colorOf: (latent: number) => string; low: number; high: number } {
  const scaled = values.map((value) => (log ? (value > 0 ? Math.log10(value) : NaN) : value));
  const known = scaled.filter((value) => !Number.isNaN(value)).sort();
  const at = (share: number) => known[Math.min(known.length - 1, Math.floor(share * known.length))] ?? 0;
  const [low, high] = [at(0.02), at(0.98)];
  const span = high > low ? high - low : 1;
  const colorOf = (latent: number) => {
    const value = scaled[latent] ?? NaN;
    if (Number.isNaN(value)) return UNKNOWN;
    return SCALE[Math.round(Math.min(1, Math.max(0, (value - low) / span)) * (STEPS - 1))] ?? UNKNOWN;
  };
  return { colorOf, low: log ? 10 ** low : low, high: log ? 10 ** high : high };
}
