// What is far from the screen waits until the browser has nothing else to do, so that what is on it comes first.
import type { RefObject } from "preact";
import { useEffect, useState } from "preact/hooks";

const waiting = new Map<Element, () => void>();
let idle = 0;
const AT_ONCE = 12; // in one idle period
const REST_MS = 300; // after the last one that was near

const watch =
  typeof IntersectionObserver === "undefined" ? null
    : new IntersectionObserver((seen) => seen.forEach(({ target, isIntersecting }) => isIntersecting && start(target)));

function start(element: Element): void {
  const go = waiting.get(element);
  waiting.delete(element);
  watch?.unobserve(element);
  go?.();
}

function rest(): void {
  for (const element of [...waiting.keys()].slice(0, AT_ONCE)) start(element);
  idle = waiting.size ? later(rest, 0) : 0;
}

function later(work: () => void, ms: number): number {
  return window.setTimeout(() => ("requestIdleCallback" in window ? window.requestIdleCallback(work) : work()), ms);
}

/** Whether an element's content is due: at once where it is on the screen, otherwise a little later. */
export function useDue(box: RefObject<Element | null>): boolean {
  const [due, set] = useState(watch === null);
  useEffect(() => {
    const element = box.current;
    if (!element || !watch) return;
    waiting.set(element, () => set(true));
    watch.observe(element);
    clearTimeout(idle);
    idle = later(rest, REST_MS);
    return () => {
      waiting.delete(element);
      watch.unobserve(element);
    };
  }, []);
  return due;
}
