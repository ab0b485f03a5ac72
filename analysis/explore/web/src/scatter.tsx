// All latents as points on a canvas: 50,000 of them are drawn in a few milliseconds, and the nearest is found as quickly.
import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { show } from "./format";

export interface Axis {
  title: string;
  log: boolean;
  values: Float32Array;
}

export interface View {
  x: [number, number];
  y: [number, number];
}

interface Props {
  x: Axis;
  y: Axis;
  /** A CSS color for each latent. */
  colorOf: (latent: number) => string;
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

const MARGIN = { left: 54, right: 12, top: 10, bottom: 38 };
const REACH = 14; // pixels within which a point is picked

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

export function Scatter(props: Props) {
  const { x, y, colorOf, shown, marked, describe, onPick, onMark, view, onView, plain } = props;
  const canvas = useRef<HTMLCanvasElement>(null);
  const [size, setSize] = useState<[number, number]>([0, 0]);
  const dragged = useRef<{ from: [number, number]; view: View; moved: boolean } | null>(null);
  const across = useMemo(() => place(x), [x.values, x.log]);
  const up = useMemo(() => place(y), [y.values, y.log]);
  const seen: View = view ?? { x: [0, 1], y: [0, 1] };
  const [width, height] = size;
  const inner = { width: Math.max(1, width - MARGIN.left - MARGIN.right), height: Math.max(1, height - MARGIN.top - MARGIN.bottom) };
  const toX = (share: number) => MARGIN.left + ((share - seen.x[0]) / (seen.x[1] - seen.x[0])) * inner.width;
  const toY = (share: number) => MARGIN.top + (1 - (share - seen.y[0]) / (seen.y[1] - seen.y[0])) * inner.height;

  useEffect(() => {
    const element = canvas.current;
    if (!element) return;
    const watch = new ResizeObserver(() => setSize([element.clientWidth, element.clientHeight]));
    watch.observe(element);
    return () => watch.disconnect();
  }, []);

  const [theme, setTheme] = useState(0);
  useEffect(() => {
    const change = () => setTheme((n) => n + 1);
    window.addEventListener("patchsae:theme", change);
    return () => window.removeEventListener("patchsae:theme", change);
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
    context.clearRect(0, 0, width, height);
    drawAxes(context, style.getPropertyValue("--soft"), style.getPropertyValue("--line"));
    context.save();
    context.beginPath();
    context.rect(MARGIN.left, MARGIN.top, inner.width, inner.height);
    context.clip();
    const n = across.at.length;
    const radius = n > 20_000 ? 1.2 : n > 3000 ? 1.8 : 3;
    for (const wanted of [0, 1]) {
      context.globalAlpha = wanted ? 0.85 : 0.25;
      for (let latent = 0; latent < n; latent++) {
        if ((shown[latent] ?? 0) !== wanted) continue;
        const px = toX(across.at[latent] ?? NaN);
        const py = toY(up.at[latent] ?? NaN);
        if (Number.isNaN(px + py)) continue;
        context.fillStyle = wanted ? colorOf(latent) : style.getPropertyValue("--soft");
        if (radius < 2) context.fillRect(px - radius, py - radius, 2 * radius, 2 * radius);
        else {
          context.beginPath();
          context.arc(px, py, radius, 0, 7);
          context.fill();
        }
      }
    }
    if (marked !== null) {
      context.globalAlpha = 1;
      context.strokeStyle = style.getPropertyValue("--text");
      context.lineWidth = 2;
      context.beginPath();
      context.arc(toX(across.at[marked] ?? NaN), toY(up.at[marked] ?? NaN), 7, 0, 7);
      context.stroke();
    }
    context.restore();
  });
  void theme;

  function drawAxes(context: CanvasRenderingContext2D, soft: string, line: string): void {
    context.strokeStyle = line;
    context.fillStyle = soft;
    context.font = "12px system-ui, sans-serif";
    context.strokeRect(MARGIN.left, MARGIN.top, inner.width, inner.height);
    if (plain) return;
    context.textAlign = "center";
    for (const { share, text } of marks(x, across, seen.x, inner.width / 90)) context.fillText(text, toX(share), height - MARGIN.bottom + 16);
    context.fillText(x.title, MARGIN.left + inner.width / 2, height - 6);
    context.textAlign = "right";
    for (const { share, text } of marks(y, up, seen.y, inner.height / 60)) context.fillText(text, MARGIN.left - 6, toY(share) + 4);
    context.save();
    context.translate(12, MARGIN.top + inner.height / 2);
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

  function zoom(event: WheelEvent): void {
    event.preventDefault();
    const by = Math.exp(event.deltaY * 0.0015);
    const fx = (event.offsetX - MARGIN.left) / inner.width;
    const fy = 1 - (event.offsetY - MARGIN.top) / inner.height;
    const grow = ([low, high]: [number, number], f: number): [number, number] => {
      const span = Math.min(1, (high - low) * by);
      const at = low + f * (high - low);
      const start = Math.min(Math.max(0, at - f * span), 1 - span);
      return [start, start + span];
    };
    const next: View = { x: grow(seen.x, fx), y: grow(seen.y, fy) };
    onView(next.x[1] - next.x[0] > 0.999 && next.y[1] - next.y[0] > 0.999 ? null : next);
  }

  function move(event: MouseEvent): void {
    const drag = dragged.current;
    if (!drag) {
      onMark(nearest(event));
      return;
    }
    const dx = (event.offsetX - drag.from[0]) / inner.width;
    const dy = (event.offsetY - drag.from[1]) / inner.height;
    if (Math.abs(dx) + Math.abs(dy) < 0.005 && !drag.moved) return;
    drag.moved = true;
    const slide = ([low, high]: [number, number], by: number): [number, number] => {
      const start = Math.min(Math.max(0, low + by * (high - low)), 1 - (high - low));
      return [start, start + high - low];
    };
    onView({ x: slide(drag.view.x, -dx), y: slide(drag.view.y, dy) });
  }

  const text = marked === null ? "" : describe(marked);
  return (
    <div class="scatter">
      <canvas ref={canvas} role="img" tabIndex={-1}
        aria-label={`${plain ? "Map of decoder directions" : `${y.title} against ${x.title}`} of all latents; the list holds the same latents.`}
        onWheel={zoom}
        onMouseDown={(event) => (dragged.current = { from: [event.offsetX, event.offsetY], view: seen, moved: false })}
        onMouseMove={move}
        onMouseUp={(event) => {
          const drag = dragged.current;
          dragged.current = null;
          const found = drag?.moved ? null : nearest(event);
          if (found !== null) onPick(found);
        }}
        onMouseLeave={() => {
          dragged.current = null;
          onMark(null);
        }} />
      <p class="hover" aria-hidden="true">{text || (view ? "" : "Click a point to open it; scroll to zoom, drag to move.")}</p>
      {view && <button type="button" class="whole" onClick={() => onView(null)}>show all</button>}
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
