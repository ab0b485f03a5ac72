"""The command line: one short function for each verb. It parses, calls the library and shows the result.

Results go to stdout; progress, the files that were written and hints go to stderr. Exit codes: 0 done, 1 one of our
errors (one line that says what to do), 2 wrong usage, 130 interrupted (the same command resumes). Importing this module
loads neither torch nor zarr nor dask.

The flags of a verb come from the fields of its configuration classes, and arguments are checked by what stands in their
annotations (`with_flags`), before the library is loaded.
"""

import itertools
import os
import signal
import threading

# Threads that wait for each other must not spin: beside two busy processes on two processors, 800 small products took
# 9.0 s and 13.0 s spinning and 0.8 s sleeping, and large ones take the same. OpenMP reads this when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Weights in huge pages: the first ten steps of a training take 1.17 times the later ones instead of 1.39, and gathering
# rows of the dictionary 0.85 of the time. torch reads this at its first large allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

if threading.current_thread() is threading.main_thread():  # Ctrl-C during the imports below is quiet
    _before = signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))

from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

import actcache
import analysis
import saetrain
from actcache.artifacts import remove_remnants
from actcache.errors import SettingsError
from actcache.options import JudgingConfig
from actcache.workers import find_worker
from analysis import arguments
from analysis.config import BenchmarkConfig, ModelOptions, StudyConfig
from analysis.terminal import (
    Program,
    announce,
    as_one_of_several,
    ask,
    describe_codes,
    describe_concepts,
    describe_import,
    describe_run,
    describe_store,
    draw_conversion,
    draw_description,
    draw_estimate,
    draw_facts,
    draw_look,
    draw_publication,
    draw_site,
    draw_table,
    emit,
    emit_answer,
    emit_artifact,
    emit_result,
    options,
    read_hook_point,
    read_values,
    repeat_flags,
    show_download,
    show_next,
    show_next_of,
    show_next_question,
    show_next_result,
    show_note,
    show_progress,
    show_source,
    show_steps,
    show_training,
    show_upload,
    show_warning,
    show_written,
    split_pair,
)

app = Program(
    "patchsae",
    help="Turn a folder of images and a CLIP vision transformer into measured concepts: "
    "extract, train, encode, analyze, query, report.",
)

PATH, LOOKING, MEASURING = "Pipeline", "Exploring", "Measuring"
ADAPTING, EXCHANGING, FILES = "Adapting", "Exchanging", "Files"
verb = app.verb


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
    show_next("explore", out / "scenes.concepts", why="to look around in a browser")


