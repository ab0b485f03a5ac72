// What adaptation changed: latents by their change, with images of the base and of the adapted model side by side.
import { useEffect } from "preact/hooks";
import { readComparison, readNames } from "./data";
import { show } from "./format";
import { Controls } from "./latent";
import { Show, useLoaded } from "./loading";
import { link, type Route } from "./route";
import { Shots } from "./shots";
import type { Site } from "./types";

const N_SHOWN = 60;

export function AdaptationPage({ site, route }: { site: Site; route: Route }) {
  const loaded = useLoaded(async () => ({ comparison: await readComparison(), names: await readNames(site) }), []);
  const look = { overlay: route.query.get("heat") !== "off", threshold: Number(route.query.get("level") ?? 0) || 0 };
  useEffect(() => {
    document.title = `Adaptation · ${site.title}`;
  }, []);
  return (
    <Show of={loaded}>
      {({ comparison, names }) => (
        <article>
          <header class="head"><h1>Adaptation</h1></header>
          <p class="conclusion">{comparison.conclusion}</p>
          <dl class="facts">{comparison.facts.map(([title, text]) => <div key={title}><dt>{title}</dt><dd>{text}</dd></div>)}</dl>
          <Controls look={look} />
          {comparison.latents.slice(0, N_SHOWN).map(({ latent, class: name, change, base, adapted }) => {
            const maximum = Math.max(1e-9, ...[...base, ...adapted].map(({ peak }) => peak));
            return (
              <section key={`${latent} ${name}`} class="pair">
                <h2><a href={link(`latent/${latent}`)}>Latent {latent} {names.latents[latent]?.name}</a>
                  <span class="soft"> {name}{change !== undefined && `, change ${show(change)}`}</span></h2>
                <div class="columns even">
                  <div><h3>base</h3><Shots {...{ site, latent, maximum, look }} shots={base} /></div>
                  <div><h3>adapted</h3><Shots {...{ site, latent, maximum, look }} shots={adapted} /></div>
                </div>
              </section>
            );
          })}
        </article>
      )}
    </Show>
  );
}
