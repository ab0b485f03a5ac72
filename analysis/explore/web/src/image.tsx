// The page of one image, or of two side by side.
import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { readImage, readImages, readNames, readPicture, upload, wholePicture } from "./data";
import { EditPanel } from "./edit";
import { count, percent, show } from "./format";
import { Picture } from "./heat";
import { useKeys } from "./keys";
import { Show, useLoaded } from "./loading";
import { Controls, readLook, toggleHeat, type Look } from "./look";
import { Missing } from "./missing";
import { PatchPicker } from "./patches";
import { amend, go, link, type Route } from "./route";
import { allTokens, heatOf, maximaOf, readPatches, sumTokens, type Fired } from "./tokens";
import type { ImageRecord, Names, Site, Upload } from "./types";

const N_LISTED = 12; // so that what follows the list can be seen without scrolling
const N_EACH = 20; // latents of each list, where two images are compared
const uploads = new Map<string, Upload>(); // of this visit; a server keeps them for as long

export function ImagePage({ site, route }: { site: Site; route: Route }) {
  const other = route.query.get("with");
  const loaded = useLoaded(
    async () => {
      const record = await readAny(site, route.rest);
      const second = other === null ? null : await readAny(site, other);
      return { record, other: second, names: await readNames(site), maxima: maximaOf(site, second ? [record, second] : [record]) };
    },
    [route.rest, other],
  );
  useEffect(() => {
    document.title = `${uploads.has(route.rest) ? "Your image" : `Image ${route.rest}`}${other === null ? "" : ` and ${other}`} · ${site.title}`;
  }, [route.rest, other]);
  return (
    <Show of={loaded}>
      {({ record, other: second, names, maxima }) =>
        second ? <Two key={`${route.rest} ${other}`} {...{ site, route, names, maxima }} records={[record, second]} />
          : <One key={route.rest} {...{ site, route, record, names, maxima }} />}
    </Show>
  );
}

async function readAny(site: Site, which: string): Promise<ImageRecord> {
  const kept = uploads.get(which);
  if (kept) return kept.record;
  if (!site.has.images) throw new Error(site.missing.images);
  const n = Number(which);
  if (which === "" || !Number.isInteger(n) || n < 0 || n >= site.n_images)
    throw new Error(which.startsWith("upload") ? "This uploaded image is no longer there. Upload it again." : `There is no image ${which}; they are numbered 0 to ${site.n_images - 1}.`);
  return readImage(site, n);
}

const nameOf = (which: string, record: ImageRecord) => (uploads.has(which) ? "your image" : record.uri.split("/").pop() || `image ${record.image}`);

function useSource(site: Site, which: string): string | null {
  const kept = uploads.get(which);
  const small = useLoaded(() => (kept ? Promise.resolve(kept.picture) : readPicture(site, Number(which))), [which]);
  if (kept) return kept.picture;
  if (site.live && site.has.pictures) return wholePicture(Number(which));
  return small && "value" in small ? small.value : null;
}

interface Common {
  site: Site;
  route: Route;
  names: Names;
  maxima: Float32Array;
}

function useLook({ route, maxima }: Common) {
  const latent = route.query.get("latent") === null ? null : Number(route.query.get("latent"));
  return { latent, look: readLook(route), maximum: latent === null ? 1 : maxima[latent] || 1 };
}

