// A picture under the heat map of a latent: dark where the latent is silent, as everywhere else in this project.
import { useEffect, useRef } from "preact/hooks";
import { readPicture } from "./data";
import { useLoaded } from "./loading";
import { useDue } from "./near";
import type { Site } from "./types";

export interface Heat {
  /** Patches, numbered row by row, and the values there. */
  at: number[];
  heat: number[];
}

const DARKEST = 0.8;
const BLUR = 8; // cells of the canvas for each patch: enough for a smooth edge, cheap to draw

interface Props {
  site: Site;
  heat: Heat | null;
  /** The value that is fully bright: the latent's maximum, so that pictures of a latent can be compared. */
  maximum: number;
  /** Patches below this share of the maximum stay dark. With 0, the map is smooth. */
  threshold: number;
}

/** The heat map alone, to be laid over a picture. */
export function HeatMap({ site, heat, maximum, threshold }: Props) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const [rows, columns] = site.grid;
  useEffect(() => {
    const context = canvas.current?.getContext("2d");
    if (!context) return;
    drawHeat(context, site.grid, heat, maximum, threshold);
  }, [heat, maximum, threshold, rows, columns]);
  const [height, width] = site.covered;
  return (
    <canvas ref={canvas} class="heat" aria-hidden="true" width={columns * BLUR} height={rows * BLUR}
      style={{ width: `${100 * width}%`, height: `${100 * height}%` }} />
  );
}

function drawHeat(context: CanvasRenderingContext2D, [rows, columns]: [number, number], heat: Heat | null, maximum: number, threshold: number): void {
  context.clearRect(0, 0, columns * BLUR, rows * BLUR);
  if (!heat) return;
  const shade = new Uint8ClampedArray(4 * rows * columns);
  for (let i = 3; i < shade.length; i += 4) shade[i] = 255 * DARKEST;
  heat.at.forEach((patch, i) => {
    const share = maximum > 0 ? (heat.heat[i] ?? 0) / maximum : 0;
    const light = threshold > 0 ? Number(share >= threshold) : Math.min(1, share);
    shade[4 * patch + 3] = 255 * DARKEST * (1 - light);
  });
  const small = new OffscreenCanvas(columns, rows);
  small.getContext("2d")?.putImageData(new ImageData(shade, columns, rows), 0, 0);
  context.imageSmoothingEnabled = threshold === 0;
  context.drawImage(small, 0, 0, columns * BLUR, rows * BLUR);
}

/** The shape of a picture as the model saw it, for CSS. */
export function shapeOf(site: Site): string {
  const [rows, columns] = site.grid;
  const [height, width] = site.covered;
  return `${columns / width} / ${rows / height}`;
}

/** A picture, with the heat map of a latent over it if one is given. */
export function Picture({ image, alt, whole, ...heat }: Props & { image: number; alt: string; whole?: string | undefined }) {
  const box = useRef<HTMLSpanElement>(null);
  const due = useDue(box);
  const small = useLoaded(() => (due ? readPicture(heat.site, image) : new Promise<null>(() => undefined)), [image, due]);
  const source = whole ?? (small && "value" in small ? small.value : null);
  return (
    <span ref={box} class="picture" style={{ aspectRatio: shapeOf(heat.site) }}>
      {source ? <img src={source} alt={alt} decoding="async" draggable={false} />
        : <span class="blank">{small && "value" in small ? alt : ""}</span>}
      {due && heat.heat && <HeatMap {...heat} />}
    </span>
  );
}
