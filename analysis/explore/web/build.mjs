// Builds the page: src/main.tsx and src/style.css become ../page/app.js and ../page/style.css, beside index.html.
// ../page/SOURCE holds the sha256 of what they were built from, so that a test notices a page that is older than src.
import { createHash } from "node:crypto";
import { copyFileSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import * as esbuild from "esbuild";

const folder = new URL("../page/", import.meta.url).pathname;
mkdirSync(folder, { recursive: true });
copyFileSync(new URL("src/index.html", import.meta.url).pathname, `${folder}index.html`);
const options = {
  entryPoints: { app: "src/main.tsx", style: "src/style.css" },
  outdir: folder,
  bundle: true,
  minify: true,
  format: "esm",
  target: ["es2022", "chrome109", "firefox115", "safari16"],
  jsx: "automatic",
  jsxImportSource: "preact",
  legalComments: "inline", // the licenses of what is bundled stay in the file
  logLevel: "info",
};
if (process.argv.includes("--watch")) await (await esbuild.context(options)).watch();
else {
  await esbuild.build(options);
  const here = new URL(".", import.meta.url).pathname;
  const sources = ["build.mjs", "package-lock.json", ...readdirSync(`${here}src`).map((name) => `src/${name}`)].sort();
  const hash = createHash("sha256");
  for (const name of sources) hash.update(name).update("\0").update(readFileSync(here + name));
  writeFileSync(`${folder}SOURCE`, `${hash.digest("hex")}\n`);
}
