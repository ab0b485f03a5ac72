"""The command line: one short function for each verb. It parses, calls the library and shows the result.

Results go to stdout; progress, the files that were written and hints go to stderr. Exit codes: 0 done, 1 one of our
errors (one line that says what to do), 2 wrong usage, 130 interrupted (the same command resumes). Importing this module
loads neither torch nor zarr nor dask.

The flags of a verb come from the fields of its configuration classes, and arguments are checked by what stands in their
annotations (`with_flags`), before the library is loaded.
"""

import os
import signal
import threading

# Threads that wait for each other must not spin: beside two busy processes on two processors, 800 small products took
# 9.0 s and 13.0 s spinning and 0.8 s sleeping, and large ones take the same. OpenMP reads this when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if threading.current_thread() is threading.main_thread():  # Ctrl-C during the imports below is quiet
    _before = signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

import actcache
import analysis
import saetrain
from actcache.errors import SettingsError
from actcache.extraction import ExtractConfig
from actcache.importing import ImportConfig
from actcache.options import JudgingConfig
from actcache.prompts import PromptConfig
from actcache.workers import find_worker
from analysis import arguments
from analysis.concepts import AnalyzeConfig
from analysis.config import (
    ComparisonConfig,
    DeletionConfig,
    MaskingConfig,
    ModelOptions,
    ProbingConfig,
    RulesConfig,
    SteerabilityConfig,
    StudyConfig,
    TowerOptions,
)
from analysis.query import Question
from analysis.terminal import (
    Program,
    Verb,
    Verbs,
    announce,
    ask,
    describe_codes,
    describe_import,
    describe_run,
    describe_store,
    draw_description,
    draw_estimate,
    draw_facts,
    draw_look,
    draw_publication,
    draw_table,
    emit,
    emit_answer,
    emit_result,
    options,
    program_version,
    read_values,
    repeat_flags,
    show_download,
    show_next,
    show_next_of,
    show_next_question,
    show_note,
    show_progress,
    show_source,
    show_steps,
    show_upload,
    show_warning,
    show_written,
    split_pair,
    with_flags,
)
from saetrain.config import SAEConfig, TrainConfig

app = Program(
    name="patchsae",
    cls=Verbs,
    no_args_is_help=True,
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Turn a folder of images and a CLIP vision transformer into measured concepts: "
    "extract, train, encode, analyze, query, report.",
)


