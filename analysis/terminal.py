"""What a terminal shows: results on stdout, as text or as one JSON object, and progress on stderr."""

import json
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console, Group
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

from actcache.interrupts import interrupt

stdout, stderr = Console(), Console(stderr=True)


@dataclass
class Options:
    """The global flags of the command line."""

    quiet: bool = False
    json: bool = False
    traceback: bool = False


options = Options()


def emit(facts: Mapping[str, Any], text: str | Table | Group) -> None:
    """Print the result: one JSON object, or what people read."""
    if options.json:
        print(json.dumps(facts, default=str))
    elif isinstance(text, str):
        stdout.print(text, soft_wrap=True, highlight=False, markup=False)
    else:
        stdout.print(text)


def emit_result(result: Any) -> None:
    """Print a result of `analysis.results`: its lines, or else its tables."""
    lines = result.lines()
    tables = [draw_table(rows) for rows in result.tables() if rows]
    emit(result.to_json(), "\n".join(lines) if lines else Group(*tables))


def emit_answer(codes: Any, table: Any, out: Path | None, *, n_shown: int | None = None, **more: Any) -> None:
    """Print an answer, a pyarrow table or rows, and what it cost to read it; write it where there is a path."""
    from analysis.query import write_answer

    rows = table if isinstance(table, list) else table.to_pylist()
    facts = {"rows": rows, "bytes_read": codes.bytes_read, **more}  # bytes of codes.zarr
    if out is not None:
        is_written = out.suffix.lower() == ".json"  # a result, by the function that measured it
        facts["out"] = str(out if is_written else write_answer(table, out))
    emit(facts, draw_table(rows[:n_shown]))


def show_source(plan: Any) -> None:
    """Say on stderr which classes a source of images has and what is left out of it, before the work starts.

    plan: what has `classes` and `left_out`: an ImagePlan or an ExtractionEstimate.
    """
    if options.quiet:
        return
    from actcache.prompts import describe_shared_texts

    names = plan.classes
    lines = [f"{len(names):,} classes: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}"] if names else []
    if plan.left_out:
        lines.append("left out: " + ", ".join(f"{n:,} {kind}" for kind, n in plan.left_out.items()))
    if shared := describe_shared_texts(names):
        lines.append(f"warning: {shared}")
    for line in lines:
        stderr.print(line, soft_wrap=True, highlight=False, markup=False)


def draw_table(rows: Sequence[Mapping[str, Any]]) -> Table | str:
    if not rows:
        return "nothing found"
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name, value in rows[0].items():
        table.add_column(name, justify="left" if isinstance(value, str) else "right")
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else escape(str(value)) for value in row.values()))
    return table


def draw_facts(facts: Mapping[str, Any]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {entry}" for key, entry in value.items())
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        table.add_row(
            name, escape(f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value))
        )
    return table


def draw_estimate(estimate: Any) -> Table:
    free = "not known" if estimate.free_bytes is None else decimal(estimate.free_bytes)
    hours = estimate.seconds > 5400
    return draw_facts(
        {
            "images": estimate.n_images,
            "tokens": estimate.n_tokens,
            "hook points": list(estimate.settings.hook_points),
            "bytes": f"{decimal(estimate.n_bytes)} in {estimate.n_shards:,} shards, "
            f"{estimate.n_missing_shards:,} to be written",
            "free on that disk": free
            + ("" if estimate.fits else f": not enough for {decimal(estimate.missing_bytes)}"),
            "time": f"about {estimate.seconds / (3600 if hours else 60):.1f} {'h' if hours else 'min'}",
            "rate": f"{estimate.images_per_s:.1f} images/s, measured on one batch",
        }
    )


@contextmanager
def show_progress(name: str, unit: str) -> Iterator[Callable[..., None]]:
    """Show a bar with rate and time left on stderr, from the first call that says there is something to do."""
    columns = (
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=16, table_column=Column(min_width=6)),
        TextColumn("{task.fields[text]}", table_column=Column(no_wrap=True)),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True, table_column=Column(no_wrap=True)),
    )
    bar = Progress(*columns, console=stderr, disable=options.quiet)
    with interrupts() as interrupted:
        task = bar.add_task(name, total=None, text="", visible=False)

        def update(done: int, total: int, note: str = "") -> None:
            if interrupted():
                raise KeyboardInterrupt
            bar.start()
            speed = bar.tasks[0].speed or 0.0
            if unit == "bytes":
                text = f"{decimal(done)}/{decimal(total)}  {decimal(int(speed))}/s"
            else:
                text = f"{done:,}/{total:,} {unit}  " + (note or f"{speed:,.1f} {unit}/s")
            bar.update(task, completed=done, total=total, text=text, visible=True)

        try:
            yield update
        finally:
            if bar.live.is_started:  # without a terminal, stopping prints an empty line
                bar.stop()


def show_wait(what: str) -> None:
    """Say on stderr what is waited for, where progress is shown."""
    if not options.quiet:
        stderr.print(what, soft_wrap=True, highlight=False, markup=False)


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether SIGINT has come.

    Its exception is lost when it is raised in a destructor or in a callback of C code.
    """
    seen = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal seen
        seen = True
        interrupt(number, frame)

    before = signal.signal(signal.SIGINT, note) if threading.current_thread() is threading.main_thread() else None
    try:
        yield lambda: seen
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)


@contextmanager
def show_steps() -> Iterator[Callable[[str, int, int], None]]:
    """Show several bars below each other, one for each step."""
    with Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=stderr,
        disable=options.quiet,
    ) as bar:
        tasks: dict[str, Any] = {}

        def show(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = bar.add_task(step, total=total)
            bar.update(tasks[step], completed=done, total=total)

        yield show
