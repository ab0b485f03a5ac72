// What adaptation changed: latents by their change, with images of the base and of the adapted model side by side.
import { useEffect } from "preact/hooks";
import { readComparison, readNames } from "./data";
import { count, show } from "./format";
import { useKeys } from "./keys";
import { Show, useLoaded } from "./loading";
import { Controls, readLook, toggleHeat, type Look } from "./look";
import { link, type Route } from "./route";
import { Shots } from "./shots";
import type { Compared, Comparison, Names, ShotNames, Site } from "./types";

export function AdaptationPage({ site, route }: { site: Site; route: Route }) {
  const loaded = useLoaded(async () => ({ comparison: await readComparison(), names: await readNames(site) }), []);
  const look = readLook(route);
  useKeys({ h: () => toggleHeat(look) });
  useEffect(() => {
    document.title = `Adaptation · ${site.title}`;
  }, []);
  return <Show of={loaded}>{({ comparison, names }) => <Changes {...{ site, comparison, names, look }} />}</Show>;
}

function Changes({ site, comparison, names, look }: { site: Site; comparison: Comparison; names: Names; look: Look }) {
  const { conclusion, facts, missing, latents, images } = comparison;
  return (
    <article class="adaptation">
      <header class="head"><h1>Adaptation</h1></header>
      <p class="conclusion">{conclusion}</p>
      <dl class="facts wide">{facts.map(([title, text]) => <div key={title}><dt>{title}</dt><dd>{text}</dd></div>)}</dl>
      <h2>Latents that changed most</h2>
      <p class="soft">Of the latents that fire most in a class or in all images, with either model. First come those whose
        number of tokens changed most. Left are the images on which a latent fires most with the base model, right those
        with the adapted one; heat maps of a latent have one scale.</p>
      {missing.map((reason) => <p key={reason} class="error">{reason}</p>)}
      <Controls look={look} />
      {!latents.length && <p class="soft">There is none.</p>}
      {latents.map((each) => <Pair key={each.latent} {...{ site, each, images, look }} name={names.latents[each.latent]?.name ?? ""} />)}
    </article>
  );
}

function Pair({ site, each, images, look, name }: { site: Site; each: Compared; images: ShotNames; look: Look; name: string }) {
  const { latent, base, adapted } = each;
  const maximum = Math.max(1e-9, ...[...base, ...adapted].map(({ peak }) => peak));
  return (
    <section class="pair">
      <h3><a href={link(`latent/${latent}`)}>Latent {latent} {name}</a> <span class="soft">{each.kind}, for {each.class ? `class ${each.class}` : "all images"}</span></h3>
      <div class="columns even">
        {([["base", base, each.base_tokens], ["adapted", adapted, each.adapted_tokens]] as const).map(([model, shots, n]) => (
          <div key={model}><h4>{model} model: {count(n, "token")}{model === "adapted" && <Change {...each} />}</h4><Shots {...{ site, images, latent, maximum, look, shots }} /></div>
        ))}
      </div>
    </section>
  );
}

/** How the number of tokens changed, in words that need no formula. */
function Change({ base_tokens, adapted_tokens }: Compared) {
  if (!base_tokens || !adapted_tokens || base_tokens === adapted_tokens) return null;
  const times = adapted_tokens / base_tokens;
  return <span class={times > 1 ? "up" : "down"}> ({times > 1 ? `${show(times, 2)} times as many` : `${show(100 * (1 - times), 2)} % fewer`})</span>;
}
