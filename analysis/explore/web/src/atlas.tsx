// All latents at once: a plot, and a list of those that are looked for.
import { useEffect, useMemo, useState } from "preact/hooks";
import { classColor, SCALE, scaleOf, UNKNOWN } from "./colors";
import { readAtlas, readNames, searchText, type Atlas } from "./data";
import { count, percent, show } from "./format";
import { Show, useLoaded } from "./loading";
import { Missing } from "./missing";
import { keepOrder } from "./order";
import { amend, go, link, type Route } from "./route";
import { Scatter, type Axis, type View } from "./scatter";
import type { Names, Site } from "./types";

const PAGE = 50;

export function AtlasPage({ site, route }: { site: Site; route: Route }) {
  const loaded = useLoaded(async () => {
    const [atlas, names] = await Promise.all([readAtlas(site), readNames(site)]);
    return { atlas, names };
  }, [site]);
  useEffect(() => {
    document.title = site.title;
  }, []);
  return <Show of={loaded}>{({ atlas, names }) => <AtlasOf {...{ site, route, atlas, names }} />}</Show>;
}

function AtlasOf({ site, route, atlas, names }: { site: Site; route: Route; atlas: Atlas; names: Names }) {
  const { query } = route;
  const plottable = site.columns.filter(({ name }) => !["top_class", "map_x", "map_y"].includes(name));
  const has = (name: string | null) => (name !== null && plottable.some((column) => column.name === name) ? name : null);
  const map = query.get("view") === "map" && site.has.map === true;
  const xName = has(query.get("x")) ?? has("density") ?? plottable[0]?.name ?? "";
  const yName = has(query.get("y")) ?? has("max_activation") ?? plottable[1]?.name ?? "";
  const color = query.get("color") ?? (site.classes.length > 1 ? "class" : (has("label_entropy") ?? ""));
  const wanted = query.get("q") ?? "";
  const sort = query.get("sort") ?? "";
  const page = Number(query.get("page") ?? 0) || 0;
  const [marked, mark] = useState<number | null>(null);

  const axis = (name: string): Axis => {
    const column = site.columns.find((each) => each.name === name);
    return { title: column?.title ?? name, log: column?.log ?? false, values: atlas[name] ?? new Float32Array(site.n_latents) };
  };
  const [x, y] = useMemo(
    () => (map ? [axis("map_x"), axis("map_y")] : [axis(xName), axis(yName)]),
    [map, xName, yName, atlas],
  ) as [Axis, Axis];

  const texts = useLoaded(() => (site.has.text && wanted.length > 2 ? searchText(wanted).then(({ latents }) => latents) : Promise.resolve([])), [wanted]);
  const byText = texts && "value" in texts ? texts.value : [];
  const matches = useMemo(() => find(site, atlas, names, wanted), [wanted, names, atlas]);
  const order = useMemo(() => rank(site, atlas, matches, sort), [matches, sort, atlas]);
  useEffect(() => keepOrder(order), [order]);
  const shown = useMemo(() => {
    const mask = new Uint8Array(site.n_latents);
    for (const latent of matches) mask[latent] = 1;
    for (const [latent] of byText) mask[latent] = 1;
    return mask;
  }, [matches, byText]);

  const classes = atlas.top_class;
  const scale = useMemo(() => {
    const values = atlas[color];
    return values ? scaleOf(values, site.columns.find(({ name }) => name === color)?.log ?? false) : null;
  }, [color, atlas]);
  const colorOf = (latent: number) => {
    if (scale) return scale.colorOf(latent);
    if (color === "name") return names.latents[latent]?.name ? classColor(hash(names.latents[latent].name)) : UNKNOWN;
    const index = classes?.[latent] ?? -1;
    return color === "class" && index >= 0 ? classColor(index) : UNKNOWN;
  };
  const nameOf = (latent: number) => names.latents[latent]?.name ?? "";
  const className = (latent: number) => site.classes[classes?.[latent] ?? -1] ?? "";
  const describe = (latent: number) =>
    [`Latent ${latent}`, names.latents[latent]?.name, className(latent), `on ${percent(atlas.density?.[latent])} of tokens, maximum ${show(atlas.max_activation?.[latent])}`]
      .filter(Boolean).join(" · ");
  const pages = Math.ceil(order.length / PAGE);
  const rows = order.slice(page * PAGE, (page + 1) * PAGE);
  const view = readView(query.get("zoom"));
  const columns = plottable.filter(({ name }) => ["density", "max_activation", "label_entropy", "monosemanticity"].includes(name));
  const absent = new Set(site.absent.map((each) => each.name));
  const choose = (name: string, value: string, title: string, options: [string, string][], gone: string[] = []) => (
    <label>{title} <select value={value} onChange={(event) => amend({ [name]: event.currentTarget.value, zoom: null, page: null })}>
      {options.map(([key, text]) => <option key={key} value={key}>{text}</option>)}
      {gone.map((text) => <option key={text} disabled>{text} (not there)</option>)}
    </select></label>
  );
  const titles = plottable.map(({ name, title }): [string, string] => [name, title]);
  return (
    <div class="atlas">
      <h1 class="unseen">Atlas of all latents</h1>
      <section class="plot" aria-label="Plot of all latents">
        <div class="controls">
          {site.has.map && choose("view", map ? "map" : "plot", "show", [["plot", "two numbers"], ["map", "map of directions"]])}
          {!map && choose("x", xName, "across", titles)}
          {!map && choose("y", yName, "up", titles)}
          {choose("color", color, "color", [...(absent.has("top_class") ? [] : [["class", "top class"]]), ...(absent.has("name") ? [] : [["name", "name"]]), ...titles, ["none", "none"]] as [string, string][],
            site.absent.map(({ title }) => title))}
          {site.absent.length > 0 && (
            <details class="soft"><summary>{count(site.absent.length, "color")} not there</summary>
              <ul class="plain">{site.absent.map(({ name, title, why }) => <li key={name}>{title}: {why}</li>)}</ul></details>
          )}
        </div>
        <Scatter {...{ x, y, colorOf, nameOf, shown, marked, describe, view }} plain={map} onMark={mark}
          onPick={(latent) => go(`latent/${latent}`)} onView={(next) => amend({ zoom: next && writeView(next) }, true)} />
        <Legend {...{ site, scale, color }} title={titles.find(([name]) => name === color)?.[1] ?? ""} />
        <Missing site={site} parts={["map", "left_out"]} />
      </section>
      <section class="list" aria-label="List of latents">
        <p class="soft" role="status">{wanted ? `${count(order.length, "latent")} for “${wanted}”` : `${count(order.length, "latent")} that fire, of ${show(site.n_latents)}`}</p>
        {byText.length > 0 && (
          <p><span class="soft">By the model's text encoder: </span>{byText.slice(0, 12).map(([latent, score]) => (
            <a key={latent} class="tag" href={link(`latent/${latent}`)} title={`similarity ${show(score)}`}>{latent} {names.latents[latent]?.name}</a>))}</p>
        )}
        <div class="scroll"><table>
          <thead><tr>
            <Head name="latent" title="latent" sort={sort} />
            <th scope="col">name</th>
            {site.classes.length > 0 && <th scope="col">top class</th>}
            {columns.map(({ name, title }) => <Head key={name} name={name} title={title} sort={sort} number />)}
          </tr></thead>
          <tbody>{rows.map((latent) => (
            <tr key={latent} class={latent === marked ? "marked" : ""} onMouseEnter={() => mark(latent)} onMouseLeave={() => mark(null)}>
              <td><a href={link(`latent/${latent}`)}>{latent}</a></td>
              <td><bdi>{names.latents[latent]?.name}</bdi></td>
              {site.classes.length > 0 && <td>{className(latent)}</td>}
              {columns.map(({ name }) => <td key={name} class="number">{["density"].includes(name) ? percent(atlas[name]?.[latent]) : show(atlas[name]?.[latent])}</td>)}
            </tr>))}</tbody>
        </table></div>
        {!order.length && wanted && <p class="soft">No number begins with it, and no name, note or class contains it.</p>}
        {pages > 1 && (
          <nav class="pages" aria-label="Pages of the list">
            <button type="button" disabled={page === 0} onClick={() => amend({ page: page - 1 || null })}>‹ previous</button>
            <span class="soft">{page + 1} of {show(pages)}</span>
            <button type="button" disabled={page + 1 >= pages} onClick={() => amend({ page: page + 1 })}>next ›</button>
          </nav>
        )}
      </section>
    </div>
  );
}

