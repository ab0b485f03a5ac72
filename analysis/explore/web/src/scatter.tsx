// All latents as points on a canvas: 50,000 of them are drawn in a few milliseconds, and the nearest is found as quickly.
import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { Dots } from "./dots";
import { show } from "./format";
import { nameFew, type Box } from "./labels";
import { useTheme } from "./theme";

export interface Axis {
  title: string;
  log: boolean;
  values: Float32Array;
}

/** What is seen of both axes, as shares of their whole range. */
export interface View {
  x: [number, number];
  y: [number, number];
}

interface Props {
  x: Axis;
  y: Axis;
  /** A CSS color for each latent. */
  colorOf: (latent: number) => string;
  nameOf: (latent: number) => string;
  /** Latents that are drawn in color; the others are pale. */
  shown: Uint8Array;
  marked: number | null;
  describe: (latent: number) => string;
  onPick: (latent: number) => void;
  onMark: (latent: number | null) => void;
  view: View | null;
  onView: (view: View | null) => void;
  /** Axes without numbers, as those of a map. */
  plain: boolean;
}

const NUMBERED = { left: 54, right: 12, top: 10, bottom: 38 };
const PLAIN = { left: 8, right: 8, top: 8, bottom: 8 };
const WHOLE: View = { x: [0, 1], y: [0, 1] };
const REACH = 14; // pixels within which a point is picked
const FINEST = 1e-4; // of an axis: no view is smaller
const ZOOM = 0.6; // of a view that is left by the button +

/** Positions along an axis from 0 to 1 over its whole range; NaN where there is no value. */
function place(axis: Axis): { at: Float32Array; low: number; high: number } {
  const scaled = axis.values.map((value) => (axis.log ? (value > 0 ? Math.log10(value) : NaN) : value));
  let low = Infinity;
  let high = -Infinity;
  for (const value of scaled) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  if (!(high > low)) [low, high] = Number.isFinite(low) ? [low - 0.5, low + 0.5] : [0, 1];
  const room = 0.03 * (high - low);
  low -= room;
  high += room;
  return { at: scaled.map((value) => (value - low) / (high - low)), low, high };
}

/** A view that is `by` times as wide; what lies at the share (fx, fy) of it stays there. */
function zoomed(view: View, by: number, fx: number, fy: number): View | null {
  const grow = ([low, high]: [number, number], f: number): [number, number] => {
    const span = Math.min(1, Math.max(FINEST, (high - low) * by));
    const start = Math.min(Math.max(0, low + f * (high - low - span)), 1 - span);
    return [start, start + span];
  };
  const next: View = { x: grow(view.x, fx), y: grow(view.y, fy) };
  return next.x[1] - next.x[0] > 0.999 && next.y[1] - next.y[0] > 0.999 ? null : next;
}

