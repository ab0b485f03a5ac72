// What a page cannot show, and why.
import type { Site } from "./types";

/** The reasons for some parts, each once; nothing if all of them are there. */
export function Missing({ site, parts }: { site: Site; parts: string[] }) {
  const reasons = [...new Set(parts.flatMap((part) => site.missing[part] ?? []))];
  if (!reasons.length) return null;
  return (
    <section class="soft missing"><h2>Not shown</h2>
      <ul class="plain">{reasons.map((reason) => <li key={reason}>{reason}</li>)}</ul>
    </section>
  );
}
