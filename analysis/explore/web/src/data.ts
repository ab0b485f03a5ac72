// Reads data/ and keeps what was read: the same files, whether a server answers or a folder does.
import type { Comparison, Edit, EditRequest, Found, ImageRecord, Images, Latent, Names, Site, Upload } from "./types";

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
function remember<K, V>(load: (key: K) => Promise<V>, n = N_KEPT): (key: K) => Promise<V> {
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
    if (known.size > n) known.delete(known.keys().next().value as K);
    return asked;
  };
}

const json = remember(async (url: string) => (await get(url)).json() as Promise<unknown>);

export const readSite = () => json("data/site.json") as Promise<Site>;

/** What the server says now: it makes some parts, as the map, after it has started. */
export const readSiteAgain = async () => (await (await get("data/site.json")).json()) as Site;

/** Load the atlas again when it is next asked for, because it has grown. */
export function forgetAtlas(): void {
  atlas = undefined;
}

export const readImages = () => json("data/images.json") as Promise<Images>;
export const readComparison = () => json("data/comparison.json") as Promise<Comparison>;

/** The columns of the atlas, by name: [n_latents] each. */
export type Atlas = Record<string, Float32Array>;

let atlas: Promise<Atlas> | undefined;
let columns: Promise<ArrayBuffer> | undefined;

const readColumns = () => get("data/atlas.bin").then((response) => response.arrayBuffer());

/** Ask for what the atlas needs before the page knows more than its address. */
export function startAtlas(): void {
  columns = readColumns();
  askedNames = askNames();
  columns.catch(() => undefined); // who waits for it says what is wrong
  askedNames.catch(() => undefined);
}

export function readAtlas(site: Site): Promise<Atlas> {
  if (atlas) return atlas;
  const asked = columns ?? readColumns();
  columns = undefined;
  atlas = asked.then(async (buffer) => {
    const fits = (known: Site) => buffer.byteLength === 4 * known.columns.length * known.n_latents;
    const known = fits(site) ? site : await readSiteAgain(); // a column was made in between
    return Object.fromEntries(
      known.columns.map(({ name }, i) => [name, new Float32Array(buffer, 4 * i * known.n_latents, known.n_latents)]),
    );
  });
  return atlas;
}

async function ofBlock<T>(folder: string, size: number, n: number): Promise<T> {
  const block = (await json(`data/${folder}/${Math.floor(n / size)}.json`)) as (T | null)[];
  const found = block[n % size];
  if (!found) throw new Failure((await readSite()).missing.left_out ?? `There is no number ${n} in data/${folder}.`);
  return found;
}

export async function readLatent(site: Site, n: number): Promise<Latent> {
  const record = await ofBlock<Latent>("latents", site.block.latents, n);
  for (const { shots } of record.groups.slice(0, 2)) // the first ones on the screen, while the page is being drawn
    for (const { image } of shots) readPicture(site, image).catch(() => undefined);
  return record;
}

export const readImage = (site: Site, n: number) => ofBlock<ImageRecord>("images", site.block.images, n);

/** The pictures of a pack, as addresses that an <img> takes; null where there is none. */
function unpack(buffer: ArrayBuffer): (string | null)[] {
  const view = new DataView(buffer);
  const n = view.getUint32(0, true);
  let start = 4 + 4 * n;
  return Array.from({ length: n }, (_, i) => {
    const length = view.getUint32(4 + 4 * i, true);
    const bytes = new Uint8Array(buffer, start, length);
    start += length;
    return length ? `data:image/jpeg;base64,${btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""))}` : null;
  });
}

const readPack = async (name: string) => unpack(await (await get(`data/pictures/${name}.bin`)).arrayBuffer());

const blocks = remember((block: number) => readPack(String(block)));

const N_ASKED = 24; // pictures in a request: the first ones are shown while the next are made
let asked: { image: number; give: (pack: Promise<(string | null)[]>, place: number) => void }[] = [];

/** A server packs what is asked for together, so that 60 pictures are no 60 requests. */
const single = remember((image: number) => new Promise<string | null>((resolve, reject) => {
  if (!asked.length) setTimeout(askTogether);
  asked.push({ image, give: (pack, place) => pack.then((found) => resolve(found[place] ?? null), reject) });
}), 2000);

function askTogether(): void {
  for (let first = 0; first < asked.length; first += N_ASKED) {
    const part = asked.slice(first, first + N_ASKED);
    const pack = readPack(part.map(({ image }) => image).join());
    part.forEach(({ give }, place) => give(pack, place));
  }
  asked = [];
}

/** The address of an image's picture; null where there is none. */
export async function readPicture(site: Site, image: number): Promise<string | null> {
  if (!site.has.pictures) return null;
  if (site.live) return single(image);
  const size = site.block.pictures;
  return (await blocks(Math.floor(image / size)))[image % size] ?? null;
}

// ---------------------------------------------------------------------------------------------------------------------
// Names and notes. A server keeps them beside the concepts; a folder cannot, so the browser does.

const OWN = "own";
let names: Promise<Names> | undefined;

let askedNames: Promise<Names> | undefined;

const askNames = () => get("data/names.json").then((response) => response.json() as Promise<Names>);

export function readNames(site: Site): Promise<Names> {
  if (!names) {
    names = (askedNames ?? askNames()).then((known) => (site.has.notes ? known : withOwn(site, known)));
    askedNames = undefined;
  }
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

export const searchText = (text: string) => ask<Found>(`api/search?q=${encodeURIComponent(text)}`);
export const upload = (file: Blob) => ask<Upload>("api/upload", { method: "POST", body: file });
export const edit = (request: EditRequest) => ask<Edit>("api/edit", send(request));
export const wholePicture = (image: number) => `api/picture/${image}`;
