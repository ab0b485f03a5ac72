// The state of the page is its address: #/latent/12?heat=0.3. Back and forward therefore work, and a link shows the same.
import { useEffect, useState } from "preact/hooks";

export interface Route {
  /** atlas, latent, image, images, adaptation or results. */
  page: string;
  /** What follows it, e.g. the number of a latent. */
  rest: string;
  query: URLSearchParams;
}

export type Query = Record<string, string | number | null | undefined>;

export function parse(hash: string): Route {
  const [path = "", query = ""] = hash.replace(/^#\/?/, "").split("?", 2);
  const [page = "", ...rest] = path.split("/");
  return { page: page || "atlas", rest: rest.join("/"), query: new URLSearchParams(query) };
}

/** #/latent/12?heat=0.3; what is null, undefined or "" is left out. */
export function link(path: string, query: Query = {}): string {
  const given = Object.entries(query).filter(([, value]) => value !== null && value !== undefined && value !== "");
  const text = new URLSearchParams(given.map(([name, value]) => [name, String(value)])).toString();
  return `#/${path}${text ? `?${text}` : ""}`;
}

const CHANGED = "patchsae:route";

/** Change parts of the query. With `replace`, no entry of the history is made, as for a slider that is being moved. */
export function amend(changes: Query, replace = false): void {
  const { page, rest, query } = parse(location.hash);
  const address = link(rest ? `${page}/${rest}` : page, { ...Object.fromEntries(query), ...changes });
  if (address === location.hash) return;
  if (replace) history.replaceState(null, "", address);
  else history.pushState(null, "", address);
  window.dispatchEvent(new Event(CHANGED));
}

export function go(path: string, query: Query = {}): void {
  location.hash = link(path, query);
}

export function useRoute(): Route {
  const [route, set] = useState(() => parse(location.hash));
  useEffect(() => {
    const read = () => set(parse(location.hash));
    for (const event of ["hashchange", "popstate", CHANGED]) window.addEventListener(event, read);
    return () => ["hashchange", "popstate", CHANGED].forEach((event) => window.removeEventListener(event, read));
  }, []);
  return route;
}
