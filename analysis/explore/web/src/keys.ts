// Keys for what is done often. None works while a person types, or while a dialog is open.
import { useEffect } from "preact/hooks";

export function useKeys(actions: Record<string, () => void>): void {
  useEffect(() => {
    const press = (event: KeyboardEvent) => {
      const target = event.target as HTMLElement;
      if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
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

export const KEYS: [string[], string][] = [
  [["/"], "search latents"],
  [["n", "→"], "next latent or image"],
  [["p", "←"], "previous latent or image"],
  [["h"], "heat maps on or off"],
  [["a"], "atlas"],
  [["i"], "images"],
  [["Tab"], "go to the next link, button or picture with patches"],
  [["←", "↑", "↓", "→"], "on such a picture: go from patch to patch"],
  [["Space"], "choose the patch, or no longer"],
  [["Esc"], "clear what is chosen; close this list"],
  [["?"], "this list"],
];
