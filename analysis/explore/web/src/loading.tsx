// What waits for data: it shows a line while it waits, and one that says why where it fails.
import type { ComponentChildren } from "preact";
import { useEffect, useState } from "preact/hooks";

export type Loaded<T> = { value: T } | { error: string } | null;

/** Load again whenever `keys` change. What was loaded before stays until the new is there, so the page does not flicker. */
export function useLoaded<T>(load: () => Promise<T>, keys: unknown[]): Loaded<T> {
  const [loaded, set] = useState<Loaded<T>>(null);
  useEffect(() => {
    let current = true;
    load().then(
      (value) => current && set({ value }),
      (error: unknown) => current && set({ error: error instanceof Error ? error.message : String(error) }),
    );
    return () => {
      current = false;
    };
  }, keys);
  return loaded;
}

export function Show<T>({ of, children }: { of: Loaded<T>; children: (value: T) => ComponentChildren }) {
  if (of === null) return <p class="wait" role="status">Loading.</p>;
  if ("error" in of) return <p class="error" role="alert">{of.error}</p>;
  return <>{children(of.value)}</>;
}
