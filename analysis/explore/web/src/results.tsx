// Results of other verbs, drawn as a report draws them: a page of its own in a frame that reaches nothing here.
import { useEffect } from "preact/hooks";
import { useTheme } from "./theme";
import type { Site } from "./types";

const ADDRESS = "data/results.html";

export function ResultsPage({ site }: { site: Site }) {
  const { dark } = useTheme();
  useEffect(() => {
    document.title = `Results · ${site.title}`;
  }, []);
  return (
    <article class="results">
      <h1 class="unseen">Results</h1>
      <iframe title="Results" src={`${ADDRESS}#theme=${dark ? "dark" : "light"}`} sandbox="allow-scripts allow-top-navigation-by-user-activation" />
      <p class="soft"><a href={ADDRESS} target="_blank" rel="noopener">Open the results as a page of their own</a> to print them.</p>
    </article>
  );
}
