"""What a verb ends with: its result, the files it wrote, and the command that usually comes next."""

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from actcache.artifacts import MANIFEST_FILE, Artifact, open_artifact
from actcache.errors import PipelineError
from analysis.terminal.screen import STARTED, emit, options, show_line, show_note, show_warning
from analysis.terminal.tables import draw_facts, draw_table


def emit_result(result: Any, out: str | Path | None, *command: object) -> None:
    """Print a result of `analysis.results`: its lines, or else its tables.

    Args:
        out: the file that holds it, if there is one. command: what to run to get one, without the file.
    """
    lines: list[Any] = result.lines()
    if not lines:
        for rows in result.tables():
            lines += [*([""] if lines else []), *(draw_table(rows) if rows else [])]
    lines = [*lines, *result.notes()]
    emit({**result.to_json(), "out": None if out is None else str(out)}, lines)
    show_written(out)
    if out is None:
        show_next(*command, "result.json", why="to keep the result for `report --result`")
    else:
        show_next("report", "CONCEPTS", "report.html", "--result", out)


def emit_answer(
    codes: Any,
    table: Any,
    out: Path | None,
    *,
    n_shown: int | None = None,
    names: Mapping[int, str] = MappingProxyType({}),
    asked: Sequence[int] = (),
    is_written: bool = False,
    notes: Sequence[str] = (),
    **more: Any,
) -> None:
    """Print an answer, a pyarrow table or rows, and what it cost to read it; write it where there is a path.

    Args:
        n_shown: how many rows the screen shows; JSON and files hold all.
        names: the names of latents, which get a column of their own.
        asked: the latents that the question named; those that have a name are shown above the answer.
        is_written: the function that measured it has written the file.
        notes: lines that are shown below the answer.
    """
    import pyarrow as pa

    from analysis.naming import add_names
    from analysis.query import write_answer

    table = pa.Table.from_pylist(list(map(dict, table))) if isinstance(table, list) else table
    table = add_names(table, codes, names)
    rows = table.to_pylist()
    facts = {"rows": rows, "bytes_read": codes.bytes_read, **more}  # bytes of codes.zarr
    facts["out"] = None if out is None else str(out)
    if out is not None and not is_written:
        write_answer(table, out)
    called = {latent: names[latent] for latent in asked if latent in names}
    if asked:
        facts["names"] = called
    head: list[Any] = [f"latent {latent}: {name}" for latent, name in called.items()]
    hidden = {"row", "column"} if rows and "at" in rows[0] else set()  # `at` says both, and CLS
    shown = [{key: value for key, value in row.items() if key not in hidden} for row in rows[:n_shown]]
    emit(facts, [*head, *draw_table(shown), *notes])


def draw_look(seen: Any) -> list[Any]:
    """What `look` shows of an `analysis.Look`: a table for each image, and what is guessed."""
    lines: list[Any] = [f"{seen.sae} reads {seen.hook_point} of {seen.model}", *seen.notes]
    for view in seen:
        rows = seen.table(view).drop_columns(["row", "column"]).to_pylist()
        lines += ["", f"{view.image}: {view.grid[0]} x {view.grid[1]} patches", *draw_table(rows)]
    return lines


def draw_conversion(conversion: Any) -> list[Any]:
    """What `convert` shows of a `saetrain.Conversion`: the agreement in three digits, and what is not in the files."""
    facts = conversion.to_json()
    shown = {"path": facts["path"], "format": facts["format"]}
    if conversion.input:
        shown["input mean and scale"] = conversion.input
    for name, value in facts["parity"].items():
        shown[name] = f"{value:.3g}" if isinstance(value, float) else value
    return [*draw_facts(shown), *conversion.notes]


def show_written(*paths: str | Path | None) -> None:
    """Name the files that a verb wrote, and those that an earlier run of the same command wrote."""
    for path in paths:
        if path is not None:
            show_note(f"{'Was there already:' if _is_old(path) else 'Wrote'} {path}")


def _is_old(path: str | Path) -> bool:
    """Whether a file, or the seal of an artifact, is older than this process."""
    seal = Path(path) / MANIFEST_FILE
    try:
        return (seal if seal.is_file() else Path(path)).stat().st_mtime < STARTED
    except OSError:  # a URL
        return False


def show_next(*words: object, why: str = "") -> None:
    """Show the command that usually comes next. A word in capitals stands for what only the user knows."""
    show_note(f"Next: patchsae {shlex.join(map(str, words))}" + (f"  ({why})" if why else ""))


def show_next_of(path: str | Path) -> None:
    """Show what usually follows an artifact, from its own JSON file."""
    try:
        words = next_command(path, open_artifact(path))
    except PipelineError:
        return
    if words:
        show_next(*words)