function Head({ name, title, sort, number }: { name: string; title: string; sort: string; number?: boolean }) {
  const state = sort === name ? "ascending" : sort === `-${name}` ? "descending" : "none";
  const next = state === "descending" ? name : `-${name}`;
  return (
    <th scope="col" aria-sort={state} class={number ? "number" : ""}>
      <button type="button" title="Sort by it" onClick={() => amend({ sort: next, page: null })}>{title}{"\u00a0"}<span aria-hidden="true">{{ ascending: "▲", descending: "▼", none: "↕" }[state]}</span></button>
    </th>
  );
}

function Legend({ site, scale, color, title }: { site: Site; scale: ReturnType<typeof scaleOf> | null; color: string; title: string }) {
  if (scale)
    return (
      <p class="legend soft"><span>{title}:</span><span>{show(scale.low)}</span>
        <span class="ramp" aria-hidden="true">{SCALE.filter((_, i) => i % 4 === 0).map((each) => <i key={each} style={{ background: each }} />)}</span>
        <span>{show(scale.high)}</span></p>
    );
  if (color === "name") return <p class="legend soft">Equal names have equal colors; latents without a name are gray.</p>;
  if (color !== "class" || !site.classes.length) return null;
  const most = 24;
  return (
    <p class="legend soft">{site.classes.slice(0, most).map((name, i) => (
      <a key={name} href={link("atlas", { q: name })}><i style={{ background: classColor(i) }} aria-hidden="true" />{name}</a>))}
      {site.classes.length > most && <span>and {site.classes.length - most} more</span>}</p>
  );
}

