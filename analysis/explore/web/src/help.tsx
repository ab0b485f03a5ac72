// The keys, and what is being looked at. The browser's own dialog: Escape closes it, and the focus returns to where it was.
import { useEffect, useRef } from "preact/hooks";
import { show } from "./format";
import { KEYS } from "./keys";
import type { Site } from "./types";

export function Help({ site, open, onClose }: { site: Site; open: boolean; onClose: () => void }) {
  const dialog = useRef<HTMLDialogElement>(null);
  useEffect(() => {
    if (open) dialog.current?.showModal();
    else dialog.current?.close();
  }, [open]);
  return (
    <dialog ref={dialog} class="help" aria-label="Keys" onClose={onClose} onClick={(event) => {
      if (event.target === dialog.current) onClose(); // beside it
    }}>
      <div>
        <header class="head"><h2>Keys</h2><span class="spring" /><button type="button" onClick={onClose}>Close</button></header>
        <dl>{KEYS.map(([keys, what]) => <div key={what}><dt>{keys.map((key) => <kbd key={key}>{key}</kbd>)}</dt><dd>{what}</dd></div>)}</dl>
        <h2>What is shown</h2>
        <p>{site.variant ? `A ${site.variant} SAE` : "An SAE"} with {show(site.n_latents)} latents, of which {show(site.n_alive)} fire, at {site.hook_point} of {site.model ?? "its model"}.</p>
        <p>{show(site.n_images)} images, {show(site.n_tokens)} tokens. Concepts {site.concepts_id}.</p>
      </div>
    </dialog>
  );
}