function One(props: Common & { record: ImageRecord }) {
  const { site, route, record, names, maxima } = props;
  const { latent, look } = useLook(props);
  const [pointed, point] = useState<number | null>(null);
  const [hovered, hover] = useState<number | null>(null);
  const source = useSource(site, route.rest);
  const chosen = readPatches(site, route.query.get("at"));
  const fired = useMemo(() => sumTokens(record, chosen.length ? chosen.map((patch) => patch + 1) : allTokens(record)), [record, chosen.join()]);
  const top = useMemo(() => (pointed === null ? null : sumTokens(record, [pointed + 1])[0]), [record, pointed]);
  const overlaid = hovered ?? latent;
  const heat = useMemo(() => (overlaid === null ? null : heatOf(record, overlaid)), [record, overlaid]);
  const step = (by: number) => {
    const next = Number(route.rest) + by;
    if (!uploads.has(route.rest) && next >= 0 && next < site.n_images) go(`image/${next}`, { latent });
  };
  useKeys({
    n: () => step(1), ArrowRight: () => step(1), p: () => step(-1), ArrowLeft: () => step(-1),
    h: () => toggleHeat(look), Escape: () => amend({ at: null, latent: null }),
  });
  const [columns] = [site.grid[1]];
  const where = chosen.length === 0 ? "the whole image" : chosen.length === 1 ? `row ${Math.floor((chosen[0] ?? 0) / columns)}, column ${(chosen[0] ?? 0) % columns}` : `${chosen.length} patches`;
  return (
    <article class="image-page">
      <header class="head">
        <h1>{nameOf(route.rest, record)}</h1>
        {record.label && <a class="tag" href={link("images", { q: record.label })}>{record.label}</a>}
        <span class="spring" />
        <span class="buttons">
          <button type="button" onClick={() => step(-1)} title="Previous image (p)">‹ previous</button>
          <button type="button" onClick={() => step(1)} title="Next image (n)">next ›</button>
        </span>
      </header>
      <div class="columns even image">
        <div>
          <PatchPicker {...{ site, source, chosen }} alt={record.uri || "image"} threshold={look.threshold}
            heat={look.overlay ? heat : null} maximum={overlaid === null ? 1 : maxima[overlaid] || 1}
            onChoose={(patches) => amend({ at: patches.join() || null })} onPoint={point} />
          <p class="hover soft">{pointed === null ? "Click a patch, or drag over several." :
            `row ${Math.floor(pointed / columns)}, column ${pointed % columns}${top ? `: most of latent ${top.latent} ${names.latents[top.latent]?.name ?? ""}` : ""}`}</p>
          <Controls look={look} />
          {latent !== null && <p>Heat map of <a href={link(`latent/${latent}`)}>latent {latent} {names.latents[latent]?.name}</a>
            {heat?.cls != null && <> <span class="tag">CLS {show(heat.cls)}</span></>}
            {heat && !heat.at.length && heat.cls === null && <span class="soft"> It does not fire on this image.</span>}</p>}
        </div>
        <div class="fires">
          <h2>Latents on {where}</h2>
          {!record.readable && <p class="error">This image could not be read when its activations were made.</p>}
          <Fires {...{ fired, names, latent, hover }} />
          <Missing site={site} parts={["codes", "pictures", "edit", "upload"]} />
          {site.has.edit && <EditPanel {...{ site, route, names, record, fired, chosen }} upload={uploads.has(route.rest) ? route.rest : null} />}
        </div>
        <div class="more">
          <Facts {...{ site, record }} />
          <Compare {...{ site, route }} />
        </div>
      </div>
    </article>
  );
}

function Fires({ fired, names, latent, hover }: { fired: Fired[]; names: Names; latent: number | null; hover: (latent: number | null) => void }) {
  const [more, setMore] = useState(false);
  const largest = fired[0]?.share ?? 1;
  if (!fired.length) return <p class="soft">No latent fires there.</p>;
  return (
    <>
      <table class="bars-table">
        <thead><tr><th scope="col">latent</th><th scope="col" /><th scope="col" title="of the sum of all latents' activations there">share</th><th scope="col" title="its largest activation there">peak</th><th scope="col" title="CLS and patches on which it fires there">tokens</th></tr></thead>
        <tbody>
          {(more ? fired : fired.slice(0, N_LISTED)).map((each) => (
            <tr key={each.latent} class={each.latent === latent ? "marked" : ""} onMouseEnter={() => hover(each.latent)} onMouseLeave={() => hover(null)}>
              <td><Pick {...{ names, hover }} latent={each.latent} chosen={latent} /></td>
              <td class="bar"><i style={{ width: `${(100 * each.share) / largest}%` }} /></td>
              <td class="number">{percent(each.share)}</td>
              <td class="number">{show(each.peak)}</td>
              <td class="number">{each.n_tokens}</td>
            </tr>
          ))}
        </tbody>
      </table>
      {fired.length > N_LISTED && <button type="button" onClick={() => setMore(!more)}>{more ? "fewer" : `all ${count(fired.length, "latent")}`}</button>}
    </>
  );
}