/** A number for a text, so that equal names have equal colors. */
function hash(text: string): number {
  let value = 0;
  for (let i = 0; i < text.length; i++) value = (31 * value + text.charCodeAt(i)) >>> 0;
  return value % 997;
}

/** Latents that a search finds: by the start of their number, or by a part of their name, note or class. */
function find(site: Site, atlas: Atlas, names: Names, wanted: string): number[] {
  const text = wanted.trim().toLowerCase();
  const density = atlas.density;
  const found: number[] = [];
  for (let latent = 0; latent < site.n_latents; latent++) {
    if (!text) {
      if (!density || (density[latent] ?? 0) > 0) found.push(latent);
      continue;
    }
    const known = names.latents[latent];
    const words = `${known?.name ?? ""}\n${known?.note ?? ""}\n${site.classes[atlas.top_class?.[latent] ?? -1] ?? ""}`.toLowerCase();
    if (String(latent).startsWith(text) || words.includes(text)) found.push(latent);
  }
  return found;
}

function rank(site: Site, atlas: Atlas, latents: number[], sort: string): number[] {
  const name = sort.replace(/^-/, "");
  const values = atlas[name];
  const sign = sort.startsWith("-") ? -1 : 1;
  if (name === "latent") return sign > 0 ? latents : [...latents].reverse();
  if (!values || !site.columns.some((column) => column.name === name)) return latents;
  const known = latents.filter((latent) => !Number.isNaN(values[latent]));
  const unknown = latents.filter((latent) => Number.isNaN(values[latent])); // at the end in both directions
  known.sort((a, b) => sign * ((values[a] ?? 0) - (values[b] ?? 0)) || a - b);
  return [...known, ...unknown];
}

function readView(text: string | null): View | null {
  const [a, b, c, d] = (text ?? "").split(",").map(Number);
  if (a === undefined || b === undefined || c === undefined || d === undefined) return null;
  return b > a && d > c ? { x: [a, b], y: [c, d] } : null;
}

const writeView = ({ x, y }: View) => [...x, ...y].map((value) => value.toFixed(4)).join(",");