export function Scatter(props: Props) {
  const { x, y, colorOf, nameOf, shown, marked, describe, onPick, onMark, view, onView, plain } = props;
  const canvas = useRef<HTMLCanvasElement>(null);
  const [size, setSize] = useState<[number, number]>([0, 0]);
  const dragged = useRef<{ from: [number, number]; view: View; moved: boolean } | null>(null);
  const across = useMemo(() => place(x), [x.values, x.log]);
  const up = useMemo(() => place(y), [y.values, y.log]);
  const seen: View = view ?? WHOLE;
  const margin = plain ? PLAIN : NUMBERED;
  const [width, height] = size;
  const inner = { width: Math.max(1, width - margin.left - margin.right), height: Math.max(1, height - margin.top - margin.bottom) };
  const toX = (share: number) => margin.left + ((share - seen.x[0]) / (seen.x[1] - seen.x[0])) * inner.width;
  const toY = (share: number) => margin.top + (1 - (share - seen.y[0]) / (seen.y[1] - seen.y[0])) * inner.height;
  useTheme(); // another theme is drawn anew

  useEffect(() => {
    const element = canvas.current;
    if (!element) return;
    const watch = new ResizeObserver(() => setSize([element.clientWidth, element.clientHeight]));
    watch.observe(element);
    return () => watch.disconnect();
  }, []);

  useEffect(() => {
    const element = canvas.current;
    const context = element?.getContext("2d");
    if (!element || !context || !width) return;
    const scale = window.devicePixelRatio || 1;
    element.width = width * scale;
    element.height = height * scale;
    context.setTransform(scale, 0, 0, scale, 0, 0);
    const style = getComputedStyle(element);
    const [soft, line, text] = ["--soft", "--line", "--text"].map((name) => style.getPropertyValue(name)) as [string, string, string];
    context.clearRect(0, 0, width, height);
    drawAxes(context, soft, line);
    context.save();
    context.beginPath();
    context.rect(margin.left, margin.top, inner.width, inner.height);
    context.clip();
    drawPoints(context, soft);
    if (marked !== null) {
      context.globalAlpha = 1;
      context.strokeStyle = text;
      context.lineWidth = 2;
      context.beginPath();
      context.arc(toX(across.at[marked] ?? NaN), toY(up.at[marked] ?? NaN), 7, 0, 7);
      context.stroke();
    }
    context.restore();
  });

  function drawPoints(context: CanvasRenderingContext2D, soft: string): void {
    const n = across.at.length;
    const radius = n > 20_000 ? 1.2 : n > 3000 ? 1.8 : 3.5;
    const dots = radius < 2 ? new Dots(width, height, window.devicePixelRatio || 1) : null;
    context.strokeStyle = soft;
    context.lineWidth = 0.5;
    const inside: { x: number; y: number; latent: number }[] = [];
    for (const wanted of [0, 1]) {
      context.globalAlpha = wanted ? 0.9 : 0.25;
      for (let latent = 0; latent < n; latent++) {
        if ((shown[latent] ?? 0) !== wanted) continue;
        const px = toX(across.at[latent] ?? NaN);
        const py = toY(up.at[latent] ?? NaN);
        if (!(px > 0 && px < width && py > 0 && py < height)) continue; // NaN, too
        const color = wanted ? colorOf(latent) : soft;
        if (dots) dots.add(px, py, radius, color, wanted ? 0.9 : 0.25);
        else {
          context.fillStyle = color;
          context.beginPath();
          context.arc(px, py, radius, 0, 7);
          context.fill();
          context.stroke(); // so that the ends of the scale are seen on either theme
        }
        if (wanted) inside.push({ x: px, y: py, latent });
      }
    }
    context.globalAlpha = 1;
    dots?.draw(context);
    context.fillStyle = soft;
    const room: Box = { left: margin.left, top: margin.top, right: width - margin.right, bottom: height - margin.bottom };
    nameFew(context, inside, nameOf, room);
  }

  function drawAxes(context: CanvasRenderingContext2D, soft: string, line: string): void {
    context.strokeStyle = line;
    context.lineWidth = 1;
    context.fillStyle = soft;
    context.font = "12px system-ui, sans-serif";
    if (plain) return;
    context.strokeRect(margin.left, margin.top, inner.width, inner.height);
    context.textAlign = "center";
    for (const { share, text } of marks(x, across, seen.x, inner.width / 90)) context.fillText(text, toX(share), height - margin.bottom + 16);
    context.fillText(x.title, margin.left + inner.width / 2, height - 6);
    context.textAlign = "right";
    for (const { share, text } of marks(y, up, seen.y, inner.height / 60)) context.fillText(text, margin.left - 6, toY(share) + 4);
    context.save();
    context.translate(12, margin.top + inner.height / 2);
    context.rotate(-Math.PI / 2);
    context.textAlign = "center";
    context.fillText(y.title, 0, 0);
    context.restore();
  }

  function nearest(event: MouseEvent): number | null {
    let best: number | null = null;
    let distance = REACH * REACH;
    for (let latent = 0; latent < across.at.length; latent++) {
      if (!shown[latent]) continue;
      const dx = toX(across.at[latent] ?? NaN) - event.offsetX;
      const dy = toY(up.at[latent] ?? NaN) - event.offsetY;
      const d = dx * dx + dy * dy;
      if (d < distance) [best, distance] = [latent, d];
    }
    return best;
  }

  function turn(event: WheelEvent): void {
    event.preventDefault();
    onView(zoomed(seen, Math.exp(event.deltaY * 0.0015), (event.offsetX - margin.left) / inner.width, 1 - (event.offsetY - margin.top) / inner.height));
  }

  function move(event: PointerEvent): void {
    const drag = dragged.current;
    if (!drag) {
      onMark(nearest(event));
      return;
    }
    const dx = (event.offsetX - drag.from[0]) / inner.width;
    const dy = (event.offsetY - drag.from[1]) / inner.height;
    if (Math.abs(dx) + Math.abs(dy) < 0.01 && !drag.moved) return;
    drag.moved = true;
    if (!view) return; // there is nowhere to go
    const slide = ([low, high]: [number, number], by: number): [number, number] => {
      const start = Math.min(Math.max(0, low + by * (high - low)), 1 - (high - low));
      return [start, start + high - low];
    };
    onView({ x: slide(drag.view.x, -dx), y: slide(drag.view.y, dy) });
  }

  const end = () => {
    dragged.current = null;
    onMark(null);
  };
  const text = marked === null ? "" : describe(marked);
  const hint = matchMedia("(pointer: coarse)").matches ? "Tap a point to open it." : "Click a point to open it; scroll to zoom, drag to move.";
  return (
    <div class="scatter">
      <canvas ref={canvas} role="img" class={view ? "near" : ""}
        aria-label={`${plain ? "Map of decoder directions" : `${y.title} against ${x.title}`} of all latents; the list holds the same latents.`}
        onWheel={turn}
        onPointerDown={(event) => {
          dragged.current = { from: [event.offsetX, event.offsetY], view: seen, moved: false };
          event.currentTarget.setPointerCapture(event.pointerId);
        }}
        onPointerMove={move}
        onPointerUp={(event) => {
          const drag = dragged.current;
          dragged.current = null;
          const found = !drag || drag.moved ? null : nearest(event);
          if (found !== null) onPick(found);
        }}
        onPointerCancel={end}
        onPointerLeave={end} />
      <p class="hover soft" aria-hidden="true">{text || hint}</p>
      <span class="zoom">
        {view && <button type="button" onClick={() => onView(null)}>show all</button>}
        <button type="button" aria-label="Zoom in" title="Zoom in" onClick={() => onView(zoomed(seen, ZOOM, 0.5, 0.5))}>+</button>
        <button type="button" aria-label="Zoom out" title="Zoom out" disabled={!view} onClick={() => onView(zoomed(seen, 1 / ZOOM, 0.5, 0.5))}>−</button>
      </span>
    </div>
  );
}

function marks(axis: Axis, { low, high }: { low: number; high: number }, seen: [number, number], about: number): { share: number; text: string }[] {
  const first = low + seen[0] * (high - low);
  const last = low + seen[1] * (high - low);
  const rough = (last - first) / Math.max(2, about);
  const unit = 10 ** Math.floor(Math.log10(rough));
  let step = [1, 2, 5, 10].map((n) => n * unit).find((n) => n >= rough) ?? rough;
  if (axis.log && step < 1) step = last - first < 1.2 ? step : 1;
  const found = [];
  for (let value = Math.ceil(first / step) * step; value <= last; value += step)
    found.push({ share: (value - low) / (high - low), text: axis.log ? show(10 ** value, 2) : show(Number(value.toPrecision(6))) });
  return found;
}
