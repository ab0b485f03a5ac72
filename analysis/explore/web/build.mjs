// Builds the page: src/main.tsx and src/style.css become ../page/app.js and ../page/style.css, beside index.html.
import { copyFileSync, mkdirSync } from "node:fs";
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
else await esbuild.build(options);
