// The page: a bar with the search box, and below it what the address names.
import { render } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import { AdaptationPage } from "./adaptation";
import { AtlasPage } from "./atlas";
import { readSite, readSiteAgain } from "./data";
import { show } from "./format";
import { ImagePage, ImagesPage } from "./image";
import { KEYS, useKeys } from "./keys";
import { LatentPage } from "./latent";
import { Show, useLoaded } from "./loading";
import { amend, go, link, useRoute, type Route } from "./route";
import type { Site } from "./types";

const THEMES = ["auto", "light", "dark"] as const;
type Theme = (typeof THEMES)[number];

const AGAIN_MS = 5000;

function App() {
  const site = useLoaded(readSite, []);
  return <Show of={site}>{(found) => <Growing first={found} />}</Show>;
}

/** A server draws its map after it has started; until it is there, it is asked for now and then. */
function Growing({ first }: { first: Site }) {
  const [site, setSite] = useState(first);
  useEffect(() => {
    if (!site.live || site.has.map) return;
    const timer = setInterval(() => {
      readSiteAgain().then((now) => now.has.map && setSite(now), () => undefined);
    }, AGAIN_MS);
    return () => clearInterval(timer);
  }, [site]);
  return <Explorer site={site} />;
}

function Explorer({ site }: { site: Site }) {
  const route = useRoute();
  const main = useRef<HTMLElement>(null);
  const [helping, help] = useState(false);
  useKeys({
    a: () => go("atlas"), i: () => go("images"), "?": () => help(!helping),
    "/": () => document.querySelector<HTMLInputElement>("#search")?.focus(),
  });
  const first = useRef(true);
  useEffect(() => {
    if (!first.current) main.current?.focus({ preventScroll: true }); // a screen reader goes on with the new page
    first.current = false;
    window.scrollTo(0, 0);
  }, [route.page, route.rest]);
  return (
    <>
      <a class="skip" href="#main" onClick={(event) => {
        event.preventDefault();
        main.current?.focus();
      }}>Skip to the content</a>
      <header class="bar">
        <a class="title" href={link("atlas")} title={`${site.hook_point}, ${show(site.n_latents)} latents, ${show(site.n_images)} images`}>{site.title}</a>
        <nav aria-label="Pages">
          {pagesOf(site).map(([page, title]) => <a key={page} href={link(page)} aria-current={route.page === page ? "page" : undefined}>{title}</a>)}
        </nav>
        <span class="spring" />
        <SearchBox route={route} />
        <ThemeButton />
        <button type="button" onClick={() => help(!helping)} aria-expanded={helping} title="Keys (?)">?</button>
      </header>
      {helping && (
        <section class="help" aria-label="Keys">
          <dl>{KEYS.map(([key, what]) => <div key={key}><dt><kbd>{key}</kbd></dt><dd>{what}</dd></div>)}</dl>
          <p class="soft">{site.hook_point} of {site.model ?? "its model"} · {site.variant ?? "SAE"} with {show(site.n_latents)} latents, of which {show(site.n_alive)} fire · {show(site.n_images)} images, {show(site.n_tokens)} tokens · concepts {site.concepts_id}</p>
        </section>
      )}
      <main id="main" ref={main} tabIndex={-1}>{pageOf(site, route)}</main>
    </>
  );
}

function pagesOf(site: Site): [string, string][] {
  const pages: [string, string][] = [["atlas", "Atlas"], ["images", "Images"]];
  if (site.has.comparison) pages.push(["adaptation", "Adaptation"]);
  if (site.has.results) pages.push(["results", "Results"]);
  return pages;
}

function pageOf(site: Site, route: Route) {
  switch (route.page) {
    case "atlas": return <AtlasPage {...{ site, route }} />;
    case "latent": return <LatentPage {...{ site, route }} />;
    case "image": return <ImagePage {...{ site, route }} />;
    case "images": return <ImagesPage {...{ site, route }} />;
    case "adaptation": return <AdaptationPage {...{ site, route }} />;
    case "results": return <iframe class="results" title="Results" src="data/results.html" />;
    default: return <p class="error">There is no page {route.page}. <a href={link("atlas")}>Go to the atlas.</a></p>;
  }
}

/** Searches the atlas; a number and Enter opens that latent. */
function SearchBox({ route }: { route: Route }) {
  const [text, setText] = useState(route.page === "atlas" ? (route.query.get("q") ?? "") : "");
  useEffect(() => {
    if (route.page === "atlas") setText(route.query.get("q") ?? "");
  }, [route.page, route.query.get("q")]);
  const type = (value: string) => {
    setText(value);
    if (route.page === "atlas") amend({ q: value, page: null }, true);
  };
  return (
    <form role="search" aria-label="Latents" onSubmit={(event) => {
      event.preventDefault();
      if (/^\d+$/.test(text.trim())) go(`latent/${Number(text)}`);
      else go("atlas", { q: text });
    }}>
      <input id="search" type="search" placeholder="number, name or class" aria-label="Search latents by number, name, note or class" value={text} onInput={(event) => type(event.currentTarget.value)} />
    </form>
  );
}

function ThemeButton() {
  const [theme, setTheme] = useState<Theme>(() => (document.documentElement.dataset.theme as Theme | undefined) ?? "auto");
  const next = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length] ?? "auto";
  return <button type="button" title={`Colors: ${theme}. Change to ${next}.`} aria-label={`Colors: ${theme}. Change to ${next}.`} onClick={() => {
    setTheme(next);
    applyTheme(next);
  }}>{{ auto: "◐", light: "☀", dark: "☾" }[theme]}</button>;
}

function applyTheme(theme: Theme): void {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  try {
    localStorage.setItem("theme", theme);
  } catch {
    // a browser without storage forgets it
  }
  window.dispatchEvent(new Event("patchsae:theme"));
}

try {
  const kept = localStorage.getItem("theme");
  if (kept === "light" || kept === "dark") applyTheme(kept);
} catch {
  // as above
}
const root = document.querySelector("#app");
if (root) {
  root.replaceChildren();
  render(<App />, root);
}
