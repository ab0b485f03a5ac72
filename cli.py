"""The command line: one short function for each verb. It parses, calls the library and shows the result.

Results go to stdout, progress goes to stderr. Exit codes: 0 done, 1 one of our errors (one line that says what to do),
2 wrong usage, 130 interrupted (the same command resumes). Importing this module loads neither torch nor zarr nor dask.

The flags of a verb come from the fields of its configuration classes (`with_flags`), so an option is written down once.
"""

import os
import signal
import threading

# Threads that wait for each other must not spin: beside two busy processes on two processors, 800 small products took
# 9.0 s and 13.0 s spinning and 0.8 s sleeping, and large ones take the same. OpenMP reads this when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if threading.current_thread() is threading.main_thread():  # Ctrl-C during the imports below is quiet
    _before = signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))

import inspect as signatures
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from rich.markup import escape
from typer import Argument, Option
from typer.core import TyperGroup

import actcache
import analysis
import saetrain
from actcache.errors import PipelineError, SettingsError
from actcache.extraction import ExtractConfig
from actcache.interrupts import interrupt, leave, on_interrupt
from actcache.prompts import PromptConfig
from actcache.workers import find_worker
from analysis.concepts import AnalyzeConfig
from analysis.config import (
    ComparisonConfig,
    DeletionConfig,
    MaskingConfig,
    ModelOptions,
    RulesConfig,
    SteerabilityConfig,
    StudyConfig,
)
from analysis.query import Question
from analysis.terminal import (
    draw_estimate,
    draw_facts,
    draw_table,
    emit,
    emit_answer,
    emit_result,
    options,
    show_progress,
    show_source,
    show_steps,
    show_wait,
    stderr,
    stdout,
)
from saetrain.config import SAEConfig, TrainConfig


class Verbs(TyperGroup):
    """Turns our errors into one line, says how to go on after an interrupt, and takes the global flags anywhere."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = args[: args.index("--")] if "--" in args else args
        first = [arg for arg in own if arg in ("--json", "--quiet", "-q", "--traceback")]
        return super().parse_args(ctx, [*first, *(arg for arg in own if arg not in first), *args[len(own) :]])

    def invoke(self, ctx: Any) -> Any:
        try:
            with on_interrupt(interrupt):
                return super().invoke(ctx)
        except PipelineError as error:
            if options.traceback:
                raise
            stderr.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            stderr.print("interrupted; the same command resumes")
            raise typer.Exit(130) from error


class Program(typer.Typer):
    """The whole program, which Ctrl-C ends quietly before a verb begins and after it has ended."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, leave)  # it stays: what follows this call is the end of the process
        return super().__call__(*args, **options)


app = Program(
    name="patchsae",
    cls=Verbs,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Turn a folder of images and a CLIP vision transformer into measured concepts: "
    "extract, train, encode, analyze, query, report.",
)


@app.callback()
def main(
    quiet: Annotated[bool, Option("--quiet", "-q", help="Show no progress bars.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object on stdout.")] = False,
    traceback: Annotated[bool, Option("--traceback", help="Show where an error came from.")] = False,
    version: Annotated[bool, Option("--version", help="Print the version and exit.")] = False,
) -> None:
    options.quiet, options.json, options.traceback = quiet, as_json, traceback
    if version:
        from importlib.metadata import version as installed

        stdout.print(f"patchsae {installed('patchsae')}")
        raise typer.Exit


# ---------------------------------------------------------------------------------------------------------------------
# Flags from configuration classes

PATH, LOOKING, MEASURING = "Pipeline", "Exploring", "Measuring"
ADAPTING, EXCHANGING, FILES = "Adapting", "Exchanging", "Files"


def verb(panel: str, example: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a verb of the command line, in a panel of the help and with an example."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        app.command(function.__name__, rich_help_panel=panel, epilog=f"Example: patchsae {example}")(
            with_flags(function)
        )
        return function

    return register