@app.callback()
def main(
    context: typer.Context,
    quiet: Annotated[bool, Option("--quiet", "-q", help="Show no progress and no hints.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object on stdout.")] = False,
    traceback: Annotated[bool, Option("--traceback", help="Show where an error came from.")] = False,
    version: Annotated[bool, Option("--version", help="Print the version and exit.")] = False,
) -> None:
    options.quiet, options.json, options.traceback = quiet, as_json, traceback
    if version:
        emit({"version": program_version()}, f"patchsae {program_version()}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        context.fail("Missing command.")


PATH, LOOKING, MEASURING = "Pipeline", "Exploring", "Measuring"
ADAPTING, EXCHANGING, FILES = "Adapting", "Exchanging", "Files"


def verb(panel: str, example: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a verb of the command line, in a panel of the help and with an example."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        name = function.__name__.strip("_")  # import_ is `import`
        app.command(name, cls=Verb, rich_help_panel=panel, epilog=f"Example: patchsae {example}")(with_flags(function))
        return function

    return register


# ---------------------------------------------------------------------------------------------------------------------
# Verbs


@verb(PATH, "quickstart quickstart")
def quickstart(
    out: arguments.QuickstartOut = Path("quickstart"),
    n_images: arguments.NImages = 2000,
    seed: arguments.Seed = 0,
) -> None:
    """Run the whole pipeline on the built-in demo.

    The images are generated, the CLIP is tiny and the concepts are known. This takes less than three minutes.
    """
    with show_steps() as show:
        result = analysis.quickstart(out, n_images=n_images, seed=seed, on_step=show)
    emit(result.to_json(), result.lines())
    show_written(*sorted(out.iterdir()))
    show_next("query", out / "scenes.codes", "--latent", result.concepts[0].latent)


@verb(PATH, "extract photos val.acts --model ViT-B-16-quickgelu --pretrained openai --layer 10")
def extract(
    images: arguments.ImagesPath,
    store: arguments.NewStore,
    config: ExtractConfig,
    batch_size: arguments.BatchImages = 32,
    device: arguments.Device = "auto",
    n_threads: arguments.NThreads = None,
    on_error: arguments.OnError = "stop",
    dry_run: arguments.DryRun = False,
    overwrite: arguments.Overwrite = False,
) -> None:
    """Run the image tower and store its activations.

    The same command resumes after an interruption. Under torchrun or srun, every process works on its own shards.
    """
    if dry_run:
        estimate = actcache.estimate(images, store, config=config, batch_size=batch_size, device=device)
        facts = {**vars(estimate), "settings": estimate.settings.to_json(), "fits": estimate.fits}
        show_source(estimate)
        emit(facts, draw_estimate(estimate))
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
    facts = {**describe_store(store, opened), "classes": plans[0].classes, "left_out": dict(plans[0].left_out)}
    emit(facts, [repr(opened), *(f"  skipped: {image['reason']}" for image in facts["skipped"])])
    show_written(store)
    show_next_of(store)


@verb(PATH, "train val.acts runs/l10 --layer 10 --n-latents 12288 --k 32")
def train(
    store: arguments.StorePaths,
    run: arguments.NewRun,
    sae: list[SAEConfig],
    config: list[TrainConfig],
    layer: arguments.Layer = None,
    site: arguments.Site = None,
    device: arguments.Device = "auto",
    log_every: arguments.LogEvery = 50,
    checkpoint_every: arguments.CheckpointEvery = 1000,
    log_to: arguments.LogTo = [],
    wandb_project: arguments.WandbProject = None,
    overwrite: arguments.Overwrite = False,
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
            note = "fvu {fvu:.3f}  {tokens_per_s:,.0f} tokens/s  dead {dead:.1%}  l0 {l0:.1f}".format(**metrics)
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
    if find_worker().rank:
        return
    facts = [describe_run(done) for done in runs]
    emit(facts[0] if len(members) == 1 else {"runs": facts}, [repr(done) for done in runs])
    show_written(*(done.path for done in runs))
    if len(members) == 1:
        show_next_of(run)
    else:
        show_next("inspect", run, *(part for path in store for part in ("--store", path)))


@verb(PATH, "encode runs/l10 val.acts val.codes")
def encode(
    run: arguments.RunPath,
    store: arguments.StorePaths,
    codes: arguments.NewCodes,
    device: arguments.Device = "auto",
    overwrite: arguments.Overwrite = False,
) -> None:
    """Turn activations into sparse codes.

    The same command resumes after an interruption. Under torchrun or srun, every process works on its own shards.
    """
    with show_progress("encode", "images") as on_progress:
        opened = saetrain.encode(run, store, codes, device=device, overwrite=overwrite, on_progress=on_progress)
    facts = describe_codes(opened)
    emit(facts, [repr(opened), *(f"  skipped: {image['reason']}" for image in facts["skipped"])])
    show_written(codes)
    show_next_of(codes)


@verb(PATH, "analyze val.codes val.concepts")
def analyze(
    codes: arguments.CodesPath,
    concepts: arguments.NewConcepts,
    config: AnalyzeConfig,
    images: arguments.MovedImages = None,
    store: arguments.MovedStore = None,
    run: arguments.MovedRun = None,
    embeddings: arguments.Embeddings = None,
    with_: arguments.With = None,
    device: arguments.Device = "auto",
    n_workers: arguments.Workers = None,
    scheduler: arguments.Scheduler = None,
    overwrite: arguments.Overwrite = False,
) -> None:
    """Compute the statistics and the top images of every latent."""
    with show_progress("analyze", "tasks") as on_progress:
        opened = analysis.analyze(
            codes, concepts, config=config, images=images, store=store, run=run, embeddings=embeddings, with_=with_,
            device=device, n_workers=n_workers, scheduler=scheduler, overwrite=overwrite, on_progress=on_progress,
            on_wait=show_note,
        )  # fmt: skip
    facts = {"concepts": str(concepts), "concepts_id": opened.artifact.id, **opened.summary_numbers()}
    notes = [f"  without {what}: {why}" for what, why in opened.left_out.items()]
    emit({**facts, "left_out": opened.left_out}, [repr(opened), *notes])
    show_written(concepts)
    show_next_of(concepts)


@verb(LOOKING, "query val.codes --latent 907 --where \"split == 'test'\" --sheet 907.png")
def query(
    codes: arguments.CodesPath,
    question: Question,
    names: arguments.Names = None,
    out: arguments.TablePath = None,
    sheet: arguments.Sheet = None,
    images: arguments.MovedImages = None,
    store: arguments.MovedStore = None,
    n_workers: arguments.Workers = None,
    scheduler: arguments.Scheduler = None,
) -> None:
    """Answer questions about latents, images, classes and groups."""
    if question.sample is not None and sheet is not None:
        raise SettingsError("--sheet does not go with --sample. Leave one of them out.")
    opened = saetrain.CodeStore.open(codes)
    if store is not None:
        analysis.find_images(opened, store=store)
    with analysis.open_scheduler(n_workers, scheduler, on_wait=show_note):
        table = analysis.answer_question(opened, question)
    known = analysis.find_names(opened, names)
    if sheet is not None:
        analysis.draw_sheet(
            opened, table, sheet, latents=question.latents, images=question.image, where=question.where, folder=images,
            store=store, names=known,
        )  # fmt: skip
    n_shown = 20 if question.sample is not None else None
    emit_answer(opened, table, out, n_shown=n_shown, names=known, asked=question.named_latents, sheet=sheet)
    show_written(out, sheet)
    show_next_question(codes, question, table)


@verb(LOOKING, "look dog.jpg --sae runs/l10 --out dog.html")
def look(
    images: arguments.LookImages,
    tower: TowerOptions,
    sae: arguments.LookSAE,
    latent: arguments.LookLatents = [],
    at: arguments.LookAt = None,
    n_top: arguments.LookTop = 10,
    concepts: arguments.LookConcepts = None,
    store: arguments.MovedStore = None,
    input_mean: arguments.InputMean = None,
    input_scale: arguments.InputScale = None,
    out: arguments.LookOut = None,
) -> None:
    """Show what an SAE sees in photographs, with heat maps.

    No activations are stored. The SAE is a run, or a checkpoint of another package, here or on the Hugging Face hub.
    The image tower is the one that it names; --model, --pretrained and --layer name another.
    """
    place = None if at is None else analysis.parse_at(at)
    with show_download(sae) as on_download, show_progress("look", "images") as on_progress:
        seen = analysis.look(
            images, sae, tower, latents=latent, at=place, n_top=n_top, concepts=concepts, store=store,
            input_mean=input_mean, input_scale=input_scale, on_progress=on_progress, on_download=on_download,
        )  # fmt: skip
    if out is not None:
        seen.draw(out)
    emit({**seen.to_json(), "out": None if out is None else str(out)}, draw_look(seen))
    show_written(out)
    strongest = seen.table(seen[0])["latent"].to_pylist()
    if out is None and strongest:
        same = repeat_flags(tower, concepts=concepts, store=store, input_mean=input_mean, input_scale=input_scale)
        words = ("look", *images, "--sae", sae, "--latent", strongest[0], "--out", "look.html", *same)
        show_next(*words, why=f"heat maps of one latent{' on all of the images' if len(images) > 1 else ''}")


@verb(LOOKING, 'name val.concepts --vocabulary words.txt --set "907=red stripes"')
def name(
    concepts: arguments.ConceptsPath,
    model: ModelOptions,
    vocabulary: arguments.Vocabulary = None,
    method: arguments.Method = [
        "images",
        "lens",
    ],
    template: arguments.Template = "{}",
    set_: arguments.OwnName = [],
    note: arguments.OwnNote = [],
    codes: arguments.MovedCodes = None,
    run: arguments.MovedRun = None,
    store: arguments.AnyMovedStore = None,
    images: arguments.EmbeddedImages = None,
    with_: arguments.With = None,
) -> None:
    """Name latents with CLIP's text tower, or by hand."""
    table = analysis.ConceptTable.open(concepts)
    own = [(kind, *split_pair(f"--{flag}", pair)) for kind, flag, pairs in
           (("name", "set", set_), ("note", "note", note)) for pair in pairs]  # fmt: skip
    if own:
        for kind, latent, text in own:
            analysis.set_name(table, latent, **{kind: text})
        facts = {"concepts": str(concepts), "set": [latent for _, latent, _ in own]}
        emit(facts, [f"latent {latent}: {kind} {text!r}" for kind, latent, text in own])
        show_written(concepts / "notes" / "own.json")
        show_next("report", concepts, concepts.with_suffix(".html"))
        return
    with show_progress("name", "images") as on_progress:
        names = analysis.name_latents(
            table, vocabulary=vocabulary, methods=method, template=template, codes=codes, run=run, store=store,
            images=images, with_=with_, **asdict(model), on_progress=on_progress,
        )  # fmt: skip
    order = names.sort_by([("alignment", "descending")])
    emit({"rows": names.to_pylist()}, draw_table(order.slice(0, 20).to_pylist()))
    show_written(concepts / "notes" / "names.parquet")
    show_next("report", concepts, concepts.with_suffix(".html"))


@verb(LOOKING, "report val.concepts report.html --result masks.json")
def report(
    concepts: arguments.ConceptsPath,
    out: arguments.ReportOut,
    results: arguments.Results = [],
) -> None:
    """Write a self-contained HTML page about the concepts."""
    path = analysis.write_report(concepts, out, results=results)
    emit({"report": str(path), "bytes": path.stat().st_size}, f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
    show_written(path)
    show_next("name", concepts, why="words for the latents; then write the report again")


@verb(LOOKING, "explore val.concepts --result masks.json")
def explore(
    concepts: arguments.ConceptsPath,
    model: ModelOptions,
    port: arguments.Port = 8000,
    host: arguments.Host = "127.0.0.1",
    open_: arguments.OpenBrowser = False,
    compare: arguments.Compare = None,
    result: arguments.Results = [],
    codes: arguments.MovedCodes = None,
    run: arguments.MovedRun = None,
    store: arguments.AnyMovedStore = None,
    images: arguments.MovedImages = None,
) -> None:
    """Look at the concepts in a browser.

    A small server on this machine answers at the printed address until Ctrl-C. It shows every latent and image, draws
    heat maps, takes your own images, keeps names and notes, and says how the classifier's answer changes when you
    change latents. Nothing leaves the machine.
    """

    def show(address: str) -> None:
        if not analysis.is_loopback(host):
            show_warning(
                f"Other machines can reach {host}. Give the address below only to people who may see the images."
            )
        show_note("Ctrl-C ends it. The address:")
        announce({"concepts": str(concepts), "address": address}, address)

    analysis.explore_concepts(
        concepts, host=host, port=port, codes=codes, run=run, store=store, images=images, compare=compare,
        results=result, model=model, browser=open_, on_ready=show,
    )  # fmt: skip


@verb(MEASURING, "evaluate runs/l10 val.acts fidelity.json --templates openai")
def evaluate(
    run: arguments.Runs,
    store: arguments.StorePath,
    study: StudyConfig,
    model: ModelOptions,
    out: arguments.ResultPath = None,
    overwrite: arguments.Overwrite = False,
) -> None:
    """Measure zero-shot accuracy with the SAE spliced in.

    RUN may be a folder of runs (a sweep). Images that the run has learned from, under whatever name, are left out.
    """
    with show_progress("evaluate", "images") as on_progress:
        result = analysis.evaluate_fidelity(
            run, store, out, study=study, model=model, overwrite=overwrite, on_progress=on_progress
        )
    emit_result(result, out, "evaluate", run, store)


@verb(MEASURING, "benchmark runs/seed0 runs/seed1 val.acts benchmark.json")
def benchmark(
    runs: arguments.InspectRuns,
    store: arguments.StorePath,
    out: arguments.BenchmarkOut,
    study: StudyConfig,
    model: ModelOptions,
    codes: arguments.BenchmarkCodes = [],
    overwrite: arguments.Overwrite = False,
) -> None:
    """Measure what SAEs are worth, beside baselines.

    The baselines are an untrained SAE of each run, PCA, raw dimensions and k-means. All are judged on the same images,
    which no run has learned from, and differences are printed where their 95 % interval does not hold 0. The same
    command resumes after an interruption.
    """
    with show_steps() as on_step:
        result = analysis.benchmark_runs(
            runs, store, out, codes=codes, study=study, model=model, overwrite=overwrite, on_step=on_step
        )
    emit_result(result, out, "benchmark", *runs, store)


@verb(MEASURING, "intervene runs/l10 val.acts masks.json --chosen-on train.codes")
def intervene(
    run: arguments.RunPath,
    store: arguments.StorePath,
    config: MaskingConfig,
    study: StudyConfig,
    model: ModelOptions,
    out: arguments.ResultPath = None,
    set_: arguments.SetLatents = [],
    add: arguments.AddToLatents = [],
    chosen_on: arguments.ChosenOn = None,
    overwrite: arguments.Overwrite = False,
) -> None:
    """Keep, drop or set latents and see what CLIP predicts.

    Latents are chosen and judged on different images. Without --chosen-on and --chosen-where, they are chosen on the
    images that RUN has learned from and judged on the others. In a store that is new to RUN, the images of each class
    are split into two halves.
    """
    fixed, raised = read_values("--set", set_), read_values("--add", add)
    how: dict[str, Any] = {"study": study, "model": model, "overwrite": overwrite}
    with show_progress("intervene", "images") as on_progress:
        how["on_progress"] = on_progress
        result: Any
        if fixed or raised:
            keep = config.keep_error
            result = analysis.set_latents(run, store, out, set=fixed, add=raised, keep_error=keep, **how)
        else:
            result = analysis.mask_latents(run, store, out, config, chosen_on=chosen_on, **how)
    emit_result(result, out, "intervene", run, store)


@verb(MEASURING, "attribute runs/l10 val.acts deletion.json")
def attribute(
    run: arguments.RunPath,
    store: arguments.StorePath,
    config: DeletionConfig,
    study: StudyConfig,
    model: ModelOptions,
    out: arguments.ResultPath = None,
    overwrite: arguments.Overwrite = False,
) -> None:
    """Find the latents that predictions rest on."""
    with show_progress("attribute", "images") as on_progress:
        result = analysis.delete_latents(
            run, store, out, config, study=study, model=model, overwrite=overwrite, on_progress=on_progress
        )
    emit_result(result, out, "attribute", run, store)


@verb(MEASURING, "steer runs/l10 val.acts steerability.json --strength 50")
def steer(
    run: arguments.RunPath,
    store: arguments.StorePath,
    config: SteerabilityConfig,
    study: StudyConfig,
    model: ModelOptions,
    out: arguments.ResultPath = None,
    vocabulary: arguments.Vocabulary = None,
    overwrite: arguments.Overwrite = False,
) -> None:
    """Measure how far one latent can move the predictions.

    By default, --limit is 32 images. As a baseline, dimensions of the residual stream are set in the same way.
    """
    with show_progress("steer", "latents") as on_progress:
        result = analysis.measure_steerability(
            run, store, out, config, vocabulary=vocabulary, study=study, model=model, overwrite=overwrite,
            on_progress=on_progress,
        )  # fmt: skip
    emit_result(result, out, "steer", run, store)


@verb(MEASURING, "rules train.codes rules.json --judge test.codes --concepts train.concepts")
def rules(
    codes: arguments.CodesPath,
    config: RulesConfig,
    out: arguments.ResultPath = None,
    judge: arguments.Judge = None,
    concepts: arguments.Concepts = None,
    overwrite: arguments.Overwrite = False,
) -> None:
    """Explain classes with readable rules over latents."""
    with show_progress("rules", "shards") as on_progress:
        result = analysis.learn_rules(
            codes, out, config, judge=judge, concepts=concepts, overwrite=overwrite, on_progress=on_progress
        )
    emit_result(result, out, "rules", codes)


@verb(MEASURING, "probe val.codes probe.json --label domain --k 1 --k 16")
def probe(
    codes: arguments.CodesPath,
    config: ProbingConfig,
    out: arguments.ResultPath = None,
    concepts: arguments.ProbeConcepts = None,
    store: arguments.AnyMovedStore = None,
    overwrite: arguments.Overwrite = False,
) -> None:
    """Measure how well a few latents predict a column of the images.

    The column holds classes or numbers. Latents are chosen on the images that the SAE has learned from and judged on
    the others; where most images are new to it, on half of these. Beside them: raw activations, random latents that
    fire as often, and shuffled labels.
    """
    with show_progress("probe", "tasks") as on_progress:
        result = analysis.probe_latents(
            codes, out, config, concepts=concepts, store=store, overwrite=overwrite, on_progress=on_progress
        )
    emit_result(result, out, "probe", codes, "--label", config.label)


@verb(MEASURING, "localize val.codes --masks masks --legend classes.csv")
def localize(
    codes: arguments.CodesPath,
    masks: arguments.Masks = None,
    legend: arguments.Legend = None,
    latent: arguments.Latent = None,
    n_top: arguments.NTop = 1,
    where: arguments.Where = None,
    judging: JudgingConfig = JudgingConfig(),
    out: arguments.LocalizeOut = None,
    images: arguments.MovedImages = None,
    store: arguments.MovedStore = None,
    n_workers: arguments.Workers = None,
    scheduler: arguments.Scheduler = None,
    overwrite: arguments.Overwrite = False,
) -> None:
    """Compare heat maps of latents with pixel masks.

    The scores are average precision, pointing game and IoU. The latent and the threshold are chosen on one half of the
    images with masks and judged on the other half.
    """
    opened = saetrain.CodeStore.open(codes)
    with (
        analysis.open_scheduler(n_workers, scheduler, on_wait=show_note),
        show_progress("read masks", "images") as on_progress,
    ):
        result_file = out if out is not None and out.suffix.lower() == ".json" else None
        result = analysis.localize(
            opened, result_file, masks=masks, legend=legend, latent=latent, n_top=n_top, where=where, images=images,
            store=store, judging=judging, overwrite=overwrite, on_progress=on_progress,
        )  # fmt: skip
    names = analysis.find_names(opened)
    seen = [asdict(counted) for counted in result.seen or ()]
    emit_answer(
        opened, result.tables()[0], out, names=names, is_written=result_file is not None, notes=result.notes(),
        seen=seen,
    )  # fmt: skip
    show_written(out)
    if result_file:
        show_next("report", "CONCEPTS", "report.html", "--result", result_file)
    else:
        show_next("localize", codes, "--out", "result.json", why="to keep the result for `report --result`")


@verb(MEASURING, "inspect runs/seed0 runs/seed1 --store val.acts")
def inspect(
    runs: arguments.InspectRuns,
    store: arguments.InspectStore,
    n_tokens: arguments.NTokens = 2048,
    seed: arguments.InspectSeed = 0,
    truth: arguments.Truth = None,
    judging: JudgingConfig = JudgingConfig(),
    out: arguments.ResultFile = None,
    overwrite: arguments.Overwrite = False,
) -> None:
    """Measure dictionaries and match them between runs.

    The measures are the amortization gap, the coherence, and how well the latents of two runs match.
    """
    with show_progress("inspect", "runs and pairs") as on_progress:
        result = analysis.inspect_dictionaries(
            runs, store, n_tokens=n_tokens, seed=seed, truth=truth, judging=judging, out=out, overwrite=overwrite,
            on_progress=on_progress,
        )  # fmt: skip
    emit_result(result, out, "inspect", *runs, "--store", *store, "--out")


@verb(ADAPTING, "adapt photos maple.prompts --model ViT-B-16-quickgelu --pretrained openai --method maple")
def adapt(
    images: arguments.ImagesPath,
    prompts: arguments.Prompts,
    model: arguments.Model,
    config: PromptConfig,
    pretrained: arguments.Pretrained = None,
    test: arguments.Test = None,
    path_column: arguments.PathColumn = None,
    label: arguments.LabelColumn = None,
    image_size: arguments.ImageSize = None,
    preprocess: arguments.Preprocess = None,
    precision: arguments.Precision = "auto",
    device: arguments.Device = "auto",
    checkpoint_every: arguments.CheckpointEvery = 200,
    overwrite: arguments.Overwrite = False,
) -> None:
    """Train prompts for a frozen model on a few images.

    Afterwards, it measures the gain in accuracy. The same command resumes after an interruption. A model without a text
    tower takes --method vpt, and its classes are the mean features of their shots.
    """
    with show_steps() as show:

        def on_progress(done: int, total: int, note: str) -> None:  # steps first, then images
            show("measure", done, total) if note == "measuring" else show("adapt", done, total, note)

        adaptation = actcache.adapt(
            images, prompts, model=model, pretrained=pretrained, config=config, test=test, path_column=path_column,
            label=label, image_size=image_size, preprocess=preprocess, precision=precision, device=device,
            checkpoint_every=checkpoint_every, overwrite=overwrite, on_progress=on_progress,
        )  # fmt: skip
    accuracy = adaptation.accuracy.to_json()
    facts = {
        "prompts": str(prompts), "prompts_id": adaptation.artifact.id, "judge": adaptation.judge, "accuracy": accuracy,
    }  # fmt: skip
    plain = adaptation.judge.replace("-", "_")
    rows = [
        {"classes": part, plain: accuracy["zero_shot"][part], "adapted": accuracy["adapted"][part]}
        for part in ("all", "base", "novel", "harmonic")
    ]
    seen = adaptation.seen
    known = {} if seen is None else {"seen": asdict(seen)}
    notes = [] if seen is None else seen.lines()
    emit(facts | known, [*draw_table([row for row in rows if row[plain] is not None]), *notes])
    show_written(prompts)
    show_next(
        "extract", images, prompts.with_suffix(".acts"), "--model", model,
        *(("--pretrained", pretrained) if pretrained else ()),
        *(("--image-size", image_size) if image_size else ()), *(("--preprocess", preprocess) if preprocess else ()),
        "--prompts", prompts, "--layer", "LAYER",
    )  # fmt: skip


@verb(ADAPTING, "compare val.concepts maple.concepts comparison.json")
def compare(
    base: arguments.Base,
    adapted: arguments.Adapted,
    out: arguments.CompareOut,
    config: ComparisonConfig,
    second_run: arguments.SecondRun = None,
    device: arguments.Device = "auto",
    overwrite: arguments.Overwrite = False,
) -> None:
    """Measure what prompt tuning changed.

    The latents may have changed, or only the mapping from latents to classes.
    """
    with show_progress("compare", "images") as on_progress:
        result = analysis.compare(
            base, adapted, out, config, second_run=second_run, device=device, overwrite=overwrite,
            on_progress=on_progress,
        )  # fmt: skip
    page = analysis.write_adaptation_page(result, base, adapted, out.with_suffix(".html"))
    written = result.to_json()
    facts = {"out": str(out), "page": str(page), **{name: written.get(name) for name in ("conclusion", "seen")}}
    emit(facts, [*result.lines(), *result.notes()])
    show_written(out, page)
    show_next("report", adapted, adapted.with_suffix(".html"), "--result", out)


@verb(EXCHANGING, "convert runs/l10 l10-saelens --to saelens --store val.acts")
def convert(
    src: arguments.Src,
    dst: arguments.Dst,
    to: arguments.To = None,
    store: arguments.ConvertStore = None,
    layer: arguments.ConvertLayer = None,
    any_model: arguments.AnyModel = False,
    input_mean: arguments.InputMean = None,
    input_scale: arguments.InputScale = None,
    overwrite: arguments.Overwrite = False,
) -> None:
    """Write or read SAEs in the formats of other packages.

    It also reports how closely the two SAEs agree.
    """
    with show_download(src) as on_progress:
        conversion = saetrain.convert(
            src, dst, to=to, store=store, layer=layer, any_model=any_model, input_mean=input_mean,
            input_scale=input_scale, overwrite=overwrite, on_progress=on_progress,
        )  # fmt: skip
    parity = asdict(conversion.parity)
    rounded = {name: f"{value:.3g}" if isinstance(value, float) else value for name, value in parity.items()}
    shown = {"input mean and scale": conversion.input} if conversion.input else {}
    emit(
        {
            "path": str(conversion.path),
            "format": conversion.format,
            "input": conversion.input,
            "parity": parity,
            "notes": conversion.notes,
        },
        [
            *draw_facts({"path": str(conversion.path), "format": conversion.format, **shown, **rounded}),
            *conversion.notes,
        ],
    )
    show_written(dst)
    show_next_of(dst)


@verb(EXCHANGING, "import layer10.npy val.acts --layer 10 --model-name my-vit --images photos")
def import_(
    acts: arguments.Acts,
    store: arguments.NewStore,
    config: ImportConfig,
    images: arguments.ImportImages = None,
    overwrite: arguments.Overwrite = False,
) -> None:
    """Turn activations that another program has made into a store.

    ACTS is a file (.npy, .pt or .safetensors) of images x tokens x channels or images x channels, several of them in
    their order, a folder of them, or saev's folder. With --n-tokens, rows are tokens, as in ViT-Prisma's caches. The
    same command resumes after an interruption.
    """
    with show_progress("import", "images") as on_progress:
        opened = actcache.import_activations(
            acts, store, config=config, images=images, overwrite=overwrite, on_progress=on_progress
        )
    facts = describe_import(store, opened)
    emit(facts, draw_facts(facts))
    show_written(store)
    show_next_of(store)


@verb(EXCHANGING, "publish val.concepts hf://me/clip-saes --license mit --dry-run")
def publish(
    src: arguments.PublishSrc,
    dst: arguments.PublishDst = None,
    site: arguments.SiteFolder = None,
    license_: arguments.License = None,
    gallery: arguments.Gallery = False,
    codes: arguments.MovedCodes = None,
    run: arguments.MovedRun = None,
    store: arguments.AnyMovedStore = None,
    images: arguments.MovedImages = None,
    compare: arguments.Compare = None,
    result: arguments.Results = [],
    yes: arguments.Yes = False,
    dry_run: arguments.PublishDryRun = False,
    overwrite: arguments.Overwrite = False,
) -> None:
    """Publish an SAE with a card, on the Hugging Face hub or in a folder.

    Others can then use it with this program and with SAELens. Concepts bring their statistics, names and notes with
    them. A repository may hold several SAEs, each in a folder of its own. Nothing is uploaded unless you say yes, and
    what was uploaded is read back and compared.

    With --site, the concepts become a web page instead: a folder of files that shows what `explore` shows, from any web
    host. It holds pictures of your images.
    """
    if (dst is None) == (site is None):
        raise typer.BadParameter("Give DST, where the SAE is published, or --site FOLDER for a web page, one of them.")
    if site is not None:
        if license_ is not None or gallery or yes:
            raise typer.BadParameter("--license, --gallery and --yes do not go with --site. Leave them out.")
        with show_progress("site", "records") as on_progress:
            made = analysis.write_site(
                src, site, codes=codes, run=run, store=store, images=images, compare=compare, results=result,
                overwrite=overwrite, dry_run=dry_run, on_plan=lambda plan: show_note(say_site(plan, "Will hold")),
                on_progress=on_progress,
            )  # fmt: skip
        emit(asdict(made), [say_site(made, "Holds"), *made.left_out])
        if made.written:
            show_written(site)
            show_note(f"Next: python3 -m http.server --directory {site}")
        elif not dry_run:
            show_note(f"Was there already: {site}")
        return
    if images is not None or compare is not None or result:
        raise typer.BadParameter("--images, --compare and --result go with --site only. Leave them out.")
    assert dst is not None

    def confirm(plan: analysis.Publication) -> bool:
        return yes or ask(f"Upload them to {plan.destination}? Type yes:", draw_publication(plan))

    with show_upload() as on_progress:
        done = analysis.publish(
            src, dst, license=license_, gallery=gallery, codes=codes, run=run, store=store, overwrite=overwrite,
            dry_run=dry_run, confirm=confirm, on_progress=on_progress,
        )  # fmt: skip
    emit({**asdict(done), "bytes": done.n_bytes}, draw_publication(done))
    if not dry_run:
        show_note(f"{'Wrote' if done.written else 'Was there already:'} {done.address}")
        show_next("look", "IMAGE", "--sae", done.address)


@verb(FILES, "info val.acts")
def info(path: arguments.AnyPath) -> None:
    """Show what an artifact is and what it was made from."""
    facts = actcache.describe(path)
    emit(facts, draw_description(facts))
    show_next_of(path)


@verb(FILES, "verify val.acts")
def verify(
    path: arguments.AnyPath,
    repair: arguments.Repair = False,
    images: arguments.VerifyImages = None,
    model: arguments.VerifyModel = None,
    pretrained: arguments.VerifyPretrained = None,
    prompts: arguments.VerifyPrompts = None,
) -> None:
    """Compare every file with its checksum.

    The exit code is 1 if something is wrong.
    """
    if repair:
        from actcache.artifacts import remove_remnants

        remove_remnants(path)
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
        "shards": checked.shards, "remedies": checked.remedies,
    }  # fmt: skip
    state = "is whole" if checked.ok else "is damaged" if checked.problems else "is not complete, but undamaged so far"
    text = f"{path} {state}: {checked.n_files:,} files, {checked.n_bytes / 1e6:,.1f} MB checked"
    advice = []
    if checked.problems and not repair:
        advice = [f"  to repair it: {way}" for way in checked.remedies]
    emit(facts, [text, *(f"  {problem}" for problem in checked.problems), *advice])
    if not checked.ok:
        raise typer.Exit(1)


# ---------------------------------------------------------------------------------------------------------------------
# Reading flags


def say_site(site: Any, verb: str) -> str:
    """One line on a site."""
    (latents, n_latents), (images, n_images) = site.n_latents, site.n_images
    return (
        f"{verb} {site.n_files:,} files, {site.n_bytes / 1e6:.1f} MB: {latents:,} of {n_latents:,} latents, "
        f"{images:,} of {n_images:,} images"
    )


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
