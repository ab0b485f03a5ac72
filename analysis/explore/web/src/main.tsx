// The page: a bar with the search box, and below it what the address names.
import { render } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import { AdaptationPage } from "./adaptation";
import { AtlasPage } from "./atlas";
import { forgetAtlas, readSite, readSiteAgain, startAtlas } from "./data";
import { show } from "./format";
import { Help } from "./help";
import { ImagePage, ImagesPage } from "./image";
import { useKeys } from "./keys";
import { LatentPage } from "./latent";
import { Show, useLoaded } from "./loading";
import { ResultsPage } from "./results";
import { amend, go, link, parse, useRoute, type Route } from "./route";
import { applyTheme, restoreTheme, THEMES, useTheme } from "./theme";
import type { Site } from "./types";

const AGAIN_MS = 5000;

function App() {
  const site = useLoaded(readSite, []);
  return <Show of={site}>{(found) => <Growing first={found} />}</Show>;
}

/** A server makes some columns, as the map, after it has started; until they are there, it is asked now and then. */
function Growing({ first }: { first: Site }) {
  const [site, setSite] = useState(first);
  useEffect(() => {
    if (!site.making.length) return;
    const timer = setInterval(() => {
      readSiteAgain().then((now) => {
        if (now.making.length === site.making.length) return;
        forgetAtlas();
        setSite(now);
      }, () => undefined);
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
    a: () => go("atlas"), i: () => go("images"), "?": () => help(true),
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
        <button type="button" onClick={() => help(true)} aria-haspopup="dialog" aria-label="Keys" title="Keys (?)">?</button>
      </header>
      <Help site={site} open={helping} onClose={() => help(false)} />
      <main id="main" class={route.page === "results" ? "whole" : undefined} ref={main} tabIndex={-1}>{pageOf(site, route)}</main>
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
    case "adaptation": return site.has.comparison ? <AdaptationPage {...{ site, route }} /> : <Absent {...{ site, route }} />;
    case "results": return site.has.results ? <ResultsPage {...{ site }} /> : <Absent {...{ site, route }} />;
    default: return <p class="error">There is no page {route.page}. <a href={link("atlas")}>Go to the atlas.</a></p>;
  }
}

/** A page that this table does not have, with what would give it. */
function Absent({ site, route }: { site: Site; route: Route }) {
  return <p class="error">{site.missing[route.page === "adaptation" ? "comparison" : route.page]} <a href={link("atlas")}>Go to the atlas.</a></p>;
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
  const { theme } = useTheme();
  const next = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length] ?? "auto";
  const title = `Colors: ${theme}. Change to ${next}.`;
  return <button type="button" title={title} aria-label={title} onClick={() => applyTheme(next)}>{{ auto: "◐", light: "☀", dark: "☾" }[theme]}</button>;
}

restoreTheme();
if (parse(location.hash).page === "atlas") startAtlas();
const root = document.querySelector("#app");
if (root) {
  root.replaceChildren();
  render(<App />, root);
}
