// Keys for what is done often. None works while a person types.
import { useEffect } from "preact/hooks";

export function useKeys(actions: Record<string, () => void>): void {
  useEffect(() => {
    const press = (event: KeyboardEvent) => {
      const target = event.target as HTMLElement;
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      if (target.isContentEditable || ["INPUT", "TEXTAREA", "SELECT"].includes(target.tagName)) return;
      const action = actions[event.key];
      if (!action) return;
      event.preventDefault();
      action();
    };
    window.addEventListener("keydown", press);
    return () => window.removeEventListener("keydown", press);
  });
}

export const KEYS: [string, string][] = [
  ["/", "search"],
  ["n, →", "next latent or image"],
  ["p, ←", "previous latent or image"],
  ["h", "heat maps on or off"],
  ["a", "atlas"],
  ["i", "images"],
  ["?", "this list"],
  ["Esc", "close, or clear a selection"],
];