def with_flags(function: Callable[..., None]) -> Callable[..., None]:
    """Give a verb one flag for each field of its configuration parameters.

    A parameter of type `Config` is built from the flags. A parameter of type `list[Config]` receives every combination
    of the values of its sweep fields, which may then be given several times.
    """
    hints = get_type_hints(function, include_extras=True)
    parameters: list[signatures.Parameter] = []
    configs: dict[str, tuple[Any, bool]] = {}
    for name, parameter in signatures.signature(function).parameters.items():
        hint = hints[name]
        sweeps = get_origin(hint) is list and is_dataclass(get_args(hint)[0])
        config = get_args(hint)[0] if sweeps else hint
        if is_dataclass(config):
            configs[name] = (config, sweeps)
            parameters += [flag_of(field, get_type_hints(config)[field.name], sweeps) for field in options_of(config)]
        else:
            parameters.append(parameter.replace(annotation=hint, kind=signatures.Parameter.KEYWORD_ONLY))

    def run(**given: Any) -> None:
        for name, (config, sweeps) in configs.items():
            values = {field.name: given.pop(field.name) for field in options_of(config)}
            given[name] = combine(config, values) if sweeps else build(config, values)
        function(**given)

    paragraphs = (function.__doc__ or "").split("\n\n")
    run.__doc__ = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)  # the help wraps them itself
    run.__name__ = function.__name__
    run.__signature__ = signatures.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def options_of(config: Any) -> list[Field[Any]]:
    """The fields of a configuration that are flags: those declared by `actcache.options.option`."""
    return [field for field in fields(config) if "help" in field.metadata]


def flag_of(field: Field[Any], hint: Any, sweeps: bool) -> signatures.Parameter:
    """The flag of one field. A tuple of values is a flag that may be repeated, so its name is singular."""
    optional, kinds = NoneType in get_args(hint), leaf_types(hint)
    parser, default = field.metadata["parser"], ... if field.default is MISSING else field.default
    several = (get_origin(hint) in (tuple, Sequence) and parser is None) or (sweeps and field.metadata["sweep"])
    name = field.name.strip("_").replace("_", "-")
    kind: Any = str if parser or str in kinds else kinds[0]
    if several:
        kind = list[kind]
        if sweeps:
            kind, default = (kind | None, None) if default is None else (kind, [default])
        else:
            name = name.removesuffix("s")
            default = ... if default is ... else list(default)
    elif optional or (parser and not default):
        kind, default = kind | None, default or None
    names = f"--{name}/--no-{name}" if kinds == [bool] and optional else f"--{name}"
    option = Option(names, help=field.metadata["help"])
    return signatures.Parameter(
        field.name,
        signatures.Parameter.KEYWORD_ONLY,
        default=signatures.Parameter.empty if default is ... else default,
        annotation=Annotated[kind, option],
    )


def leaf_types(hint: Any) -> list[Any]:
    """The plain types of an annotation: int | None -> [int]; str | Sequence[str] -> [str, str]."""
    parts = [part for part in get_args(hint) if part is not NoneType and part is not ...]
    return [leaf for part in parts for leaf in leaf_types(part)] if parts else [hint]


def build(config: Any, values: Mapping[str, Any]) -> Any:
    """A configuration from the values of its flags. A question that makes no sense is a usage error."""
    parsers = {field.name: field.metadata["parser"] for field in options_of(config)}
    plain = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    texts = {name: parsers[name](value) for name, value in plain.items() if parsers[name] and isinstance(value, str)}
    given = {name: value for name, value in {**plain, **texts}.items() if value is not None or not parsers[name]}
    if config is not Question:
        return config(**given)
    try:
        return config(**given)
    except SettingsError as error:
        raise typer.BadParameter(str(error)) from error


def combine(config: Any, values: Mapping[str, Any]) -> list[Any]:
    """A configuration for every combination of the values of the sweep fields, the last field varying fastest."""
    names = [field.name for field in options_of(config) if field.metadata["sweep"]]
    lists = [values[name] or [None] for name in names]
    rest = {name: value for name, value in values.items() if name not in names}
    return [build(config, {**rest, **dict(zip(names, chosen, strict=True))}) for chosen in itertools.product(*lists)]


# ---------------------------------------------------------------------------------------------------------------------
# Arguments that several verbs take

ImagesPath = Annotated[
    Path,
    Argument(metavar="IMAGES", help="Folder, CSV or Parquet table of paths, tar files, or Hugging Face dataset."),
]
StorePath = Annotated[str, Argument(metavar="STORE", help="Activations, e.g. val.acts or s3://bucket/val.acts.")]
StorePaths = Annotated[list[str], Argument(metavar="STORE...", help="One or several activation stores of one model.")]
RunPath = Annotated[Path, Argument(metavar="RUN", help="A trained SAE, e.g. runs/l10.")]
CodesPath = Annotated[Path, Argument(metavar="CODES", help="Sparse codes, e.g. val.codes.")]
ConceptsPath = Annotated[Path, Argument(metavar="CONCEPTS", help="Concept statistics, e.g. val.concepts.")]
AnyPath = Annotated[str, Argument(metavar="PATH", help="Path of any artifact.")]
ResultPath = Annotated[Path | None, Argument(metavar="[OUT]", help="JSON file to write the result to.")]
ResultFile = Annotated[Path | None, Option(help="JSON file to write the result to; `report --result` reads it.")]
TablePath = Annotated[Path | None, Option(help="File to write the answer to: .csv or .parquet.")]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace an existing output.")]

