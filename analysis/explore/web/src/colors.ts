// Colors of points: a scale for numbers that is read without color vision as well, and a palette for classes.

type Rgb = [number, number, number];

/** From dark blue over green to yellow; five stops of viridis (van der Walt and Smith 2015). */
const STOPS: Rgb[] = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
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

const CHROMA = 0.13;
const LIGHTNESS = [0.64, 0.74, 0.55]; // seen on the panel of either theme
const BETWEEN = [0, 60, 30, 90]; // so that the first three, six and twelve hues are as far apart as can be
const PALETTE: string[] = Array.from({ length: 36 }, (_, i) => {
  const hue = 25 + 120 * (i % 3) + (BETWEEN[Math.floor(i / 3) % 4] ?? 0);
  const turn = (hue * Math.PI) / 180;
  return fromOklab(LIGHTNESS[Math.floor(i / 12)] ?? 0.64, CHROMA * Math.cos(turn), CHROMA * Math.sin(turn));
});

/** A color for each class; after 36 they begin again. */
export function classColor(index: number): string {
  return PALETTE[index % PALETTE.length] ?? UNKNOWN;
}

/** An sRGB color for CSS from Oklab (Ottosson 2020), of equal lightness for equal `l`. */
function fromOklab(l: number, a: number, b: number): string {
  const [x, y, z] = [l + 0.3963377774 * a + 0.2158037573 * b, l - 0.1055613458 * a - 0.0638541728 * b, l - 0.0894841775 * a - 1.291485548 * b]
    .map((root) => root ** 3) as Rgb;
  const linear: Rgb = [
    4.0767416621 * x - 3.3077115913 * y + 0.2309699292 * z,
    -1.2684380046 * x + 2.6097574011 * y - 0.3413193965 * z,
    -0.0041960863 * x - 0.7034186147 * y + 1.707614701 * z,
  ];
  return `rgb(${linear.map((value) => Math.round(255 * Math.min(1, Math.max(0, value <= 0.0031308 ? 12.92 * value : 1.055 * value ** (1 / 2.4) - 0.055)))).join(" ")})`;
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
