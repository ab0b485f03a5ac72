// What the classifier says when latents are kept, dropped or set, beside a random latent that fires as often.
import { useState } from "preact/hooks";
import { edit } from "./data";
import { percent, probability, show } from "./format";
import type { Route } from "./route";
import type { Fired } from "./tokens";
import type { Edit, ImageRecord, Names, Site } from "./types";

type Change = { latent: number; how: "drop" | "keep" | "set"; value: number };

interface Props {
  site: Site;
  route: Route;
  names: Names;
  record: ImageRecord;
  fired: Fired[];
  chosen: number[];
  upload: string | null;
}

export function EditPanel({ site, route, names, record, fired, chosen, upload }: Props) {
  const selected = Number(route.query.get("latent") ?? fired[0]?.latent ?? 0);
  const [changes, setChanges] = useState<Change[]>([]);
  const [answer, setAnswer] = useState<Edit | null>(null);
  const [said, say] = useState("");
  const [typed, setTyped] = useState<string | null>(null);
  const add = (event: Event) => {
    event.preventDefault();
    const latent = Number(typed ?? selected);
    if (!Number.isInteger(latent) || latent < 0 || latent >= site.n_latents) return say(`Latents are numbered 0 to ${site.n_latents - 1}.`);
    setChanges([...changes.filter((each) => each.latent !== latent), { latent, how: "drop", value: fired.find((each) => each.latent === latent)?.peak ?? 0 }]);
    setTyped(null);
    say("");
  };
  const change = (latent: number, part: Partial<Change>) => setChanges(changes.map((each) => (each.latent === latent ? { ...each, ...part } : each)));
  const apply = async () => {
    say("The model is running.");
    const of = (how: Change["how"]) => changes.filter((each) => each.how === how);
    const keep = of("keep").map(({ latent }) => latent);
    try {
      setAnswer(
        await edit({
          ...(upload ? { upload: upload.replace(/^upload-/, "") } : { image: record.image ?? 0 }),
          at: chosen.length ? chosen : null,
          set: Object.fromEntries(of("set").map(({ latent, value }) => [latent, value])),
          keep: keep.length ? keep : null,
          drop: of("drop").map(({ latent }) => latent),
        }),
      );
      say("");
    } catch (error) {
      say(error instanceof Error ? error.message : String(error));
    }
  };
  return (
    <section class={answer ? "edit" : "edit unused"}>
      <h2>What if?</h2>
      <p class="soft">Drop latents, keep only some, or set them to a value{chosen.length ? ", on the chosen patches" : ""}. The rest of the model then runs on the changed activations.</p>
      <form onSubmit={add}><label>Latent <input type="number" min="0" max={site.n_latents - 1} value={typed ?? selected} onInput={(event) => setTyped(event.currentTarget.value)} /></label> <button type="submit">Add</button></form>
      <ul class="plain">
        {changes.map(({ latent, how, value }) => (
          <li key={latent}>
            <select aria-label={`What happens to latent ${latent}`} value={how} onChange={(event) => change(latent, { how: event.currentTarget.value as Change["how"] })}>
              <option value="drop">drop</option><option value="keep">keep only</option><option value="set">set to</option>
            </select>{" "}
            {how === "set" && <input type="number" step="any" aria-label={`Value of latent ${latent}`} value={value} onInput={(event) => change(latent, { value: Number(event.currentTarget.value) })} />}
            {" "}{latent} {names.latents[latent]?.name}{" "}
            <button type="button" class="plain-button" aria-label={`Forget latent ${latent}`} onClick={() => setChanges(changes.filter((each) => each.latent !== latent))}>✕</button>
          </li>
        ))}
      </ul>
      <button type="button" disabled={!changes.length} onClick={() => void apply()}>Run the model</button> <span class="soft" role="status">{said}</span>
      {answer && <Answer answer={answer} />}
    </section>
  );
}

function Answer({ answer }: { answer: Edit }) {
  const { classes, random_latent, frequency, judge, seconds } = answer;
  return (
    <>
      <table class="answer">
        <thead><tr><th scope="col">class</th><th scope="col">before</th><th scope="col">after</th>{random_latent !== null && <th scope="col">random latent</th>}</tr></thead>
        <tbody>{classes.map(({ name, before, after, random }) => (
          <tr key={name}><td>{name}</td><td class="number">{probability(before)}</td>
            <td class={`number ${(after ?? 0) > (before ?? 0) ? "up" : (after ?? 0) < (before ?? 0) ? "down" : ""}`}>{probability(after)}</td>
            {random_latent !== null && <td class="number">{probability(random)}</td>}</tr>))}</tbody>
      </table>
      <p class="soft">Judge: {judge}. {random_latent !== null && <>The same with latent {random_latent} instead, drawn at random from those that fire about as often (on {percent(frequency[0])} and {percent(frequency[1])} of all tokens): what any latent would do. </>}{show(seconds)} s.</p>
    </>
  );
}