@verb(PATH, "extract photos val.acts --model ViT-B-16-quickgelu --pretrained openai --layer 10")
def extract(
    images: arguments.ImagesPath,
    store: arguments.NewStore,
    config: actcache.ExtractConfig,
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
        show_source(estimate)
        emit(estimate.to_json(), draw_estimate(estimate))
        raise typer.Exit(0 if estimate.fits else 1)
    source: dict[str, object] = {}
    with as_one_of_several("store", store), show_progress("extract", "images") as on_progress:
        opened = actcache.extract(
            images, store, config=config, batch_size=batch_size, device=device, n_threads=n_threads,
            on_error=on_error, overwrite=overwrite, on_progress=on_progress,
            on_plan=lambda plan: source.update(show_source(plan)),
        )  # fmt: skip
    emit_artifact(store, describe_store(store, opened) | source, [repr(opened)])


@verb(PATH, "train val.acts runs/l10 --layer 10 --n-latents 12288 --k 32")
def train(
    store: arguments.StorePaths,
    run: arguments.NewRun,
    sae: list[saetrain.SAEConfig],
    config: list[saetrain.TrainConfig],
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
    hook_points = [read_hook_point(number, site) for number in layer or (None,)]
    members = list(itertools.product(hook_points, sae, config))
    with show_training() as on_progress:
        how: dict[str, Any] = {
            "device": device, "log_every": log_every, "checkpoint_every": checkpoint_every, "overwrite": overwrite,
            "log_to": log_to, "wandb_project": wandb_project, "on_progress": on_progress,
        }  # fmt: skip
        if len(members) > 1:
            runs = saetrain.sweep(store, run, members, **how)
        else:
            where, network, training = members[0]
            runs = [saetrain.train(store, run, layer=where, sae=network, config=training, **how)]
    if find_worker().rank:
        return
    if len(members) == 1:
        emit_artifact(run, describe_run(runs[0]), [repr(runs[0])])
    else:
        emit({"runs": [describe_run(done) for done in runs]}, [repr(done) for done in runs])
        show_written(*(done.path for done in runs))
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
    with as_one_of_several("codes", codes), show_progress("encode", "images") as on_progress:
        opened = saetrain.encode(run, store, codes, device=device, overwrite=overwrite, on_progress=on_progress)
    emit_artifact(codes, describe_codes(opened), [repr(opened)])


@verb(PATH, "analyze val.codes val.concepts")
def analyze(
    codes: arguments.CodesPath,
    concepts: arguments.NewConcepts,
    config: analysis.AnalyzeConfig,
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
    notes = [f"  without {what}: {why}" for what, why in opened.left_out.items()]
    emit_artifact(concepts, describe_concepts(concepts, opened), [repr(opened), *notes])


@verb(LOOKING, "query val.codes --latent 907 --where \"split == 'test'\" --sheet 907.png")
def query(
    codes: arguments.CodesPath,
    question: analysis.Question,
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
    tower: analysis.TowerOptions,
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
    method: arguments.Method = ["images", "lens"],
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
    own = [("name", *split_pair("--set", pair)) for pair in set_] + [
        ("note", *split_pair("--note", pair)) for pair in note
    ]
    if own:
        for kind, latent, text in own:
            analysis.set_name(table, latent, **{kind: text})
        facts = {"concepts": str(concepts), "set": [latent for _, latent, _ in own]}
        emit(facts, [f"latent {latent}: {kind} {text!r}" for kind, latent, text in own])
    else:
        with show_progress("name", "images") as on_progress:
            names = analysis.name_latents(
                table, vocabulary=vocabulary, methods=method, template=template, codes=codes, run=run, store=store,
                images=images, with_=with_, **asdict(model), on_progress=on_progress,
            )  # fmt: skip
        order = names.sort_by([("alignment", "descending")])
        emit({"rows": names.to_pylist()}, draw_table(order.slice(0, 20).to_pylist()))
    show_written(concepts / "notes" / ("own.json" if own else "names.parquet"))
    show_next("report", concepts, concepts.with_suffix(".html"))


@verb(LOOKING, "report val.concepts report.html --result masks.json")
def report(concepts: arguments.ConceptsPath, out: arguments.ReportOut, results: arguments.Results = []) -> None:
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
    results: arguments.Results = [],
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
        results=results, model=model, browser=open_, on_ready=show,
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
    config: BenchmarkConfig,
    study: StudyConfig,
    model: ModelOptions,
    codes: arguments.BenchmarkCodes = [],
    table: arguments.BenchmarkTable = [],
    overwrite: arguments.Overwrite = False,
) -> None:
    """Measure what SAEs are worth, beside baselines.

    The baselines are an untrained SAE of each run, PCA, raw dimensions and k-means. All are judged on the same images,
    which no run has learned from, and differences are printed where their 95 % interval does not hold 0. The same
    command resumes after an interruption.
    """
    with show_steps("parts") as on_step:
        result = analysis.benchmark_runs(
            runs, store, out, config, codes=codes, study=study, model=model, overwrite=overwrite, on_step=on_step
        )
    for path in table:
        analysis.write_tables(result, path)
    emit_result(result, out, "benchmark", *runs, store)
    show_written(*table)


@verb(MEASURING, "intervene runs/l10 val.acts masks.json --chosen-on train.codes")
def intervene(
    run: arguments.RunPath,
    store: arguments.StorePath,
    config: analysis.MaskingConfig,
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
    config: analysis.DeletionConfig,
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
    config: analysis.SteerabilityConfig,
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
    config: analysis.RulesConfig,
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
    config: analysis.ProbingConfig,
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
    emit_answer(
        opened, result.tables()[0], out, names=analysis.find_names(opened), is_written=result_file is not None,
        notes=result.notes(), seen=[asdict(counted) for counted in result.seen or ()],
    )  # fmt: skip
    show_written(out)
    show_next_result(result_file, "localize", codes, "--out")


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
    config: actcache.PromptConfig,
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
    emit(adaptation.to_json(), [*draw_table(adaptation.rows()), *adaptation.notes()])
    show_written(prompts)
    same = repeat_flags(model=model, pretrained=pretrained, image_size=image_size, preprocess=preprocess)
    show_next("extract", images, prompts.with_suffix(".acts"), *same, "--prompts", prompts, "--layer", "LAYER")


@verb(ADAPTING, "compare val.concepts maple.concepts comparison.json")
def compare(
    base: arguments.Base,
    adapted: arguments.Adapted,
    out: arguments.CompareOut,
    config: analysis.ComparisonConfig,
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
    emit_artifact(dst, conversion.to_json(), draw_conversion(conversion))


@verb(EXCHANGING, "import layer10.npy val.acts --layer 10 --model-name my-vit --images photos")
def import_(
    acts: arguments.Acts,
    store: arguments.NewStore,
    config: actcache.ImportConfig,
    images: arguments.ImportImages = None,
    overwrite: arguments.Overwrite = False,
) -> None:
    """Turn activations that another program has made into a store.

    ACTS is a file (.npy, .pt or .safetensors) of images x tokens x channels or images x channels, several of them in
    their order, a folder of them, or saev's folder. With --n-tokens, rows are tokens, as in ViT-Prisma's caches. The
    same command resumes after an interruption.
    """
    with as_one_of_several("store", store), show_progress("import", "images") as on_progress:
        opened = actcache.import_activations(
            acts, store, config=config, images=images, overwrite=overwrite, on_progress=on_progress
        )
    facts = describe_import(store, opened)
    emit_artifact(store, facts, draw_facts(facts))


@verb(EXCHANGING, "publish val.concepts hf://me/clip-saes --license mit --dry-run")
def publish(
    src: arguments.PublishSrc,
    dst: arguments.PublishDst = None,
    site_folder: arguments.SiteFolder = None,
    license_: arguments.License = None,
    gallery: arguments.Gallery = False,
    codes: arguments.MovedCodes = None,
    run: arguments.MovedRun = None,
    store: arguments.AnyMovedStore = None,
    images: arguments.MovedImages = None,
    compare: arguments.Compare = None,
    results: arguments.Results = [],
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
    if (dst is None) == (site_folder is None):
        raise typer.BadParameter("Give DST, where the SAE is published, or --site FOLDER for a web page, one of them.")
    if site_folder is not None:
        if license_ is not None or gallery or yes:
            raise typer.BadParameter("--license, --gallery and --yes do not go with --site. Leave them out.")
        with show_progress("site", "records") as on_progress:
            made = analysis.write_site(
                src, site_folder, codes=codes, run=run, store=store, images=images, compare=compare, results=results,
                overwrite=overwrite, dry_run=dry_run, on_plan=lambda plan: show_note(draw_site(plan, "Will hold")),
                on_progress=on_progress,
            )  # fmt: skip
        emit(asdict(made), [draw_site(made, "Holds"), *made.left_out])
        if made.written:
            show_written(site_folder)
            show_note(f"Next: python3 -m http.server --directory {site_folder}")
        elif not dry_run:
            show_note(f"Was there already: {site_folder}")
        return
    if images is not None or compare is not None or results:
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
        remove_remnants(path)
    with show_progress("verify", "bytes") as on_progress:
        checked = actcache.verify(path, on_progress=on_progress)
    if repair and not checked.ok:
        with show_progress("repair", "images") as on_progress:
            checked = actcache.repair(
                path, images=images, model=model, pretrained=pretrained, prompts=prompts, on_progress=on_progress
            )
    advice = [f"  to repair it: {way}" for way in checked.remedies if not repair]
    lines = [f"{path} {checked}", *(f"  {problem}" for problem in checked.problems), *advice]
    emit({**checked.to_json(), "path": path}, lines)
    raise typer.Exit(0 if checked.ok else 1)


if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, _before)

if __name__ == "__main__":
    app()