def next_command(path: str | Path, artifact: Artifact) -> Sequence[str]:
    """The verb and arguments that usually follow a complete artifact; none for one that is not complete."""
    if not artifact.complete:
        return ()
    stem = Path(str(path).rstrip("/")).with_suffix("")
    match artifact.kind:
        case "acts":
            return ("train", str(path), str(stem.parent / "runs" / stem.name) if "://" not in str(path) else "runs/l",
                    *_hook_flags(artifact.settings.get("hook_points", ())))  # fmt: skip
        case "run":
            stores = [_near(artifact.parent_path(name)) for name in artifact.parents if name.startswith("store")]
            stores = stores or ["STORE"]
            return "encode", str(path), *stores, f"{Path(stores[0].rstrip('/')).with_suffix('')}.codes"
        case "codes":
            return "analyze", str(path), f"{stem}.concepts"
        case "concepts":
            return "report", str(path), f"{stem}.html"
    return ()


def _hook_flags(hook_points: Sequence[str]) -> Sequence[str]:
    """What `train` needs where a store holds several hook points: the last of them."""
    if len(hook_points) < 2:
        return ()
    _, layer, site = str(hook_points[-1]).split(".")
    same = [each for each in hook_points if str(each).split(".")[1] == layer]
    return "--layer", layer, *(("--site", site.removeprefix("hook_")) if len(same) > 1 else ())


def _near(path: Path) -> str:
    """A path as one would type it here."""
    if "://" in str(path):
        return str(path)
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("../../..") else relative


def show_source(plan: Any) -> None:
    """Say on stderr which classes a source of images has and what is left out of it, before the work starts.

    plan: what has `classes` and `left_out`: an ImagePlan or an ExtractionEstimate.
    """
    if options.quiet:
        return
    from actcache.prompts import describe_shared_texts

    names = plan.classes
    if names:
        show_line(f"{len(names):,} classes: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}")
    if plan.left_out:
        show_line("left out: " + ", ".join(f"{n:,} {kind}" for kind, n in plan.left_out.items()))
    if shared := describe_shared_texts(names):
        show_warning(shared)


# ---------------------------------------------------------------------------------------------------------------------
# Facts about artifacts, for --json


def describe_store(path: str, store: Any) -> dict[str, Any]:
    """An activation store, and which images were skipped."""
    return {
        "store": str(path), "store_id": store.store_id, "complete": True, "n_images": store.n_images,
        "n_tokens": store.n_read_tokens("all"), "d_model": store.layout.d_model,
        "hook_points": list(map(str, store.hook_points)),
        "n_skipped": len(store.failed), "skipped": _skipped(store.images, store.failed),
    }  # fmt: skip


def describe_import(path: str, store: Any) -> dict[str, Any]:
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


def describe_run(run: Any) -> dict[str, Any]:
    return {
        "run": str(run.path), "run_id": run.run_id, "hook_point": str(run.hook_point),
        "variant": run.sae_config.variant, "n_latents": run.sae_config.n_latents, "fvu": run.fvu,
        "quality": run.quality,
    }  # fmt: skip


def describe_codes(codes: Any) -> dict[str, Any]:
    """Codes, and which images have none because they could not be read."""
    return {
        "codes": str(codes.path), "codes_id": codes.codes_id, "n_images": codes.n_images, "n_tokens": codes.n_tokens,
        "n_latents": codes.n_latents, "n_entries": codes.n_entries, "n_underflowed": codes.summary["n_underflowed"],
        "n_skipped": len(codes.summary["failed"]), "skipped": _skipped(codes.images, codes.summary["failed"]),
    }  # fmt: skip


def _skipped(images: Any, failed: Mapping[Any, str]) -> list[dict[str, Any]]:
    return [
        {"image": int(image), "uri": images["uri"][int(image)].as_py(), "reason": reason}
        for image, reason in failed.items()
    ]


def draw_description(facts: Mapping[str, Any]) -> list[Any]:
    """What `info` shows of the facts of `describe`."""
    shown = dict(facts)
    if "shards" in shown:
        shown["shards"] = "{done:,} of {total:,}".format(**shown["shards"])
    parents = shown.pop("parents", {})
    place = list(shown).index("bytes") + 1
    lines = list(shown.items())
    made = [(f"made from {name}", "{id} ({path}, {state})".format(**parent)) for name, parent in parents.items()]
    return draw_facts(dict([*lines[:place], *made, *lines[place:]]))


def show_next_question(codes: Path, question: Any, table: Any) -> None:
    """After an answer: the images of its first latent, or what else fires with the latent that was asked about."""
    if question.subject == "latent":
        if question.show != "co-firing":
            show_next("query", codes, "--latent", question.latent, "--show", "co-firing")
    elif table.num_rows and "latent" in table.column_names:
        show_next("query", codes, "--latent", table["latent"][0].as_py())
    elif table.num_rows and "image" in table.column_names:
        show_next("query", codes, "--image", table["image"][0].as_py())
