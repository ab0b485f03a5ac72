"""What a verb ends with: its result, the files it wrote, and the command that usually comes next."""

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import typer

from actcache.artifacts import MANIFEST_FILE, Artifact, open_artifact
from actcache.errors import OthersUnfinishedError, PipelineError
from analysis.terminal.screen import STARTED, emit, options, show_line, show_note, show_warning
from analysis.terminal.tables import draw_table


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
    show_next_result(out, *command)


def show_next_result(out: str | Path | None, *command: object) -> None:
    """Show how a result enters a report or, without a file, how to get one. `command` as in `emit_result`."""
    if out is None:
        show_next(*command, "result.json", why="to keep the result for `report --result`")
    else:
        show_next("report", "CONCEPTS", "report.html", "--result", out)


def emit_artifact(path: str | Path, facts: Mapping[str, Any], lines: Sequence[Any]) -> None:
    """Print what a verb says of an artifact that it made, the images it skipped, and what usually comes next.

    Args:
        path: as the user wrote it. facts: for --json; `skipped` are the images that could not be read.
    """
    emit(facts, [*lines, *(f"  skipped: {image['reason']}" for image in facts.get("skipped", ()))])
    show_written(path)
    show_next_of(path)


@contextmanager
def as_one_of_several(kind: str, path: str | Path) -> Iterator[None]:
    """End the verb well, with a line, if this worker has done its part of an output and others have not.

    A launcher such as torchrun would take another exit code for a failure, and end the others.

    Args:
        kind: of the artifact, for --json. path: as the user wrote it.
    """
    try:
        yield
    except OthersUnfinishedError as unfinished:
        emit({kind: str(path), "complete": False, "message": str(unfinished)}, str(unfinished))
        raise typer.Exit from unfinished


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


def show_next_question(codes: Path, question: Any, table: Any) -> None:
    """After an answer: the images of its first latent, or what else fires with the latent that was asked about."""
    if question.subject == "latent":
        if question.show != "co-firing":
            show_next("query", codes, "--latent", question.latent, "--show", "co-firing")
    elif table.num_rows and "latent" in table.column_names:
        show_next("query", codes, "--latent", table["latent"][0].as_py())
    elif table.num_rows and "image" in table.column_names:
        show_next("query", codes, "--image", table["image"][0].as_py())


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


def show_source(plan: Any) -> dict[str, object]:
    """Say on stderr which classes a source of images has and what is left out of it, before the work starts.

    plan: what has `classes` and `left_out`: an ImagePlan or an ExtractionEstimate. Both are returned, for --json.
    """
    facts = {"classes": plan.classes, "left_out": dict(plan.left_out)}
    if options.quiet:
        return facts
    from actcache.prompts import describe_shared_texts

    names = plan.classes
    if names:
        show_line(f"{len(names):,} classes: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}")
    if plan.left_out:
        show_line("left out: " + ", ".join(f"{n:,} {kind}" for kind, n in plan.left_out.items()))
    if shared := describe_shared_texts(names):
        show_warning(shared)
    return facts
