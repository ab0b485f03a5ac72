// The page of one latent.
import { useEffect, useState } from "preact/hooks";
import { ClassBars, Histogram, PositionMap } from "./charts";
import { readLatent, readNames, readOwn, saveNote } from "./data";
import { percent, show } from "./format";
import { useKeys } from "./keys";
import { Show, useLoaded } from "./loading";
import { Controls, readLook, toggleHeat } from "./look";
import { Missing } from "./missing";
import { listed } from "./order";
import { go, link, type Route } from "./route";
import { Crop, Shots } from "./shots";
import type { Latent, Names, Site } from "./types";

export function LatentPage({ site, route }: { site: Site; route: Route }) {
  const latent = Number(route.rest);
  const isThere = Number.isInteger(latent) && latent >= 0 && latent < site.n_latents;
  const record = useLoaded(() => (isThere ? readLatent(site, latent) : Promise.reject(new Error(`There is no latent ${route.rest}; they are numbered 0 to ${site.n_latents - 1}.`))), [latent]);
  const loadedNames = useLoaded(() => readNames(site), []);
  const [names, setNames] = useState<Names | null>(null);
  const known = names ?? (loadedNames && "value" in loadedNames ? loadedNames.value : null);
  useEffect(() => {
    const name = known?.latents[latent]?.name;
    document.title = `Latent ${latent}${name ? `: ${name}` : ""} · ${site.title}`;
  }, [latent, known]);
  return (
    <Show of={record}>
      {(found) => <Portrait key={found.latent} site={site} record={found} names={known} onNames={setNames} route={route} />}
    </Show>
  );
}

function Portrait({ site, record, names, onNames, route }: { site: Site; record: Latent; names: Names | null; onNames: (names: Names) => void; route: Route }) {
  const { latent, numbers } = record;
  const look = readLook(route);
  const maximum = numbers.max_activation ?? 1;
  const own = names?.latents[latent];
  const nameOf = (n: number) => names?.latents[n]?.name ?? "";
  const step = (by: number) => {
    const { order, place } = listed(site, latent);
    const next = order[place + by];
    if (next !== undefined) go(`latent/${next}`, Object.fromEntries(route.query));
  };
  useKeys({
    n: () => step(1), ArrowRight: () => step(1), p: () => step(-1), ArrowLeft: () => step(-1),
    h: () => toggleHeat(look),
  });
  return (
    <article class="latent-page">
      <header class="head">
        <h1>Latent {latent}{own?.name && <> <bdi class="name">{own.name}</bdi></>}</h1>
        {own?.origin && <span class="tag">{own.origin}</span>}
        <span class="spring" />
        <span class="buttons">
          <button type="button" onClick={() => step(-1)} title="Previous in the list (p)">‹ previous</button>
          <button type="button" onClick={() => step(1)} title="Next in the list (n)">next ›</button>
          <button type="button" class="narrow" onClick={() => document.querySelector("aside")?.scrollIntoView()}>numbers and note ↓</button>
        </span>
      </header>
      <Numbers record={record} />
      <div class="columns">
        <div class="wide">
          <Controls look={look} />
          {record.note && <p class="soft">{record.note}</p>}
          {record.groups.map(({ title, shots }) => (
            <section key={title}><h2>{title}</h2><Shots {...{ site, shots, latent, maximum, look }} images={record.images} /></section>
          ))}
          {!record.groups.length && <p class="soft">{site.missing.images ?? "It fires on no image."}</p>}
          {record.patches.length > 0 && (
            <section><h2>Strongest patches</h2>
              <ul class="crops">{record.patches.map((patch) => <Crop key={patch.image} site={site} latent={latent} {...patch} />)}</ul>
            </section>
          )}
          {record.counter && record.counter.length > 0 && (
            <section><h2>Counter-examples</h2>
              <p class="soft">Images of its top class on which it is silent, and the strongest ones of other classes.</p>
              {record.counter.map(({ kind, shots }) => <section key={kind}><h3>{kind}</h3><Shots {...{ site, shots, latent, maximum, look }} images={record.images} /></section>)}
            </section>
          )}
        </div>
        <aside>
          <NoteEditor site={site} latent={latent} names={names} onNames={onNames} />
          {record.histogram && <section><h2>How strongly it fires</h2><Histogram histogram={record.histogram} />
            <p class="soft">Tokens by activation; both axes are logarithmic. {Object.entries(record.quantiles).map(([title, value]) => `${percentile(title)} ${show(value)}`).join(" · ")}</p></section>}
          {record.position && record.position.some(Boolean) && <section><h2>Where it fires</h2><PositionMap site={site} counts={record.position} /></section>}
          {record.classes.length > 0 && <section><h2>Classes</h2><ClassBars {...record} /></section>}
          {record.kinds && <Kinds kinds={record.kinds} />}
          {record.nearest.length > 0 && (
            <Others title="Nearest directions" rows={record.nearest.map(([n, cosine]) => ({ n, text: `cosine ${show(cosine)}` }))} nameOf={nameOf} />
          )}
          {record.cofiring && (
            <Others title="Fires together with" nameOf={nameOf}
              rows={record.cofiring.map((each) => ({ n: each.latent, text: `on ${percent(each.share)} of its tokens, Jaccard ${show(each.jaccard)}` }))} />
          )}
          {record.twins && (
            <section><h2>In other runs</h2><ul class="plain">{record.twins.map(({ run, latent: n, cosine }) => (
              <li key={run}>{run}: latent {n}, cosine {show(cosine)}</li>))}</ul></section>
          )}
          <Missing site={site} parts={["codes", "histogram", "position", "nearest", "cofiring", "counter"]} />
        </aside>
      </div>
    </article>
  );
}

