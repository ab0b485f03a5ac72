"""What verbs say of artifacts and records: facts for --json, and lines for people."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from actcache.progress import show_bytes
from analysis.terminal.tables import draw_facts, draw_table

if TYPE_CHECKING:  # the command line starts without them
    from actcache import ActivationStore
    from analysis.concepts import ConceptTable
    from saetrain import CodeStore, Run


def describe_store(path: str, store: "ActivationStore") -> dict[str, object]:
    """An activation store, and which images were skipped."""
    return {
        "store": str(path), "store_id": store.store_id, "complete": True, "n_images": store.n_images,
        "n_tokens": store.n_read_tokens("all"), "d_model": store.layout.d_model,
        "hook_points": list(map(str, store.hook_points)),
        "n_skipped": len(store.failed), "skipped": _skipped(store.images, store.failed),
    }  # fmt: skip


def describe_import(path: str, store: "ActivationStore") -> dict[str, object]:
    """An imported store, and what its tokens were taken for."""
    from actcache.store import NO_IMAGES

    settings, guessed = store.settings, store.artifact.provenance.get("guessed")
    rows, columns = settings.layout.grid
    return {
        "store": str(path), "store_id": store.store_id, "model_id": store.model_id,
        "model": store.artifact.provenance.get("model"), "n_images": store.n_images,
        "n_tokens": store.n_read_tokens("all"), "d_model": settings.layout.d_model,
        "hook_points": list(map(str, store.hook_points)), "prefix": ",".join(settings.prefix) or "none",
        "grid": f"{rows}x{columns}", "guessed": guessed if isinstance(guessed, list) else [], "dtype": settings.dtype,
        "has_images": store.artifact.parent("images").path != NO_IMAGES,
    }  # fmt: skip


def describe_run(run: "Run") -> dict[str, object]:
    return {
        "run": str(run.path), "run_id": run.run_id, "hook_point": str(run.hook_point),
        "variant": run.sae_config.variant, "n_latents": run.sae_config.n_latents, "fvu": run.fvu,
        "quality": run.quality,
    }  # fmt: skip


def describe_concepts(path: Path, concepts: "ConceptTable") -> dict[str, object]:
    """A concept table, and what could not be computed of it."""
    return {
        "concepts": str(path), "concepts_id": concepts.artifact.id, **concepts.summary_numbers(),
        "left_out": concepts.left_out,
    }  # fmt: skip


def describe_codes(codes: "CodeStore") -> dict[str, object]:
    """Codes, and which images have none because they could not be read."""
    return {
        "codes": str(codes.path), "codes_id": codes.codes_id, "n_images": codes.n_images, "n_tokens": codes.n_tokens,
        "n_latents": codes.n_latents, "n_entries": codes.n_entries, "n_underflowed": codes.summary["n_underflowed"],
        "n_skipped": len(codes.summary["failed"]), "skipped": _skipped(codes.images, codes.summary["failed"]),
    }  # fmt: skip


def _skipped(images: Any, failed: Mapping[Any, str]) -> list[dict[str, object]]:
    return [
        {"image": int(image), "uri": images["uri"][int(image)].as_py(), "reason": reason}
        for image, reason in failed.items()
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Lines for people


def draw_description(facts: Mapping[str, Any]) -> list[str | Text]:
    """What `info` shows of the facts of `describe`."""
    shown = dict(facts)
    if "shards" in shown:
        shown["shards"] = "{done:,} of {total:,}".format(**shown["shards"])
    parents = shown.pop("parents", {})
    place = list(shown).index("bytes") + 1
    lines = list(shown.items())
    made = [(f"made from {name}", "{id} ({path}, {state})".format(**parent)) for name, parent in parents.items()]
    return draw_facts(dict([*lines[:place], *made, *lines[place:]]))


def draw_look(seen: Any) -> list[str | Text]:
    """What `look` shows of an `analysis.Look`: a table for each image, and what is guessed."""
    lines: list[str | Text] = [f"{seen.sae} reads {seen.hook_point} of {seen.model}", *seen.notes]
    for view in seen:
        rows = seen.table(view).drop_columns(["row", "column"]).to_pylist()
        lines += ["", f"{view.image}: {view.grid[0]} x {view.grid[1]} patches", *draw_table(rows)]
    return lines


def draw_conversion(conversion: Any) -> list[str | Text]:
    """What `convert` shows of a `saetrain.Conversion`: the agreement in three digits, and what is not in the files."""
    facts = conversion.to_json()
    shown = {"path": facts["path"], "format": facts["format"]}
    if conversion.input:
        shown["input mean and scale"] = conversion.input
    for name, value in facts["parity"].items():
        shown[name] = f"{value:.3g}" if isinstance(value, float) else value
    return [*draw_facts(shown), *conversion.notes]


def draw_estimate(estimate: Any) -> list[str | Text]:
    """What `extract --dry-run` shows of an `ExtractionEstimate`."""
    free = "not known" if estimate.free_bytes is None else show_bytes(estimate.free_bytes)
    hours = estimate.seconds > 5400
    return draw_facts(
        {
            "images": estimate.n_images,
            "tokens": estimate.n_tokens,
            "hook points": list(map(str, estimate.settings.hook_points)),
            "bytes": f"{show_bytes(estimate.n_bytes)} in {estimate.n_shards:,} shards, "
            f"{estimate.n_missing_shards:,} to be written",
            "free on that disk": free
            + ("" if estimate.fits else f": not enough for {show_bytes(estimate.missing_bytes)}"),
            "time": f"about {estimate.seconds / (3600 if hours else 60):.1f} {'h' if hours else 'min'}",
            "rate": f"{estimate.images_per_s:.1f} images/s, measured on one batch",
        }
    )


def draw_publication(publication: Any) -> list[str | Text]:
    """The files of a publication, what is left out, and how much is to be written."""
    rows = [{"file": file.path, "bytes": file.bytes, "state": file.state} for file in publication.files]
    lines = draw_table(rows)
    lines += [f"without {what}: {why}" for what, why in publication.left_out.items()]
    if publication.left_behind:
        lines.append(f"of an earlier publication, these files stay: {', '.join(publication.left_behind)}")
    n_files = sum(file.state != "unchanged" for file in publication.files)
    return [*lines, f"{n_files:,} new or changed files, {show_bytes(publication.n_bytes)}, for {publication.address}"]


def draw_site(site: Any, verb: str) -> str:
    """One line on a site. `verb`: Holds, or Will hold."""
    (latents, n_latents), (images, n_images) = site.n_latents, site.n_images
    return (
        f"{verb} {site.n_files:,} files, {site.n_bytes / 1e6:.1f} MB: {latents:,} of {n_latents:,} latents, "
        f"{images:,} of {n_images:,} images"
    )