/** A latent in a list: a click shows its heat map, the arrow opens its page. */
function Pick({ latent, chosen, names, hover }: { latent: number; chosen: number | null; names: Names; hover: (latent: number | null) => void }) {
  const pressed = latent === chosen;
  return (
    <span class="pick">
      <button type="button" class="plain-button" aria-pressed={pressed} title={pressed ? "Hide its heat map" : "Show its heat map"}
        onFocus={() => hover(latent)} onBlur={() => hover(null)} onClick={() => amend({ latent: pressed ? null : latent })}>{latent} {names.latents[latent]?.name}</button>
      <a href={link(`latent/${latent}`)} aria-label={`Open latent ${latent}`} title="Open the latent">↗</a>
    </span>
  );
}

function Facts({ site, record }: { site: Site; record: ImageRecord }) {
  const facts = Object.entries(record.columns).filter(([, value]) => value !== null && value !== "");
  return (
    <dl class="facts">
      {record.uri && <div><dt>image</dt><dd>{record.uri}</dd></div>}
      {facts.map(([name, value]) => <div key={name}><dt>{name}</dt><dd>{String(value)}</dd></div>)}
      {site.tokens !== "all" && <div><dt>tokens</dt><dd>only {site.tokens} tokens have codes</dd></div>}
    </dl>
  );
}

function Compare({ site, route }: { site: Site; route: Route }) {
  const field = useRef<HTMLInputElement>(null);
  const [said, say] = useState("");
  const take = async (file: File | undefined) => {
    if (!file) return;
    say(`Encoding ${file.name}.`);
    try {
      const kept = await upload(file);
      const which = `upload-${kept.upload}`;
      uploads.set(which, kept);
      go(`image/${which}`, { latent: route.query.get("latent") });
    } catch (error) {
      say(error instanceof Error ? error.message : String(error));
    }
  };
  const compare = async (event: Event) => {
    event.preventDefault();
    const text = field.current?.value.trim() ?? "";
    if (!text) return;
    const found = /^\d+$/.test(text) ? Number(text) : (await readImages()).uri.findIndex((uri) => uri.includes(text));
    if (found < 0 || found >= site.n_images) say(`There is no image ${text}.`);
    else amend({ with: found, at: null });
  };
  return (
    <div class="controls">
      <form onSubmit={(event) => void compare(event)}><label>Compare with <input ref={field} placeholder="number or path" /></label> <button type="submit">Compare</button></form>
      {site.has.upload && <label class="file">Your own image <input type="file" accept="image/*" onChange={(event) => void take(event.currentTarget.files?.[0])} /></label>}
      <span class="soft" role="status">{said}</span>
    </div>
  );
}

// ---------------------------------------------------------------------------------------------------------------------
// Two images

function Two(props: Common & { records: [ImageRecord, ImageRecord] }) {
  const { site, route, records, names, maxima } = props;
  const { latent, look } = useLook(props);
  const [hovered, hover] = useState<number | null>(null);
  const whichs = [route.rest, route.query.get("with") ?? ""] as const;
  const fired = useMemo(() => records.map((record) => sumTokens(record, allTokens(record))), [records]) as [Fired[], Fired[]];
  const split = useMemo(() => compareFired(...fired), [fired]);
  const overlaid = hovered ?? latent;
  return (
    <article class="image-page two">
      <header class="head"><h1>{nameOf(whichs[0], records[0])} and {nameOf(whichs[1], records[1])}</h1><span class="spring" />
        <button type="button" onClick={() => amend({ with: null })}>Only the first</button></header>
      <div class="columns even">
        {records.map((record, i) => <Side key={i} {...{ site, record, overlaid, look, maxima }} which={whichs[i] ?? ""} />)}
      </div>
      <Controls look={look} />
      <div class="columns thirds">
        {split.map(({ title, rows }) => (
          <section key={title}><h2>{title} <span class="soft">{count(rows.length, "latent")}</span></h2>
            <ul class="plain">{rows.slice(0, N_EACH).map(({ latent: each, shares }) => (
              <li key={each} class={each === latent ? "marked" : ""} onMouseEnter={() => hover(each)} onMouseLeave={() => hover(null)}>
                <Pick {...{ names, hover }} latent={each} chosen={latent} />
                <span class="soft">{shares.map((share) => percent(share)).join(" and ")}</span></li>))}</ul>
          </section>
        ))}
      </div>
    </article>
  );
}

