// What lies under data/ and what api/ answers. Python writes it, and names the same fields in analysis/explore/records.py;
// a test compares the two.

/** A column of atlas.bin: one number for each latent. */
export interface Column {
  name: string;
  title: string;
  log: boolean;
  /** A small value says that a latent is a good concept. */
  low_is_good?: boolean;
}

/** A color of the atlas that is not there, and what would give it. */
export interface Absent {
  name: string;
  title: string;
  why: string;
}

export interface Site {
  schema: number;
  live: boolean;
  title: string;
  concepts_id: string;
  codes_id: string;
  run_id: string | null;
  model: string;
  hook_point: string;
  tokens: string;
  variant: string;
  n_latents: number;
  n_alive: number;
  n_images: number;
  n_tokens: number;
  /** Rows and columns of patches. */
  grid: [number, number];
  /** Shares of a picture's height and width that lie under patches, from the upper left corner. */
  covered: [number, number];
  score: string;
  /** From which value on a latent is active. */
  tau: number;
  /** Titles of the quantiles that a table keeps. */
  quantiles: string[];
  /** How many latents, images and pictures one file holds. */
  block: { latents: number; images: number; pictures: number };
  columns: Column[];
  /** Colors that are not there, and what would give them. */
  absent: Absent[];
  /** What the server is making, so the page asks again. */
  making: string[];
  classes: string[];
  has: Partial<Record<"map" | "images" | "pictures" | "comparison" | "results" | "notes" | "edit" | "upload" | "text", boolean>>;
  /** Why a part is not there, by its name. */
  missing: Record<string, string>;
  versions: Record<string, string>;
  /** Digests of the files that results.html draws. */
  results: string[];
}

export interface Shot {
  image: number;
  score: number;
  peak: number;
  /** The value at CLS, 0 where it is silent; null where CLS was not encoded, or the codes are not there. */
  cls: number | null;
  /** Patches on which it fires, numbered row by row, and its values there. */
  at: number[];
  heat: number[];
}

export interface Kind {
  density: number | null;
  mean: number | null;
  max: number | null;
}

/** How many tokens have a value between two edges. */
export interface Strengths {
  edges: number[];
  counts: number[];
}

/** A class on which the latent is active. */
export interface ClassShare {
  name: string;
  n_tokens: number;
  share: number | null;
  n_images: number;
}

/** A latent that fires on the same tokens. */
export interface Partner {
  latent: number;
  jaccard: number | null;
  share: number | null;
  n_tokens: number;
}

/** Images of some ranks of the latent's scores. */
export interface Group {
  title: string;
  shots: Shot[];
}

export interface CounterExamples {
  kind: string;
  shots: Shot[];
}

/** A patch on which the latent is strong. */
export interface Patch {
  image: number;
  row: number;
  column: number;
  value: number | null;
}

/** The most similar latent of another run. */
export interface Twin {
  run: string;
  latent: number;
  cosine: number | null;
}

export interface Latent {
  latent: number;
  numbers: Record<string, number | null>;
  quantiles: Record<string, number | null>;
  kinds: { cls: Kind; patch: Kind } | null;
  histogram: Strengths | null;
  position: number[] | null;
  classes: ClassShare[];
  n_classes: number;
  nearest: [number, number | null][];
  cofiring: Partner[] | null;
  groups: Group[];
  counter: CounterExamples[] | null;
  patches: Patch[];
  twins: Twin[] | null;
  /** What was read of a latent that fires so often that not all of it was. */
  note: string;
  images: ShotNames;
}

/** The uri and the label of the images in a record, by number. */
export type ShotNames = Record<string, [string, string]>;

export interface ImageRecord {
  /** null for an upload. */
  image: number | null;
  uri: string;
  label: string;
  /** 1 if it could be read when its activations were made, otherwise 0. */
  readable: number;
  columns: Record<string, string | number | boolean | null>;
  n_tokens: number;
  /** The first token that has codes: 0 where CLS is encoded, otherwise 1. */
  tokens: number;
  /** Entries of token t: indptr[t] to indptr[t + 1]. Token 0 is CLS, and 1 + row * columns + column a patch. */
  indptr: number[];
  latent: number[];
  value: number[];
  /** The largest value of each of its latents in all images, in the order of their numbers. */
  maxima: number[];
}

export interface Name {
  name?: string;
  origin?: string;
  /** Whether a person wrote the name. */
  own?: boolean;
  note?: string;
}

export interface Names {
  latents: Record<string, Name>;
  version: string;
}

export interface Images {
  uri: string[];
  label: string[];
  readable: number[];
}

/** A latent in the top of a class, or of all images, where `class` is "". */
export interface Compared {
  latent: number;
  class: string;
  /** Which models' top it is in, in words. */
  kind: string;
  base_tokens: number;
  adapted_tokens: number;
  change: number | null;
  base: Shot[];
  adapted: Shot[];
}

export interface Comparison {
  conclusion: string;
  facts: [string, string][];
  /** Which table is not there, one sentence each. */
  missing: string[];
  latents: Compared[];
  images: ShotNames;
}

export interface Upload {
  upload: string;
  record: ImageRecord;
  picture: string;
}

/** The probability of a class before and after an edit, and after the same edit of random latents. */
export interface ClassChange {
  name: string;
  before: number | null;
  after: number | null;
  random: number | null;
}

export interface Edit {
  judge: string;
  classes: ClassChange[];
  random_latent: number | null;
  /** Each latent that is changed, and the one that was drawn in its place. */
  random: [number, number][] | null;
  /** Shares of all tokens on which the first changed latent fires, and the one that was drawn in its place. */
  frequency: [number | null, number | null];
  seconds: number;
}

/** Latents that fit a text, and their scores; best first. */
export interface Found {
  latents: [number, number | null][];
}

export interface EditRequest {
  image?: number;
  upload?: string;
  at: number[] | null;
  set: Record<number, number>;
  keep: number[] | null;
  drop: number[];
}