Device = Annotated[str, Option(help="Device to run on: auto, cpu, cuda, cuda:1 ... Affects speed only.")]
BatchImages = Annotated[int, Option(help="Images per forward pass. Affects speed only.")]
Workers = Annotated[int | None, Option(help="Number of local dask worker processes. Affects speed only.")]
Scheduler = Annotated[str | None, Option(help="Address of a dask scheduler, e.g. tcp://10.0.0.1:8786.")]
CheckpointEvery = Annotated[int, Option(help="Steps between checkpoints.")]

MovedImages = Annotated[Path | None, Option(help="Where the images are, if they have moved.")]
MovedStore = Annotated[Path | None, Option(help="Where the activation store is, if it has moved.")]
MovedRun = Annotated[Path | None, Option(help="Where the run is, if it has moved.")]
Where = Annotated[str | None, Option(help="Filter over the columns of images.parquet: \"split == 'test'\".")]
Vocabulary = Annotated[Path | None, Option(help="File with one word or phrase per line; general words by default.")]


# ---------------------------------------------------------------------------------------------------------------------
# Verbs


@verb(PATH, "quickstart quickstart")
def quickstart(
    out: Annotated[Path, Argument(metavar="[OUT]", help="Folder to write everything to.")] = Path("quickstart"),
    n_images: Annotated[int, Option(help="Number of images to generate.")] = 2000,
    seed: Annotated[int, Option(help="Random seed for the images, their order and the training.")] = 0,
) -> None:
    """Run the whole pipeline on the built-in demo.

    The images are generated, the CLIP is tiny and the concepts are known. This takes less than three minutes.
    """
    with show_steps() as show:
        result = analysis.quickstart(out, n_images=n_images, seed=seed, on_step=show)
    emit(result.to_json(), "\n".join(result.lines()))