function Side({ site, which, record, overlaid, look, maxima }: { site: Site; which: string; record: ImageRecord; overlaid: number | null; look: Look; maxima: Float32Array }) {
  const source = useSource(site, which);
  const heat = useMemo(() => (overlaid === null ? null : heatOf(record, overlaid)), [record, overlaid]);
  return (
    <figure>
      <PatchPicker {...{ site, source }} alt={nameOf(which, record)} heat={look.overlay ? heat : null} maximum={overlaid === null ? 1 : maxima[overlaid] || 1}
        threshold={look.threshold} chosen={[]} onPoint={() => undefined}
        onChoose={(patches) => go(`image/${which}`, { at: patches.join() })} />
      <figcaption class="soft"><a href={link(`image/${which}`)}>{record.uri || nameOf(which, record)}</a> {record.label}</figcaption>
    </figure>
  );
}

function compareFired(first: Fired[], second: Fired[]): { title: string; rows: { latent: number; shares: number[] }[] }[] {
  const of = (fired: Fired[]) => new Map(fired.map((each) => [each.latent, each.share]));
  const [a, b] = [of(first), of(second)];
  const shared = first.filter(({ latent }) => b.has(latent)).map(({ latent, share }) => ({ latent, shares: [share, b.get(latent) ?? 0] }));
  shared.sort((x, y) => Math.min(...y.shares) - Math.min(...x.shares));
  const only = (fired: Fired[], others: Map<number, number>) => fired.filter(({ latent }) => !others.has(latent)).map(({ latent, share }) => ({ latent, shares: [share] }));
  return [{ title: "Only on the first", rows: only(first, b) }, { title: "On both", rows: shared }, { title: "Only on the second", rows: only(second, a) }];
}

// ---------------------------------------------------------------------------------------------------------------------
// All images

const PAGE = 60;

export function ImagesPage({ site, route }: { site: Site; route: Route }) {
  const loaded = useLoaded(readImages, []);
  const wanted = (route.query.get("q") ?? "").toLowerCase();
  const page = Number(route.query.get("page") ?? 0) || 0;
  useEffect(() => {
    document.title = `Images · ${site.title}`;
  }, []);
  return (
    <Show of={loaded}>
      {({ uri, label }) => {
        const found = uri.flatMap((name, i) => (!wanted || name.toLowerCase().includes(wanted) || label[i]?.toLowerCase().includes(wanted) || String(i) === wanted ? [i] : []));
        const pages = Math.ceil(found.length / PAGE);
        return (
          <article>
            <header class="head"><h1>Images</h1><span class="soft" role="status">{count(found.length, "image")}</span></header>
            <div class="controls"><label>Path or class <input type="search" value={route.query.get("q") ?? ""} onInput={(event) => amend({ q: event.currentTarget.value, page: null }, true)} /></label></div>
            <ul class="shots">{found.slice(page * PAGE, (page + 1) * PAGE).map((image) => (
              <li key={image}><a href={link(`image/${image}`)} title={uri[image] || `image ${image}`}>
                <Thumb site={site} image={image} alt={label[image] || uri[image] || `image ${image}`} />
                <span class="label">{label[image] || uri[image] || `image ${image}`}</span>
                {label[image] && <span class="soft">{uri[image]?.split("/").pop() || image}</span>}</a></li>))}</ul>
            {!found.length && <p class="soft">No path or class contains “{wanted}”.</p>}
            {pages > 1 && <nav class="pages" aria-label="Pages of images">
              <button type="button" disabled={page === 0} onClick={() => amend({ page: page - 1 || null })}>‹ previous</button>
              <span class="soft">{page + 1} of {pages}</span>
              <button type="button" disabled={page + 1 >= pages} onClick={() => amend({ page: page + 1 })}>next ›</button></nav>}
            <Missing site={site} parts={["left_out", "pictures"]} />
          </article>
        );
      }}
    </Show>
  );
}

function Thumb({ site, image, alt }: { site: Site; image: number; alt: string }) {
  return <Picture site={site} image={image} alt={alt} heat={null} maximum={1} threshold={0} />;
}