const TITLES: [string, string, (value: number | null | undefined) => string][] = [
  ["image_frequency", "of images", percent],
  ["density", "of tokens", percent],
  ["mean_activation", "mean where it fires", show],
  ["max_activation", "maximum", show],
  ["label_entropy", "label entropy, top images", show],
  ["label_entropy_all", "label entropy, all images", show],
  ["monosemanticity", "monosemanticity", show],
  ["coherence", "spatial coherence", show],
  ["stability", "stability over seeds", show],
];

function Numbers({ record }: { record: Latent }) {
  const shown = TITLES.filter(([name]) => record.numbers[name] !== null && record.numbers[name] !== undefined);
  return (
    <dl class="numbers">
      {shown.map(([name, title, write]) => <div key={name}><dd>{write(record.numbers[name])}</dd><dt>{title}</dt></div>)}
    </dl>
  );
}

/** "90 %" as "90th percentile"; other titles as they are. */
const percentile = (title: string) => title.replace(/^(\d+) %$/, "$1th percentile");

function Kinds({ kinds }: { kinds: NonNullable<Latent["kinds"]> }) {
  return (
    <section><h2>CLS and patches</h2>
      <table><thead><tr><th /><th scope="col">CLS</th><th scope="col">patches</th></tr></thead>
        <tbody>
          <tr><th scope="row">fires on</th><td>{percent(kinds.cls.density)}</td><td>{percent(kinds.patch.density)}</td></tr>
          <tr><th scope="row">mean</th><td>{show(kinds.cls.mean)}</td><td>{show(kinds.patch.mean)}</td></tr>
          <tr><th scope="row">maximum</th><td>{show(kinds.cls.max)}</td><td>{show(kinds.patch.max)}</td></tr>
        </tbody></table>
    </section>
  );
}

function Others({ title, rows, nameOf }: { title: string; rows: { n: number; text: string }[]; nameOf: (n: number) => string }) {
  return (
    <section><h2>{title}</h2>
      <ul class="plain">{rows.map(({ n, text }) => (
        <li key={n}><a href={link(`latent/${n}`)}>{n}{nameOf(n) && ` ${nameOf(n)}`}</a> <span class="soft">{text}</span></li>))}</ul>
    </section>
  );
}

/** A person's own name and note. A server keeps them with the concepts; otherwise this browser does. */
function NoteEditor({ site, latent, names, onNames }: { site: Site; latent: number; names: Names | null; onNames: (names: Names) => void }) {
  const known = names?.latents[latent];
  const [name, setName] = useState<string | null>(null);
  const [note, setNote] = useState<string | null>(null);
  const [said, say] = useState("");
  const shownName = name ?? (known?.own ? known.name ?? "" : "");
  const shownNote = note ?? known?.note ?? "";
  const changed = name !== null || note !== null;
  const save = async (event: Event) => {
    event.preventDefault();
    try {
      const { names: all, clash } = await saveNote(site, latent, line(shownName), line(shownNote));
      onNames(all);
      if (clash) return say("Somebody else has changed this latent in the meantime. Theirs is kept and shown above; save again to replace it.");
      setName(null);
      setNote(null);
      say(site.has.notes ? "Saved." : "Saved in this browser.");
    } catch (error) {
      say(error instanceof Error ? error.message : String(error));
    }
  };
  return (
    <section class="note">
      <h2>Your name and note</h2>
      <form onSubmit={save}>
        <label>Name <input value={shownName} maxLength={200} placeholder={known?.own ? "" : known?.name ?? ""} onInput={(event) => setName(event.currentTarget.value)} /></label>
        <label>Note <textarea rows={3} maxLength={4000} value={shownNote} onInput={(event) => setNote(event.currentTarget.value)} /></label>
        <button type="submit" disabled={!changed}>Save</button>
        {!site.has.notes && <button type="button" onClick={() => download(site)} title="A JSON file of your names and notes, by latent">Export</button>}
        <span class="soft" role="status">{said}</span>
      </form>
    </section>
  );
}

function download(site: Site): void {
  const file = new Blob([JSON.stringify(readOwn(site), null, 1)], { type: "application/json" });
  const anchor = document.createElement("a");
  anchor.href = URL.createObjectURL(file);
  anchor.download = "own.json";
  anchor.click();
  setTimeout(() => URL.revokeObjectURL(anchor.href), 1000);
}

/** A name or a note is one line. */
const line = (text: string) => text.replace(/\s+/g, " ").trim();
