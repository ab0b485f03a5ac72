// Reads data/ and keeps what was read: the same files, whether a server answers or a folder does.
import type { Comparison, Edit, EditRequest, ImageRecord, Images, Latent, Names, Site, Upload } from "./types";

/** A failure with a line that can be shown. */
export class Failure extends Error {}

const N_KEPT = 400; // blocks of each kind; a block of a site has at most half a megabyte

async function get(url: string): Promise<Response> {
  let response: Response;
  try {
    response = await fetch(url);
  } catch {
    throw new Failure(`${url} cannot be reached. Is the server still running?`);
  }
  if (!response.ok) throw new Failure(await explain(response, url));
  return response;
}

async function explain(response: Response, url: string): Promise<string> {
  try {
    const body = (await response.json()) as { error?: string };
    if (body.error) return body.error;
  } catch {
    // it is not JSON: a static host says only the status
  }
  return response.status === 404 ? `${url} is not there.` : `${url} was answered with status ${response.status}.`;
}

/** A function that asks once for each key and keeps the newest answers. A failed answer is asked for again. */
function remember<K, V>(load: (key: K) => Promise<V>, forget?: (value: V) => void): (key: K) => Promise<V> {
  const known = new Map<K, Promise<V>>();
  return (key) => {
    const found = known.get(key);
    if (found) {
      known.delete(key);
      known.set(key, found); // the newest lie at the end
      return found;
    }
    const asked = load(key);
    asked.catch(() => known.delete(key));
    known.set(key, asked);
    if (known.size > N_KEPT) {
      const [oldest, value] = known.entries().next().value as [K, Promise<V>];
      known.delete(oldest);
      if (forget) value.then(forget, () => undefined);
    }
    return asked;
  };
}

const json = remember(async (url: string) => (await get(url)).json() as Promise<unknown>);

export const readSite = () => json("data/site.json") as Promise<Site>;

/** What the server says now: it makes some parts, as the map, after it has started. */
export async function readSiteAgain(): Promise<Site> {
  const site = (await (await get("data/site.json")).json()) as Site;
  atlas = undefined;
  return site;
}
export const readImages = () => json("data/images.json") as Promise<Images>;
export const readComparison = () => json("data/comparison.json") as Promise<Comparison>;

/** The columns of the atlas, by name: [n_latents] each. */
export type Atlas = Record<string, Float32Array>;

let atlas: Promise<Atlas> | undefined;

export function readAtlas(site: Site): Promise<Atlas> {
  atlas ??= get("data/atlas.bin")
    .then((response) => response.arrayBuffer())
    .then((buffer) =>
      Object.fromEntries(
        site.columns.map(({ name }, i) => [name, new Float32Array(buffer, 4 * i * site.n_latents, site.n_latents)]),
      ),
    );
  return atlas;
}

async function ofBlock<T>(folder: string, size: number, n: number): Promise<T> {
  const block = (await json(`data/${folder}/${Math.floor(n / size)}.json`)) as (T | null)[];
  const found = block[n % size];
  if (!found) throw new Failure((await readSite()).missing.left_out ?? `There is no number ${n} in data/${folder}.`);
  return found;
}

export const readLatent = (site: Site, n: number) => ofBlock<Latent>("latents", site.block.latents, n);
export const readImage = (site: Site, n: number) => ofBlock<ImageRecord>("images", site.block.images, n);

const pictures = remember(
  async (block: number): Promise<(string | null)[]> => {
    const buffer = await (await get(`data/pictures/${block}.bin`)).arrayBuffer();
    const view = new DataView(buffer);
    const n = view.getUint32(0, true);
    let start = 4 + 4 * n;
    return Array.from({ length: n }, (_, i) => {
      const length = view.getUint32(4 + 4 * i, true);
      const picture = length ? URL.createObjectURL(new Blob([new Uint8Array(buffer, start, length)])) : null;
      start += length;
      return picture;
    });
  },
  (urls) => setTimeout(() => urls.forEach((url) => url && URL.revokeObjectURL(url)), 60_000),
);

/** The address of an image's picture; null where there is none. */
export async function readPicture(site: Site, image: number): Promise<string | null> {
  if (!site.has.pictures) return null;
  const size = site.block.pictures;
  return (await pictures(Math.floor(image / size)))[image % size] ?? null;
}

// ---------------------------------------------------------------------------------------------------------------------
// Names and notes. A server keeps them beside the concepts; a folder cannot, so the browser does.

const OWN = "own";
let names: Promise<Names> | undefined;

export function readNames(site: Site): Promise<Names> {
  names ??= get("data/names.json")
    .then((response) => response.json() as Promise<Names>)
    .then((known) => (site.has.notes ? known : withOwn(site, known)));
  return names;
}

type Own = Record<string, { name: string; note: string }>;

export function readOwn(site: Site): Own {
  try {
    return JSON.parse(localStorage.getItem(`${OWN} ${site.concepts_id}`) ?? "{}") as Own;
  } catch {
    return {}; // no storage in this browser, or somebody else's text
  }
}

function withOwn(site: Site, known: Names): Names {
  const latents = { ...known.latents };
  for (const [latent, { name, note }] of Object.entries(readOwn(site)))
    latents[latent] = { ...latents[latent], note, ...(name ? { name, own: true, origin: "by hand, in this browser" } : {}) };
  return { ...known, latents };
}

/** Keep a name and a note. Returns all names, and whether somebody else had changed this latent, which is then kept. */
export async function saveNote(site: Site, latent: number, name: string, note: string): Promise<{ names: Names; clash: boolean }> {
  const known = await readNames(site);
  if (!site.has.notes) {
    const own: Own = { ...readOwn(site), [latent]: { name, note } };
    if (!name && !note) delete own[latent];
    try {
      localStorage.setItem(`${OWN} ${site.concepts_id}`, JSON.stringify(own));
    } catch {
      throw new Failure("This browser keeps nothing for this page. Copy the text before you leave.");
    }
    names = undefined;
    return { names: await readNames(site), clash: false };
  }
  const response = await fetch(`api/notes/${latent}`, send({ name, note, version: known.version }, "PUT"));
  if (!response.ok && response.status !== 409) throw new Failure(await explain(response, "The note"));
  const body = (await response.json()) as { names: Names };
  names = Promise.resolve(body.names);
  return { names: body.names, clash: response.status === 409 };
}

// ---------------------------------------------------------------------------------------------------------------------
// What only a server answers

function send(body: unknown, method = "POST"): RequestInit {
  return { method, headers: { "content-type": "application/json" }, body: JSON.stringify(body) };
}

async function ask<T>(url: string, how?: RequestInit): Promise<T> {
  let response: Response;
  try {
    response = await fetch(url, how);
  } catch {
    throw new Failure("The server does not answer. Is it still running?");
  }
  if (!response.ok) throw new Failure(await explain(response, url));
  return (await response.json()) as T;
}

export const searchText = (text: string) => ask<{ latents: [number, number][] }>(`api/search?q=${encodeURIComponent(text)}`);
export const upload = (file: Blob) => ask<Upload>("api/upload", { method: "POST", body: file });
export const edit = (request: EditRequest) => ask<Edit>("api/edit", send(request));
export const wholePicture = (image: number) => `api/picture/${image}`;
