// A picture whose patches can be chosen with a click, by dragging, or with the arrow keys and the space bar.
import { useRef, useState } from "preact/hooks";
import { HeatMap, shapeOf, type Heat } from "./heat";
import type { Site } from "./types";

interface Props {
  site: Site;
  source: string | null;
  alt: string;
  heat: Heat | null;
  maximum: number;
  threshold: number;
  chosen: number[];
  onChoose: (patches: number[]) => void;
  onPoint: (patch: number | null) => void;
}

export function PatchPicker({ site, source, alt, heat, maximum, threshold, chosen, onChoose, onPoint }: Props) {
  const [rows, columns] = site.grid;
  const [height, width] = site.covered;
  const box = useRef<HTMLDivElement>(null);
  const from = useRef<number | null>(null);
  const [dragged, setDragged] = useState<number[] | null>(null);
  const [at, setAt] = useState<number | null>(null);

  const patchAt = (event: PointerEvent): number | null => {
    const { left, top, width: w, height: h } = box.current?.getBoundingClientRect() ?? new DOMRect();
    const column = Math.floor(((event.clientX - left) / (w * width)) * columns);
    const row = Math.floor(((event.clientY - top) / (h * height)) * rows);
    return row >= 0 && row < rows && column >= 0 && column < columns ? row * columns + column : null;
  };
  const between = (a: number, b: number): number[] => {
    const [r0, r1] = [Math.floor(a / columns), Math.floor(b / columns)].sort((x, y) => x - y) as [number, number];
    const [c0, c1] = [a % columns, b % columns].sort((x, y) => x - y) as [number, number];
    return Array.from({ length: (r1 - r0 + 1) * (c1 - c0 + 1) }, (_, i) => (r0 + Math.floor(i / (c1 - c0 + 1))) * columns + c0 + (i % (c1 - c0 + 1)));
  };
  const toggle = (patch: number) => onChoose(chosen.includes(patch) ? chosen.filter((each) => each !== patch) : [...chosen, patch].sort((a, b) => a - b));
  const point = (patch: number | null) => {
    setAt(patch);
    onPoint(patch);
  };
  const press = (event: KeyboardEvent) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
    if (event.key === "Escape") onChoose([]);
    else if (event.key === " " && at !== null) toggle(at);
    else if (step !== undefined) {
      const next = (at ?? 0) + step;
      const wraps = Math.abs(step) === 1 && Math.floor(next / columns) !== Math.floor((at ?? 0) / columns);
      if (at === null) point(0);
      else if (next >= 0 && next < rows * columns && !wraps) point(next);
    } else return;
    event.preventDefault();
    event.stopPropagation();
  };
  const marked = dragged ?? chosen;
  const cell = (patch: number) => ({
    left: `${(100 * width * (patch % columns)) / columns}%`,
    top: `${(100 * height * Math.floor(patch / columns)) / rows}%`,
    width: `${(100 * width) / columns}%`,
    height: `${(100 * height) / rows}%`,
  });
  return (
    <div ref={box} class="picture picker" tabIndex={0} role="application" style={{ aspectRatio: shapeOf(site) }}
      aria-label={`${alt}: ${rows} by ${columns} patches. Move with the arrow keys, choose with space, clear with Escape. ${marked.length ? `${marked.length} chosen.` : ""}`}
      onKeyDown={press}
      onPointerDown={(event) => {
        const patch = patchAt(event);
        if (event.button !== 0 || patch === null) return;
        from.current = patch;
        setDragged([patch]);
        event.currentTarget.setPointerCapture(event.pointerId);
      }}
      onPointerMove={(event) => {
        const patch = patchAt(event);
        point(patch);
        if (from.current !== null && patch !== null) setDragged(between(from.current, patch));
      }}
      onPointerUp={(event) => {
        const done = dragged;
        const first = from.current;
        from.current = null;
        setDragged(null);
        if (!done || first === null) return;
        if (done.length === 1 && (event.shiftKey || event.ctrlKey || event.metaKey)) toggle(first);
        else if (done.length === 1) onChoose(chosen.length === 1 && chosen[0] === first ? [] : [first]);
        else onChoose(event.shiftKey ? [...new Set([...chosen, ...done])].sort((a, b) => a - b) : done);
      }}
      onPointerCancel={() => {
        from.current = null; // the browser scrolls instead
        setDragged(null);
      }}
      onPointerLeave={() => point(null)}>
      {source ? <img src={source} alt="" draggable={false} /> : <span class="blank">{alt}</span>}
      {heat && <HeatMap {...{ site, heat, maximum, threshold }} />}
      {marked.map((patch) => <i key={patch} class="chosen" style={cell(patch)} />)}
      {at !== null && <i class="pointed" style={cell(at)} />}
    </div>
  );
}
