// Light, dark or as the system is: the choice is kept in the browser, and told to whoever draws colors by itself.
import { useEffect, useState } from "preact/hooks";

export const THEMES = ["auto", "light", "dark"] as const;
export type Theme = (typeof THEMES)[number];

const CHANGED = "patchsae:theme";
const system = matchMedia("(prefers-color-scheme: dark)");

const chosen = (): Theme => (document.documentElement.dataset.theme as Theme | undefined) ?? "auto";

export function applyTheme(theme: Theme): void {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  try {
    localStorage.setItem("theme", theme);
  } catch {
    // a browser without storage forgets it
  }
  window.dispatchEvent(new Event(CHANGED));
}

/** What was chosen on an earlier visit. */
export function restoreTheme(): void {
  try {
    const kept = localStorage.getItem("theme");
    if (kept === "light" || kept === "dark") applyTheme(kept);
  } catch {
    // as above
  }
}

/** What is chosen, and whether the page is dark now. */
export function useTheme(): { theme: Theme; dark: boolean } {
  const read = () => ({ theme: chosen(), dark: chosen() === "dark" || (chosen() === "auto" && system.matches) });
  const [state, set] = useState(read);
  useEffect(() => {
    const change = () => set(read());
    window.addEventListener(CHANGED, change);
    system.addEventListener("change", change);
    return () => {
      window.removeEventListener(CHANGED, change);
      system.removeEventListener("change", change);
    };
  }, []);
  return state;
}