@verb(PATH, "extract photos val.acts --model ViT-B-16-quickgelu --pretrained openai --layer 10")
def extract(
    images: ImagesPath,
    store: StorePath,
    config: ExtractConfig,
    batch_size: BatchImages = 32,
    device: Device = "auto",
    n_threads: Annotated[int | None, Option(help="Number of decoding threads. Affects speed only.")] = None,
    on_error: Annotated[
        str, Option(help="What to do with an unreadable image: stop, or skip (its row stays).")
    ] = "stop",
    dry_run: Annotated[
        bool, Option("--dry-run", help="Only report what would be written and how long it would take.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Run the image tower and store its activations.

    The same command resumes after an interruption. Under torchrun or srun, every process works on its own shards.
    """
    if dry_run:
        estimate = actcache.estimate(images, store, config=config, batch_size=batch_size, device=device)
        show_source(estimate)
        emit({**asdict(estimate), "fits": estimate.fits}, draw_estimate(estimate))
        if not estimate.fits:
            raise typer.Exit(1)
        return
    plans: list[Any] = []

    def on_plan(plan: Any) -> None:
        plans.append(plan)
        show_source(plan)

    with show_progress("extract", "images") as on_progress:
        try:
            opened = actcache.extract(
                images, store, config=config, batch_size=batch_size, device=device, n_threads=n_threads,
                on_error=on_error, overwrite=overwrite, on_progress=on_progress, on_plan=on_plan,
            )  # fmt: skip
        except actcache.IncompleteError as unfinished:  # one of several workers has done its own part
            emit({"store": store, "complete": False, "message": str(unfinished)}, str(unfinished))
            return
    failed = [f"  skipped: {reason}" for reason in opened.failed.values()]
    source = {"classes": plans[0].classes, "left_out": dict(plans[0].left_out)}
    skipped = list(opened.failed.values())
    facts = {"store": store, "store_id": opened.store_id, "n_skipped": len(skipped), "skipped": skipped, **source}
    emit(facts, "\n".join([repr(opened), *failed]))


@verb(PATH, "train val.acts runs/l10 --layer 10 --n-latents 12288 --k 32")
def train(
    store: StorePaths,
    run: RunPath,
    sae: list[SAEConfig],
    config: list[TrainConfig],
    layer: Annotated[list[int] | None, Option(help="Layer to train on, if the store holds several.")] = None,
    site: Annotated[str | None, Option(help="Site within that layer, if the store holds several.")] = None,
    device: Device = "auto",
    log_every: Annotated[int, Option(help="Steps between lines of metrics.jsonl.")] = 50,
    checkpoint_every: CheckpointEvery = 1000,
    log_to: Annotated[list[str], Option(help="Also show the metrics in tensorboard or wandb; repeat for both.")] = [],
    wandb_project: Annotated[
        str | None, Option(help="Project in wandb; the variable WANDB_PROJECT by default.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Train sparse autoencoders on cached activations.

    The model itself is not needed. The same command resumes after an interruption. --layer, --variant, --n-latents,
    --k, --l1, --target-l0, --lr and --seed may be given several times: all combinations are trained on one stream, and
    RUN becomes a folder of runs.
    """
    if find_worker().rank:  # the first process shows what all of them do
        options.quiet = True
    members = [(hook_point(number, site), one, other) for number in layer or (None,) for one in sae for other in config]
    with show_progress("train", "steps") as on_progress:

        def show(step: int, total: int, metrics: Mapping[str, Any]) -> None:
            note = "fvu {fvu:.3f} l0 {l0:.1f} dead {dead:.1%} {tokens_per_s:,.0f} tokens/s".format(**metrics)
            on_progress(step, total, note)

        how: dict[str, Any] = {
            "device": device, "log_every": log_every, "checkpoint_every": checkpoint_every, "overwrite": overwrite,
            "log_to": log_to, "wandb_project": wandb_project, "on_progress": show,
        }  # fmt: skip
        if len(members) > 1:
            runs = saetrain.sweep(store, run, members, **how)
        else:
            where, network, training = members[0]
            runs = [saetrain.train(store, run, layer=where, sae=network, config=training, **how)]
    facts = [{"run": str(done.path), "run_id": done.run_id, "quality": done.quality} for done in runs]
    if not find_worker().rank:
        emit(facts[0] if len(members) == 1 else {"runs": facts}, "\n".join(map(repr, runs)))


@verb(PATH, "encode runs/l10 val.acts val.codes")
def encode(
    run: RunPath, store: StorePaths, codes: CodesPath, device: Device = "auto", overwrite: Overwrite = False
) -> None:
    """Turn activations into sparse codes.

    The same command resumes after an interruption. Under torchrun or srun, every process works on its own shards.
    """
    with show_progress("encode", "images") as on_progress:
        opened = saetrain.encode(run, store, codes, device=device, overwrite=overwrite, on_progress=on_progress)
    n_underflowed = opened.summary["n_underflowed"]
    underflow = {} if n_underflowed is None else {"n_underflowed": n_underflowed}
    emit({"codes": str(codes), "codes_id": opened.codes_id, "n_entries": opened.n_entries, **underflow}, repr(opened))


@verb(PATH, "analyze val.codes val.concepts")
def analyze(
    codes: CodesPath,
    concepts: ConceptsPath,
    config: AnalyzeConfig,
    images: MovedImages = None,
    store: MovedStore = None,
    run: MovedRun = None,
    embeddings: Annotated[
        str | None, Option(help="Image embeddings for monosemanticity: clip (the store's model), or an .npy file.")
    ] = None,
    device: Device = "auto",
    n_workers: Workers = None,
    scheduler: Scheduler = None,
    overwrite: Overwrite = False,
) -> None:
    """Compute the statistics and the top images of every latent."""
    with show_progress("analyze", "tasks") as on_progress:
        opened = analysis.analyze(
            codes, concepts, config=config, images=images, store=store, run=run, embeddings=embeddings, device=device,
            n_workers=n_workers, scheduler=scheduler, overwrite=overwrite, on_progress=on_progress, on_wait=show_wait,
        )  # fmt: skip
    facts = {"concepts": str(concepts), "concepts_id": opened.artifact.id, **opened.summary_numbers()}
    notes = [f"  without {what}: {why}" for what, why in opened.left_out.items()]
    emit({**facts, "left_out": opened.left_out}, "\n".join([repr(opened), *notes]))


@verb(LOOKING, "query val.codes --latent 907 --where \"split == 'test'\" --sheet 907.png")
def query(
    codes: CodesPath,
    question: Question,
    names: Annotated[
        Path | None, Option(help="Concepts of these codes, from which the answer takes the names of latents.")
    ] = None,
    out: TablePath = None,
    sheet: Annotated[Path | None, Option(help="PNG file for a contact sheet with heat maps.")] = None,
    images: MovedImages = None,
    store: MovedStore = None,
    n_workers: Workers = None,
    scheduler: Scheduler = None,
) -> None:
    """Answer questions about latents, images, classes and groups."""
    if question.sample is not None and sheet is not None:
        raise SettingsError("--sheet does not go with --sample. Leave one of them out.")
    opened = saetrain.CodeStore.open(codes)
    if store is not None:
        analysis.find_images(opened, store=store)
    with analysis.open_scheduler(n_workers, scheduler, on_wait=show_wait):
        table = analysis.answer_question(opened, question)
    if names is not None:
        table = analysis.add_names(table, opened, names)
    if sheet is not None:
        analysis.draw_sheet(
            opened, table, sheet, latents=question.latents, images=question.image, where=question.where, folder=images,
            store=store,
        )  # fmt: skip
    drawn = {} if sheet is None else {"sheet": str(sheet)}
    emit_answer(opened, table, out, n_shown=20 if question.sample is not None else None, **drawn)


@verb(LOOKING, 'name val.concepts --vocabulary words.txt --set "907=red stripes"')
def name(
    concepts: ConceptsPath,
    model: ModelOptions,
    vocabulary: Vocabulary = None,
    method: Annotated[
        list[str], Option(help="How to find names: images (top images) or lens (decoder direction); repeat for both.")
    ] = [
        "images",
        "lens",
    ],
    template: Annotated[str, Option(help="Text around each word; {} stands for the word.")] = "{}",
    set_: Annotated[list[str], Option("--set", help='Only set your own name for a latent: "907=red stripes".')] = [],
    note: Annotated[list[str], Option(help='Only set your own note on a latent: "907=see image 12".')] = [],
    codes: Annotated[Path | None, Option(help="Where the codes of the table are, if they have moved.")] = None,
    run: MovedRun = None,
    store: Annotated[str | None, Option(help="Where the activation store is, if it has moved.")] = None,
    images: Annotated[Path | None, Option(help="Embed these image files instead of the activations.")] = None,
) -> None:
    """Name latents with CLIP's text tower, or by hand."""
    table = analysis.ConceptTable.open(concepts)
    own = [(kind, *split_pair(f"--{flag}", pair)) for kind, flag, pairs in
           (("name", "set", set_), ("note", "note", note)) for pair in pairs]  # fmt: skip
    if own:
        for kind, latent, text in own:
            analysis.set_name(table, latent, **{kind: text})
        emit({"concepts": str(concepts), "set": [latent for _, latent, _ in own]}, f"{len(own)} written to {concepts}")
        return
    with show_progress("name", "images") as on_progress:
        names = analysis.name_latents(
            table, vocabulary=vocabulary, methods=method, template=template, codes=codes, run=run, store=store,
            images=images, **asdict(model), on_progress=on_progress,
        )  # fmt: skip
    order = names.sort_by([("alignment", "descending")])
    emit({"rows": names.to_pylist()}, draw_table(order.slice(0, 20).to_pylist()))


@verb(LOOKING, "report val.concepts report.html --result masks.json")
def report(
    concepts: ConceptsPath,
    out: Annotated[Path, Argument(metavar="OUT", help="HTML file to write, e.g. report.html.")],
    results: Annotated[
        list[Path], Option("--result", help="Result of a measuring verb, or x.prompts; repeat for several.")
    ] = [],
) -> None:
    """Write a self-contained HTML page about the concepts."""
    path = analysis.write_report(concepts, out, results=results)
    emit({"report": str(path), "bytes": path.stat().st_size}, f"{path} ({path.stat().st_size / 1e6:.1f} MB)")


@verb(MEASURING, "evaluate runs/l10 val.acts fidelity.json --templates openai")
def evaluate(
    run: RunPath,
    store: StorePath,
    study: StudyConfig,
    model: ModelOptions,
    out: ResultPath = None,
    overwrite: Overwrite = False,
) -> None:
    """Measure zero-shot accuracy with the SAE spliced in.

    RUN may be a folder of runs (a sweep). Only images that the run was not trained on are used.
    """
    with show_progress("evaluate", "images") as on_progress:
        result = analysis.evaluate_fidelity(
            run, store, out, study=study, model=model, overwrite=overwrite, on_progress=on_progress
        )
    emit_result(result)


@verb(MEASURING, "intervene runs/l10 val.acts masks.json --chosen-on train.codes")
def intervene(
    run: RunPath,
    store: StorePath,
    config: MaskingConfig,
    study: StudyConfig,
    model: ModelOptions,
    out: ResultPath = None,
    set_: Annotated[list[str], Option("--set", help="Hold a latent at a value on every token instead: 907=5.")] = [],
    add: Annotated[list[str], Option(help="Raise or lower a latent by a value instead: 907=-2.")] = [],
    chosen_on: Annotated[Path | None, Option(help="Codes of other images to choose latents on.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Keep, drop or set latents and see what CLIP predicts.

    Latents are chosen and judged on different images. Without --chosen-on and --chosen-where, they are chosen on the
    images that RUN was trained on and judged on the held-out ones. In a store that RUN was not trained on, the images
    of each class are split into two halves.
    """
    fixed, raised = read_values("--set", set_), read_values("--add", add)
    how: dict[str, Any] = {"study": study, "model": model, "overwrite": overwrite}
    with show_progress("intervene", "images") as on_progress:
        if fixed or raised:
            emit_result(
                analysis.set_latents(
                    run, store, out, set=fixed, add=raised, keep_error=config.keep_error, **how, on_progress=on_progress
                )
            )
        else:
            emit_result(
                analysis.mask_latents(run, store, out, config, chosen_on=chosen_on, **how, on_progress=on_progress)
            )


@verb(MEASURING, "attribute runs/l10 val.acts deletion.json")
def attribute(
    run: RunPath,
    store: StorePath,
    config: DeletionConfig,
    study: StudyConfig,
    model: ModelOptions,
    out: ResultPath = None,
    overwrite: Overwrite = False,
) -> None:
    """Find the latents that predictions rest on."""
    with show_progress("attribute", "images") as on_progress:
        result = analysis.delete_latents(
            run, store, out, config, study=study, model=model, overwrite=overwrite, on_progress=on_progress
        )
    emit_result(result)


@verb(MEASURING, "steer runs/l10 val.acts steerability.json --strength 50")
def steer(
    run: RunPath,
    store: StorePath,
    config: SteerabilityConfig,
    study: StudyConfig,
    model: ModelOptions,
    out: ResultPath = None,
    vocabulary: Vocabulary = None,
    overwrite: Overwrite = False,
) -> None:
    """Measure how far one latent can move the predictions.

    By default, --limit is 32 images. As a baseline, dimensions of the residual stream are set in the same way.
    """
    with show_progress("steer", "latents") as on_progress:
        result = analysis.measure_steerability(
            run, store, out, config, vocabulary=vocabulary, study=study, model=model, overwrite=overwrite,
            on_progress=on_progress,
        )  # fmt: skip
    emit_result(result)


@verb(MEASURING, "rules train.codes rules.json --judge test.codes --concepts train.concepts")
def rules(
    codes: CodesPath,
    config: RulesConfig,
    out: ResultPath = None,
    judge: Annotated[
        Path | None, Option(help="Codes to judge the rules on; by default, the last 20 % of the images.")
    ] = None,
    concepts: Annotated[
        Path | None, Option(help="Concepts of these codes, from which the latents take their names.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Explain classes with readable rules over latents."""
    with show_progress("rules", "shards") as on_progress:
        result = analysis.learn_rules(
            codes, out, config, judge=judge, concepts=concepts, overwrite=overwrite, on_progress=on_progress
        )
    emit_result(result)


@verb(MEASURING, "localize val.codes --masks masks --legend classes.csv")
def localize(
    codes: CodesPath,
    masks: Annotated[
        Path | None, Option(help="Folder of PNG masks named like the images; by default, the store's own.")
    ] = None,
    legend: Annotated[
        Path | None,
        Option(
            help="Table that explains the numbers in the masks: columns number and name, or uri and one per concept."
        ),
    ] = None,
    latent: Annotated[int | None, Option(help="Judge this latent instead of the best one of each concept.")] = None,
    n_top: Annotated[int, Option(help="Number of latents for each concept.", min=1)] = 1,
    where: Where = None,
    out: Annotated[
        Path | None, Option(help="File to write to: .csv, .parquet, or .json for `report --result`.")
    ] = None,
    images: MovedImages = None,
    store: MovedStore = None,
    n_workers: Workers = None,
    scheduler: Scheduler = None,
    overwrite: Overwrite = False,
) -> None:
    """Compare heat maps of latents with pixel masks.

    The scores are average precision, pointing game and IoU. The latent and the threshold are chosen on one half of the
    images with masks and judged on the other half.
    """
    opened = saetrain.CodeStore.open(codes)
    with (
        analysis.open_scheduler(n_workers, scheduler, on_wait=show_wait),
        show_progress("read masks", "images") as on_progress,
    ):
        result_file = out if out is not None and out.suffix.lower() == ".json" else None
        result = analysis.localize(
            opened, result_file, masks=masks, legend=legend, latent=latent, n_top=n_top, where=where, images=images,
            store=store, overwrite=overwrite, on_progress=on_progress,
        )  # fmt: skip
    emit_answer(opened, result.tables()[0], out)


@verb(MEASURING, "inspect runs/seed0 runs/seed1 --store val.acts")
def inspect(
    runs: Annotated[list[Path], Argument(metavar="RUN...", help="Trained SAEs, or folders of them.")],
    store: Annotated[list[str], Option(help="Activations of their model; repeat for several stores.")],
    n_tokens: Annotated[int, Option(help="Number of held-out tokens to encode by matching pursuit.")] = 2048,
    seed: Annotated[int, Option(help="Random seed for the sample of tokens.")] = 0,
    truth: Annotated[Path | None, Option(help="A known dictionary [N, D] to match with, as a .npy file.")] = None,
    out: ResultFile = None,
    overwrite: Overwrite = False,
) -> None:
    """Measure dictionaries and match them between runs.

    The measures are the amortization gap, the coherence, and how well the latents of two runs match.
    """
    with show_progress("inspect", "runs and pairs") as on_progress:
        result = analysis.inspect_dictionaries(
            runs, store, n_tokens=n_tokens, seed=seed, truth=truth, out=out, overwrite=overwrite,
            on_progress=on_progress,
        )  # fmt: skip
    emit_result(result)


@verb(ADAPTING, "adapt photos maple.prompts --model ViT-B-16-quickgelu --pretrained openai --method maple")
def adapt(
    images: ImagesPath,
    prompts: Annotated[Path, Argument(metavar="PROMPTS", help="Artifact to write, e.g. maple.prompts.")],
    model: Annotated[str, Option(help="open_clip architecture, or the path of an open_clip config JSON.")],
    pretrained: Annotated[str, Option(help="open_clip tag, checkpoint file, or random:SEED.")],
    config: PromptConfig,
    test: Annotated[
        Path | None, Option(help="Images to measure accuracy on; by default, all images that are not shots.")
    ] = None,
    precision: Annotated[str, Option(help="Precision of the computation: auto, float32 or bfloat16.")] = "auto",
    device: Device = "auto",
    checkpoint_every: CheckpointEvery = 200,
    overwrite: Overwrite = False,
) -> None:
    """Train prompts for a frozen CLIP on a few images.

    Afterwards, it measures the gain in accuracy. The same command resumes after an interruption.
    """
    with show_progress("adapt", "steps") as on_progress:
        adaptation = actcache.adapt(
            images, prompts, model=model, pretrained=pretrained, config=config, test=test, precision=precision,
            device=device, checkpoint_every=checkpoint_every, overwrite=overwrite, on_progress=on_progress,
        )  # fmt: skip
    accuracy = adaptation.accuracy.to_json()
    facts = {"prompts": str(prompts), "prompts_id": adaptation.artifact.id, "accuracy": accuracy}
    rows = [
        {"classes": part, **{how: accuracy[how][part] for how in ("zero_shot", "adapted")}}
        for part in ("all", "base", "novel", "harmonic")
    ]
    emit(facts, draw_table([row for row in rows if row["zero_shot"] is not None]))


@verb(ADAPTING, "compare val.concepts maple.concepts comparison.json")
def compare(
    base: Annotated[Path, Argument(metavar="CONCEPTS_BASE", help="Concepts of the plain model.")],
    adapted: Annotated[
        Path,
        Argument(
            metavar="CONCEPTS_ADAPTED",
            help="Concepts of the adapted model, made from the same images with the same SAE.",
        ),
    ],
    out: Annotated[Path, Argument(metavar="OUT", help="JSON file to write; an HTML page is written beside it.")],
    config: ComparisonConfig,
    second_run: Annotated[
        Path | None, Option(help="Run trained on the adapted model's activations, to compare both dictionaries.")
    ] = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Measure what prompt tuning changed.

    The latents may have changed, or only the mapping from latents to classes.
    """
    if out.suffix.lower() == ".html":
        raise typer.BadParameter(
            f"OUT is the JSON file, e.g. {out.with_suffix('.json')}; the page is written beside it"
        )
    with show_progress("compare", "images") as on_progress:
        result = analysis.compare(
            base, adapted, out, config, second_run=second_run, device=device, overwrite=overwrite,
            on_progress=on_progress,
        )  # fmt: skip
    page = analysis.write_adaptation_page(result, base, adapted, out.with_suffix(".html"))
    facts = {"out": str(out), "page": str(page), "conclusion": result.to_json()["conclusion"]}
    emit(facts, "\n".join(result.lines()))


@verb(EXCHANGING, "convert runs/l10 l10-saelens --to saelens --store val.acts")
def convert(
    src: Annotated[Path, Argument(metavar="SRC", help="A run, or another package's checkpoint.")],
    dst: Annotated[Path, Argument(metavar="DST", help="Folder to write: a checkpoint or a run.")],
    to: Annotated[
        str | None, Option(help="Format: saelens, dictionary_learning, sparsify, saev, prisma or patchsae.")
    ] = None,
    store: Annotated[
        str | None, Option(help="Activations to compare the two SAEs on; required to read a checkpoint.")
    ] = None,
    layer: Annotated[int | None, Option(help="Layer of the SAE, if the store holds several.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write or read SAEs in the formats of other packages.

    It also reports how closely the two SAEs agree.
    """
    conversion = saetrain.convert(src, dst, to=to, store=store, layer=layer, overwrite=overwrite)
    parity = asdict(conversion.parity)
    rounded = {name: f"{value:.3g}" if isinstance(value, float) else value for name, value in parity.items()}
    emit(
        {"path": str(conversion.path), "format": conversion.format, "parity": parity},
        draw_facts({"written": str(conversion.path), "format": conversion.format, **rounded}),
    )


@verb(FILES, "info val.acts")
def info(path: AnyPath) -> None:
    """Show what an artifact is and what it was made from."""
    facts = actcache.describe(path)
    emit(facts, draw_facts(facts))


@verb(FILES, "verify val.acts")
def verify(
    path: AnyPath,
    repair: Annotated[bool, Option("--repair", help="Extract only the damaged shards again.")] = False,
    images: Annotated[Path | None, Option(help="With --repair: where the images are, if they have moved.")] = None,
    model: Annotated[str | None, Option(help="With --repair: the architecture, if its config file has moved.")] = None,
    pretrained: Annotated[str | None, Option(help="With --repair: the weights, if they have moved.")] = None,
    prompts: Annotated[str | None, Option(help="With --repair: the prompts, if they have moved.")] = None,
) -> None:
    """Compare every file with its checksum.

    The exit code is 1 if something is wrong.
    """
    with show_progress("verify", "bytes") as on_progress:
        checked = actcache.verify(path, on_progress=on_progress)
    if repair and not checked.ok:
        with show_progress("repair", "images") as on_progress:
            checked = actcache.repair(
                path, images=images, model=model, pretrained=pretrained, prompts=prompts, on_progress=on_progress
            )
    facts = {
        "path": path, "kind": checked.kind, "ok": checked.ok, "complete": checked.complete, "n_files": checked.n_files,
        "n_bytes": checked.n_bytes, "problems": [str(problem) for problem in checked.problems],
        "shards": checked.shards,
    }  # fmt: skip
    state = "is whole" if checked.ok else "is damaged" if checked.problems else "is not complete, but undamaged so far"
    text = f"{path} {state}: {checked.n_files:,} files, {checked.n_bytes / 1e6:,.1f} MB checked"
    advice = []
    if checked.problems and not repair:
        remake = "the command that made it, with --overwrite"
        advice = [f"  to repair it: {f'patchsae verify {path} --repair' if checked.kind == 'acts' else remake}"]
    emit(facts, "\n".join([text, *(f"  {problem}" for problem in checked.problems), *advice]))
    if not checked.ok:
        raise typer.Exit(1)


# ---------------------------------------------------------------------------------------------------------------------
# Reading flags


def split_pair(flag: str, pair: str) -> tuple[int, str]:
    """907=red stripes -> (907, "red stripes")."""
    latent, equals, text = pair.partition("=")
    if not (equals and latent.strip().isdigit()):
        raise SettingsError(f'{flag} takes LATENT=TEXT, e.g. {flag} "907=red stripes", got {pair!r}.')
    return int(latent), text


def read_values(flag: str, pairs: Sequence[str]) -> dict[int, float]:
    """907=5 and so on -> {907: 5.0}."""
    values: dict[int, float] = {}
    for pair in pairs:
        latent, text = split_pair(flag, pair)
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not abs(value) < float("inf") or latent in values:
            raise SettingsError(f"{flag} takes LATENT=NUMBER, each latent once, e.g. {flag} 907=5, got {pair!r}.")
        values[latent] = value
    return values


def hook_point(layer: int | None, site: str | None) -> Any:
    """What the library takes for --layer and --site."""
    if site is None:
        return layer
    if layer is None:
        raise SettingsError("--site needs --layer.")
    return actcache.HookPoint(layer, site)


if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, _before)

if __name__ == "__main__":
    app()
