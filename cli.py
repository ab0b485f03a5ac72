"""The command line: one short function a verb. Parse, import what the verb needs, call the library, show.

Results go to stdout, progress to stderr. Exit: 0 done, 1 an error of ours (one line and what to do), 2 usage,
130 interrupted (the same command resumes). Importing this loads neither torch nor zarr nor dask.
"""

import itertools
import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table
from typer import Argument, Option
from typer.core import TyperGroup

from actcache.errors import PipelineError
from actcache.prompts import PromptConfig
from saetrain.config import SAEConfig, TrainConfig


class Verbs(TyperGroup):
    """Turns our errors into one line, says after an interrupt how to go on, and takes the global flags anywhere."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = args[: args.index("--")] if "--" in args else args
        first = [arg for arg in own if arg in ("--json", "--quiet", "-q", "--traceback")]
        return super().parse_args(ctx, [*first, *(arg for arg in own if arg not in first), *args[len(own) :]])

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PipelineError as error:
            if options.traceback:
                raise
            stderr.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as interrupt:
            stderr.print("interrupted; the same command resumes")
            raise typer.Exit(130) from interrupt


app = typer.Typer(
    name="patchsae",
    cls=Verbs,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="From a folder of images and a CLIP vision transformer to measured concepts: "
    "extract, train, encode, analyze, query, report.",
)
stdout, stderr = Console(), Console(stderr=True)


@dataclass
class Options:
    """The global flags."""

    quiet: bool = False
    json: bool = False
    traceback: bool = False


options = Options()


@app.callback()
def main(
    quiet: Annotated[bool, Option("--quiet", "-q", help="No progress bars.")] = False,
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
# Verbs

# What several verbs take.
ImagesPath = Annotated[
    Path,
    Argument(metavar="IMAGES", help="A folder, a CSV or Parquet table of paths, tars, or a Hugging Face dataset."),
]
StorePath = Annotated[str, Argument(metavar="STORE", help="Activations: val.acts, or s3://bucket/val.acts.")]
StorePaths = Annotated[list[str], Argument(metavar="STORE...", help="Activations: val.acts; several of one model.")]
RunPath = Annotated[Path, Argument(metavar="RUN", help="A trained SAE, e.g. runs/l10.")]
CodesPath = Annotated[Path, Argument(metavar="CODES", help="Sparse codes, e.g. val.codes.")]
ConceptsPath = Annotated[Path, Argument(metavar="CONCEPTS", help="Concept statistics, e.g. val.concepts.")]
AnyPath = Annotated[str, Argument(metavar="PATH", help="Any artifact.")]
ResultPath = Annotated[Path | None, Argument(metavar="[OUT]", help="A JSON file for the result.")]
TablePath = Annotated[Path | None, Option(help="Write the answer as .csv or .parquet too.")]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace what is there.")]

Device = Annotated[str, Option(help="auto, cpu, cuda, cuda:1 ... Speed only.")]
BatchImages = Annotated[int, Option(help="Images a forward pass. Speed only.")]
Workers = Annotated[int | None, Option(help="Run dask in so many processes here. Speed only.")]
Scheduler = Annotated[str | None, Option(help="Run on this dask scheduler, e.g. tcp://10.0.0.1:8786. Speed only.")]
CheckpointEvery = Annotated[int, Option(help="Steps between checkpoints.")]

Model = Annotated[str, Option(help="An open_clip architecture, or the path of its config JSON.")]
Pretrained = Annotated[str, Option(help="A tag of it, a checkpoint file, or random:SEED.")]
StoreModel = Annotated[str | None, Option(help="The architecture the store was extracted with, if it moved.")]
StorePretrained = Annotated[str | None, Option(help="Its weights, if they moved.")]
MovedImages = Annotated[Path | None, Option(help="Where the images are, if they moved.")]
MovedStore = Annotated[Path | None, Option(help="The activation store, if it moved.")]
MovedRun = Annotated[Path | None, Option(help="The run, if it moved.")]

Where = Annotated[str | None, Option(help="Images to look at, by columns of images.parquet: \"split == 'test'\".")]
Limit = Annotated[int | None, Option(help="Look at a random sample of so many images.")]
Seed = Annotated[int, Option(help="Of samples, halves and random latents.")]
Templates = Annotated[
    str, Option(help="photo, simple (7), openai (80), a text with {} for the class, or a file of them.")
]
ReplacedTokens = Annotated[
    str | None, Option(help="What is replaced: all, patch or cls; as RUN was trained, by default.")
]
KeepError = Annotated[bool, Option("--keep-error", help="Add what the SAE does not explain.")]
Vocabulary = Annotated[Path | None, Option(help="A word or phrase a line; by default general words.")]
Tau = Annotated[float, Option(help="A token counts for its class above this activation.")]
Draws = Annotated[int, Option(help="Draws of random latents as frequent as the chosen.")]

N_GRID = [1, 2, 5, 10, 20, 50, 100, 200]
STRENGTHS = [10.0, 50.0, 150.0]
K_GRID = [1, 2, 5, 10, 50, 100, 500, 1000, 2000]


@app.command(epilog="Example: patchsae quickstart quickstart")
def quickstart(
    out: Annotated[Path, Argument(metavar="[OUT]", help="Where everything is written.")] = Path("quickstart"),
    n_images: Annotated[int, Option(help="Images to generate.")] = 2000,
    seed: Annotated[int, Option(help="Of images, order and training.")] = 0,
) -> None:
    """The whole path on the embedded demo: generated images, a tiny CLIP, known concepts. Under three minutes."""
    from analysis import quickstart as run_quickstart

    with steps() as show:
        result = run_quickstart(out, n_images=n_images, seed=seed, on_step=show)
    emit(result.to_json(), "\n".join(result.lines()))


@app.command(
    epilog="Example: patchsae extract photos val.acts --model ViT-B-16-quickgelu --pretrained openai --layer 10"
)
def extract(
    images: ImagesPath,
    store: StorePath,
    model: Model,
    pretrained: Pretrained,
    layer: Annotated[list[int], Option(help="0-based block index; repeat for several.")],
    site: Annotated[
        list[str], Option(help="Place in the block: resid_post, resid_mid, attn_out, mlp_out; repeat for several.")
    ] = ["resid_post"],
    prompts: Annotated[Path | None, Option(help="Of an adapted model: by adapt, or an original checkpoint.")] = None,
    dtype: Annotated[str, Option(help="What is stored: float16 or float32.")] = "float16",
    precision: Annotated[str, Option(help="What is computed: auto, float32, bfloat16 (not the stream).")] = "auto",
    codec: Annotated[str, Option(help="raw or zstd (lossless).")] = "raw",
    shard_images: Annotated[int | None, Option(help="Images a shard, a multiple of 16.")] = None,
    limit: Annotated[int | None, Option(help="Take a random sample of so many images.")] = None,
    seed: Annotated[int, Option(help="Of the stored order.")] = 0,
    not_in: Annotated[list[str], Option(help="Leave out the images of this store; repeat for several.")] = [],
    masks: Annotated[Path | None, Option(help="A folder of PNG masks, named as the images.")] = None,
    batch_size: BatchImages = 32,
    device: Device = "auto",
    n_threads: Annotated[int | None, Option(help="Decoding threads. Speed only.")] = None,
    compile: Annotated[bool, Option("--compile", help="Compile the tower. Speed, and the lowest bits.")] = False,
    on_error: Annotated[str, Option(help="An unreadable image: stop, or skip (its row stays, marked).")] = "stop",
    dry_run: Annotated[bool, Option("--dry-run", help="Only say what would be written, and how long.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Run the image tower once and keep every patch's activation. The same command resumes.

    Under torchrun or srun every process takes its own shards.
    """
    from actcache import IncompleteError, estimate
    from actcache import extract as run_extract

    chosen: dict[str, Any] = {
        "model": model, "pretrained": pretrained, "layers": layer, "sites": site, "prompts": prompts, "dtype": dtype,
        "precision": precision, "codec": codec, "shard_images": shard_images, "limit": limit, "seed": seed,
        "not_in": not_in, "masks": masks, "batch_size": batch_size, "device": device, "compile": compile,
    }  # fmt: skip
    if dry_run:
        plan = estimate(images, store, **chosen)
        emit({**asdict(plan), "fits": plan.fits}, draw_estimate(plan))
        if not plan.fits:
            raise typer.Exit(1)
        return
    with progress("extract", "images") as report:
        try:
            opened = run_extract(
                images, store, **chosen, n_threads=n_threads, on_error=on_error, overwrite=overwrite, on_progress=report
            )
        except IncompleteError as unfinished:  # one of several workers: its own part is done
            emit({"store": store, "complete": False, "message": str(unfinished)}, str(unfinished))
            return
    failed = [f"  skipped: {reason}" for reason in opened.failed.values()]
    emit({"store": store, "store_id": opened.store_id}, "\n".join([repr(opened), *failed]))


@app.command(
    epilog="Example: patchsae adapt photos maple.prompts --model ViT-B-16-quickgelu --pretrained openai --method maple"
)
def adapt(
    images: ImagesPath,
    prompts: Annotated[Path, Argument(metavar="PROMPTS", help="What is written, e.g. maple.prompts.")],
    model: Model,
    pretrained: Pretrained,
    method: Annotated[str, Option(help="coop, cocoop, vpt, ivlp or maple.")] = PromptConfig.method,
    shots: Annotated[int, Option(help="Images a class.")] = PromptConfig.shots,
    classes: Annotated[str, Option(help="all, base (first half of the sorted names) or novel.")] = PromptConfig.classes,
    test: Annotated[Path | None, Option(help="Images to measure on; by default those that are no shots.")] = None,
    template: Annotated[
        str, Option(help="The text around a class name; its first words are where prompts begin.")
    ] = PromptConfig.template,
    n_prompts: Annotated[int | None, Option(help="Prompt tokens; the method's usual number.")] = None,
    depth: Annotated[int | None, Option(help="Blocks with their own prompts; 1: shallow. The method's usual.")] = None,
    position: Annotated[
        str, Option(help="With coop: the class name at the end, middle or front.")
    ] = PromptConfig.position,
    class_specific: Annotated[bool, Option("--class-specific", help="With coop: prompts of each class.")] = False,
    n_epochs: Annotated[int | None, Option(help="Passes over the shots; the method's usual number.")] = None,
    batch_size: Annotated[int | None, Option(help="Images an update; the method's usual number.")] = None,
    lr: Annotated[float | None, Option(help="Of SGD; the method's usual rate.")] = None,
    augment: Annotated[bool | None, Option(help="Random crops and flips; by default for vpt, ivlp, maple.")] = None,
    seed: Annotated[int, Option(help="Of shots, first values and order.")] = PromptConfig.seed,
    precision: Annotated[str, Option(help="auto, float32 or bfloat16 (branches).")] = "auto",
    device: Device = "auto",
    checkpoint_every: CheckpointEvery = 200,
    overwrite: Overwrite = False,
) -> None:
    """Train prompts on a few images a class, CLIP frozen, and say what they gain. The same command resumes."""
    from actcache import adapt as run_adapt

    config = PromptConfig(
        method=method, n_prompts=n_prompts, depth=depth, position=position, class_specific=class_specific, shots=shots,
        classes=classes, template=template, n_epochs=n_epochs, batch_size=batch_size, lr=lr, augment=augment, seed=seed,
    )  # fmt: skip
    with progress("adapt", "steps") as report:
        made = run_adapt(
            images, prompts, model=model, pretrained=pretrained, config=config, test=test, precision=precision,
            device=device, checkpoint_every=checkpoint_every, overwrite=overwrite, on_progress=report,
        )  # fmt: skip
    rows = [
        {"classes": name, **{how: made.accuracy[how][name] for how in ("zero_shot", "adapted")}}
        for name in ("all", "base", "novel", "harmonic")
    ]
    emit(
        {"prompts": str(prompts), "prompts_id": made.artifact.id, "accuracy": made.accuracy},
        draw_table([row for row in rows if row["zero_shot"] is not None]),
    )


@app.command(epilog="Example: patchsae train val.acts runs/l10 --layer 10 --n-latents 12288 --k 32")
def train(
    store: StorePaths,
    run: RunPath,
    layer: Annotated[list[int] | None, Option(help="Which hook point, where the store holds several.")] = None,
    site: Annotated[str | None, Option(help="Which site of that layer, where the store holds several.")] = None,
    variant: Annotated[list[str], Option(help="topk, batchtopk, relu (PatchSAE), jumprelu or gated.")] = [
        SAEConfig.variant
    ],
    n_latents: Annotated[list[int] | None, Option(help="Dictionary size; 16 x the model's width.")] = None,
    k: Annotated[list[int], Option(help="Active latents a token; with batchtopk on average.")] = [SAEConfig.k],
    prefixes: Annotated[str | None, Option(help="Nested dictionaries, as shares: 1/8,1/4,1/2,1. For top-k.")] = None,
    l1: Annotated[list[float] | None, Option(help="Weight of the penalty (relu, gated, jumprelu).")] = None,
    target_l0: Annotated[list[float] | None, Option(help="Active latents the penalty aims at (not top-k).")] = None,
    penalty: Annotated[str, Option(help="Of jumprelu: quadratic or tanh.")] = SAEConfig.penalty,
    bandwidth: Annotated[float, Option(help="Window around jumprelu's thresholds.")] = SAEConfig.bandwidth,
    normalize: Annotated[str | None, Option(help="center, or none, the default for relu.")] = SAEConfig.normalize,
    n_steps: Annotated[int, Option(help="Updates.")] = TrainConfig.n_steps,
    batch_size: Annotated[int, Option(help="Tokens an update.")] = TrainConfig.batch_size,
    lr: Annotated[list[float] | None, Option(help="Peak learning rate; derived from n_latents.")] = None,
    warmup_steps: Annotated[
        int | None, Option(help="Linear warm-up; 500, or a tenth of a short run.")
    ] = TrainConfig.warmup_steps,
    decay_fraction: Annotated[
        float, Option(help="Linear decay over the last share of the steps.")
    ] = TrainConfig.decay_fraction,
    aux: Annotated[float | None, Option(help="Weight of AuxK, against dead latents; 1/32, relu 0.")] = TrainConfig.aux,
    ghost: Annotated[bool | None, Option(help="Ghost gradients, not AuxK; by default for relu.")] = TrainConfig.ghost,
    resample_every: Annotated[
        int, Option(help="Steps between replacements of dead latents by tokens; 0: never.")
    ] = TrainConfig.resample_every,
    dead_tokens: Annotated[int, Option(help="A latent silent for so many tokens is dead.")] = TrainConfig.dead_tokens,
    clip_norm: Annotated[float | None, Option(help="Gradient norm limit; 1, relu 0: none.")] = TrainConfig.clip_norm,
    tokens: Annotated[str, Option(help="all, patch or cls.")] = TrainConfig.tokens,
    pool_tokens: Annotated[int, Option(help="Tokens shuffled at once, in memory.")] = TrainConfig.pool_tokens,
    n_streams: Annotated[int, Option(help="Virtual streams a batch is drawn from.")] = TrainConfig.n_streams,
    init: Annotated[str, Option(help="First dictionary: random, or data (of tokens).")] = TrainConfig.init,
    where: Annotated[
        str | None, Option(help='Images to train on, by columns of images.parquet: "label < 10".')
    ] = TrainConfig.where,
    precision: Annotated[
        str | None, Option(help="Matmuls in float32 or bfloat16; by default what the hardware has.")
    ] = TrainConfig.precision,
    seed: Annotated[list[int], Option(help="Of initial weights and order.")] = [TrainConfig.seed],
    device: Device = "auto",
    log_every: Annotated[int, Option(help="Steps between lines of metrics.jsonl.")] = 50,
    checkpoint_every: CheckpointEvery = 1000,
    log_to: Annotated[list[str], Option(help="Show metrics in tensorboard or wandb too; repeat for both.")] = [],
    wandb_project: Annotated[str | None, Option(help="Of wandb; by default what WANDB_PROJECT says.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Train a sparse autoencoder on cached activations. No model is needed. The same command resumes.

    --layer, --variant, --n-latents, --k, --l1, --target-l0, --lr and --seed may be given several times: all
    combinations are trained on one stream, and RUN is a folder of runs.
    """
    from actcache.workers import find_worker
    from saetrain import sweep
    from saetrain import train as run_train

    if find_worker().rank:  # the first process shows what all of them do
        options.quiet = True

    members = [
        (
            hook_point(one_layer, site),
            SAEConfig(
                variant=one_variant, n_latents=size, k=one_k, l1=one_l1, target_l0=one_target, penalty=penalty,
                bandwidth=bandwidth, normalize=normalize, prefixes=read_shares(prefixes),
            ),
            TrainConfig(
                n_steps=n_steps, batch_size=batch_size, lr=one_lr, warmup_steps=warmup_steps,
                decay_fraction=decay_fraction, aux=aux, ghost=ghost, resample_every=resample_every,
                dead_tokens=dead_tokens, clip_norm=clip_norm, tokens=tokens, pool_tokens=pool_tokens,
                n_streams=n_streams, init=init, where=where, precision=precision, seed=one_seed,
            ),
        )
        for one_layer, one_variant, size, one_k, one_l1, one_target, one_lr, one_seed in itertools.product(
            *([*(values or [None])] for values in (layer, variant, n_latents, k, l1, target_l0, lr, seed))
        )
    ]  # fmt: skip
    with progress("train", "steps") as report:

        def show(step: int, total: int, metrics: dict[str, Any]) -> None:
            note = "fvu {fvu:.3f} l0 {l0:.1f} dead {dead:.1%} {tokens_per_s:,.0f} tokens/s".format(**metrics)
            report(step, total, note)

        speed: dict[str, Any] = {
            "device": device, "log_every": log_every, "checkpoint_every": checkpoint_every, "overwrite": overwrite,
            "log_to": log_to, "wandb_project": wandb_project,
        }  # fmt: skip
        if len(members) > 1:
            runs = sweep(store, run, members, **speed, on_progress=show)
        else:
            one_layer, sae, config = members[0]
            runs = [run_train(store, run, layer=one_layer, sae=sae, config=config, **speed, on_progress=show)]
    facts = [{"run": str(one.path), "run_id": one.run_id, "quality": one.quality} for one in runs]
    if not find_worker().rank:
        emit(facts[0] if len(members) == 1 else {"runs": facts}, "\n".join(map(repr, runs)))


@app.command(epilog="Example: patchsae encode runs/l10 val.acts val.codes")
def encode(
    run: RunPath, store: StorePaths, codes: CodesPath, device: Device = "auto", overwrite: Overwrite = False
) -> None:
    """Turn activations into sparse codes. The same command resumes.

    Under torchrun or srun every process takes its own shards.
    """
    from saetrain import encode as run_encode

    with progress("encode", "images") as report:
        opened = run_encode(run, store, codes, device=device, overwrite=overwrite, on_progress=report)
    emit({"codes": str(codes), "codes_id": opened.codes_id, "n_entries": opened.n_entries}, repr(opened))


@app.command(epilog="Example: patchsae convert runs/l10 l10-saelens --to saelens --store val.acts")
def convert(
    src: Annotated[Path, Argument(metavar="SRC", help="A run, or another package's checkpoint.")],
    dst: Annotated[Path, Argument(metavar="DST", help="A folder of that package, or a run.")],
    to: Annotated[str | None, Option(help="saelens, dictionary_learning, sparsify, saev, prisma, patchsae.")] = None,
    store: Annotated[str | None, Option(help="Activations to compare on; a checkpoint needs them.")] = None,
    layer: Annotated[int | None, Option(help="Which hook point, where the store holds several.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a run for another package, or read a checkpoint of one, and report how well the two agree."""
    from saetrain import convert as run_convert

    made = run_convert(src, dst, to=to, store=store, layer=layer, overwrite=overwrite)
    facts = asdict(made.parity)
    rounded = {name: f"{value:.3g}" if isinstance(value, float) else value for name, value in facts.items()}
    emit(
        {"path": str(made.path), "format": made.format, "parity": facts},
        draw_facts({"written": str(made.path), "format": made.format, **rounded}),
    )


@app.command(epilog="Example: patchsae inspect runs/seed0 runs/seed1 --store val.acts")
def inspect(
    runs: Annotated[list[Path], Argument(metavar="RUN...", help="Trained SAEs, or folders of them.")],
    store: Annotated[list[str], Option(help="Activations of their model; repeat for several stores.")],
    n_tokens: Annotated[int, Option(help="Tokens, not trained on, that are coded by pursuit.")] = 2048,
    seed: Annotated[int, Option(help="Of the sample of tokens.")] = 0,
    truth: Annotated[Path | None, Option(help="A known dictionary [N, D] to match with, as .npy.")] = None,
    out: Annotated[Path | None, Option(help="A JSON file for the result.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Measure dictionaries: amortization gap, coherence, and how well the latents of two runs match."""
    from analysis import inspect_dictionaries

    with progress("inspect", "runs and pairs") as report:
        found = inspect_dictionaries(
            runs, store, out, n_tokens=n_tokens, seed=seed, truth=truth, overwrite=overwrite, on_progress=report
        )
    emit_result(found)


@app.command(epilog="Example: patchsae analyze val.codes val.concepts")
def analyze(
    codes: CodesPath,
    concepts: ConceptsPath,
    n_top: Annotated[int, Option(help="Images kept a latent.")] = 16,
    score: Annotated[str, Option(help="What orders them: mean over tokens (PatchSAE), or max.")] = "mean",
    tau: Tau = 0.2,
    n_gallery: Annotated[int, Option(help="Latents whose pictures are kept.")] = 100,
    images: MovedImages = None,
    store: MovedStore = None,
    run: MovedRun = None,
    embeddings: Annotated[str | None, Option(help="For monosemanticity: clip (the store's), or an .npy file.")] = None,
    device: Device = "auto",
    n_workers: Workers = None,
    scheduler: Scheduler = None,
    overwrite: Overwrite = False,
) -> None:
    """Compute every latent's statistics, class counts and top images, by dask: on threads, or in processes."""
    from analysis import analyze as run_analyze

    with progress("analyze", "tasks") as report:
        opened = run_analyze(
            codes, concepts, n_top=n_top, score=score, tau=tau, n_gallery=n_gallery, images=images, store=store,
            run=run, embeddings=embeddings, device=device, n_workers=n_workers, scheduler=scheduler,
            overwrite=overwrite, on_progress=report,
        )  # fmt: skip
    facts = {"concepts": str(concepts), "concepts_id": opened.artifact.id, **opened.summary_numbers()}
    notes = [f"  without {what}: {why}" for what, why in opened.left_out.items()]
    emit({**facts, "left_out": opened.left_out}, "\n".join([repr(opened), *notes]))


@app.command(epilog="Example: patchsae query val.codes --latent 907 --where \"split == 'test'\" --sheet 907.png")
def query(
    codes: CodesPath,
    latent: Annotated[int | None, Option(help="Images a latent fires on most.")] = None,
    show: Annotated[str | None, Option(help="With --latent: patches, counter-examples or co-firing.")] = None,
    sample: Annotated[int | None, Option(help="Co-firing of all latents, over so many random tokens.", min=1)] = None,
    seed: Annotated[int | None, Option(help="Of that sample; 0.")] = None,
    image: Annotated[list[str], Option(help="Latents of an image (position or uri); of two, what they share.")] = [],
    at: Annotated[str | None, Option(help="With --image, a patch or region: ROW,COLUMN or 0:3,2:5.")] = None,
    label: Annotated[str | None, Option("--class", help="Strongest latents of a class.")] = None,
    group: Annotated[str | None, Option(help="Latents that tell these images from others; as --where.")] = None,
    versus: Annotated[str | None, Option(help="With --group: which others.")] = None,
    fires: Annotated[str | None, Option(help="Images on which all of these latents fire: 12,57.")] = None,
    silent: Annotated[str | None, Option(help="Images on which none of these latents fires: 3.")] = None,
    where: Where = None,
    score: Annotated[str | None, Option(help="What orders images: mean over tokens (the default), or max.")] = None,
    tau: Annotated[float | None, Option(help="A token counts above this activation; 0.2.")] = None,
    n_top: Annotated[int, Option(help="Rows of the answer.", min=1)] = 10,
    names: Annotated[Path | None, Option(help="Concepts of these codes, for the names of their latents.")] = None,
    out: TablePath = None,
    sheet: Annotated[Path | None, Option(help="Write a contact sheet with heat maps, a PNG.")] = None,
    images: MovedImages = None,
    store: MovedStore = None,
    n_workers: Workers = None,
    scheduler: Scheduler = None,
) -> None:
    """Ask codes: images of a latent, latents of images, groups, conditions; --where alone: latents of a selection."""
    from analysis import add_names, find_image, find_images, open_scheduler, parse_latents
    from saetrain import CodeStore

    asked = {
        "latent": latent, "show": show, "sample": sample, "seed": seed, "image": image or None, "at": at,
        "class": label, "group": group, "versus": versus, "fires": fires, "silent": silent, "where": where,
        "score": score, "tau": tau,
    }  # fmt: skip
    asked = {name: value for name, value in asked.items() if value is not None}
    subject = check_question(asked)
    if subject == "sample" and sheet is not None:
        raise typer.BadParameter("--sheet does not go with --sample")
    opened = CodeStore.open(codes)
    if store is not None:
        find_images(opened, store=store)
    with open_scheduler(n_workers, scheduler):
        table = answer(opened, subject, asked, n_top)
    if names is not None:
        table = add_names(table, opened, names)
    drawn = {}
    if sheet is not None:
        from analysis import draw_sheet  # PIL

        latents = [latent] if latent is not None and show != "co-firing" else parse_latents(fires, "--fires")
        positions = [find_image(opened, one) for one in image]
        draw_sheet(opened, table, sheet, latents=latents, images=positions, where=where, folder=images, store=store)
        drawn["sheet"] = str(sheet)
    emit_answer(opened, table, out, n_shown=20 if subject == "sample" else None, **drawn)


QUESTIONS = {
    "latent": {"show", "where", "score"}, "sample": {"show", "seed"}, "image": {"at"}, "class": {"where", "tau"},
    "group": {"versus", "where", "score"}, "fires": {"silent", "where"}, "silent": {"where"}, "where": {"tau"},
}  # fmt: skip
"""What can be asked about, and the flags each question understands; the first that is given is the question."""

SHOW = {"images": {"where", "score"}, "patches": {"where"}, "counter-examples": {"where"}, "co-firing": set()}
"""The same for what --show can say of a latent."""


def check_question(asked: dict[str, Any]) -> str:
    """What is asked about. Exit 2 where it is nothing, or where a flag does not go with it."""
    subject = next((name for name in QUESTIONS if name in asked), None)
    if subject is None:
        raise typer.BadParameter(
            "ask one thing: --latent, --sample, --image, --class, --group, --fires, --silent or --where"
        )
    if asked.get("show", "images") not in SHOW:
        raise typer.BadParameter(f"--show must be one of {', '.join(SHOW)}")
    if subject == "sample" and asked.get("show", "co-firing") != "co-firing":
        raise typer.BadParameter("--sample shows co-firing")
    known = SHOW[asked["show"]] | {"show"} if subject == "latent" and "show" in asked else QUESTIONS[subject]
    wrong = sorted(asked.keys() - {subject} - known)
    if wrong:
        raise typer.BadParameter(f"--{wrong[0]} does not go with --{subject} {asked.get('show', '')}".rstrip())
    if len(asked.get("image", [])) > (1 if "at" in asked else 2):
        raise typer.BadParameter("--image may be given twice, with --at once")
    return subject


def answer(codes: Any, subject: str, asked: dict[str, Any], n_top: int) -> Any:
    """The table that answers a question."""
    import analysis

    given: dict[str, Any] = {name: asked[name] for name in ("where", "score", "tau") if name in asked}
    given["n_top"] = n_top
    match subject:
        case "latent":
            ask = {
                "images": analysis.query_latent, "patches": analysis.query_patches,
                "counter-examples": analysis.query_counter_examples, "co-firing": analysis.query_co_firing,
            }[asked.get("show", "images")]  # fmt: skip
            return ask(codes, asked["latent"], **given)
        case "sample":
            order = [("jaccard", "descending"), ("n_tokens", "descending"), ("latent", "ascending")]
            return analysis.sample_partners(
                codes, n_tokens=asked["sample"], seed=asked.get("seed", 0), n_partners=n_top
            ).sort_by(order)
        case "image" if len(asked["image"]) == 2:
            return analysis.query_images(codes, *asked["image"], **given)
        case "image":
            at = analysis.parse_at(asked["at"]) if "at" in asked else None
            return analysis.query_image(codes, asked["image"][0], at=at, **given)
        case "class":
            return analysis.query_class(codes, asked["class"], **given)
        case "group":
            return analysis.query_groups(codes, asked["group"], asked.get("versus"), **given)
        case "fires" | "silent":
            lists = [analysis.parse_latents(asked.get(name), f"--{name}") for name in ("fires", "silent")]
            return analysis.query_firing(codes, *lists, **given)
        case _:
            return analysis.query_selection(codes, given.pop("where"), **given)


@app.command(epilog="Example: patchsae evaluate runs/l10 val.acts fidelity.json --templates openai")
def evaluate(
    run: RunPath,
    store: StorePath,
    out: ResultPath = None,
    templates: Templates = "photo",
    tokens: ReplacedTokens = None,
    where: Where = None,
    limit: Limit = None,
    seed: Seed = 0,
    model: StoreModel = None,
    pretrained: StorePretrained = None,
    batch_size: BatchImages = 64,
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Zero-shot accuracy and loss with the SAE in place of the activations it reads, beside ablations.

    RUN may be a folder of runs (a sweep). Of the store a run was trained on, and of the same images extracted anew,
    only the held-out ones are looked at.
    """
    from analysis import ModelOptions, StudyConfig, evaluate_fidelity

    study = StudyConfig(templates=templates, tokens=tokens, where=where, limit=limit, seed=seed)
    engine = ModelOptions(model=model, pretrained=pretrained, batch_size=batch_size, device=device)
    with progress("evaluate", "images") as report:
        found = evaluate_fidelity(run, store, out, study=study, model=engine, overwrite=overwrite, on_progress=report)
    emit_result(found)


@app.command(epilog="Example: patchsae intervene runs/l10 val.acts masks.json --chosen-on train.codes")
def intervene(
    run: RunPath,
    store: StorePath,
    out: ResultPath = None,
    k: Annotated[list[int], Option(help="How many latents are kept, or dropped; repeat for several.")] = K_GRID,
    latents: Annotated[list[int], Option("--latent", help="Keep or drop these instead; repeat for several.")] = [],
    set_: Annotated[list[str], Option("--set", help="Instead, hold a latent at a value on every token: 907=5.")] = [],
    add: Annotated[list[str], Option(help="Instead, raise (or lower) a latent by a value: 907=-2.")] = [],
    keep_error: KeepError = False,
    n_random: Draws = 3,
    chosen_on: Annotated[Path | None, Option(help="Codes of other images, to choose latents on.")] = None,
    chosen_where: Annotated[str | None, Option(help="Images to choose on: \"split == 'train'\".")] = None,
    tau: Tau = 0.2,
    templates: Templates = "photo",
    tokens: ReplacedTokens = None,
    where: Where = None,
    limit: Limit = None,
    seed: Seed = 0,
    model: StoreModel = None,
    pretrained: StorePretrained = None,
    batch_size: BatchImages = 64,
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """What the classifier does with some latents only, or without them: the masking curve with its controls.

    Latents are chosen on other images than they are judged on. Without --chosen-on and --chosen-where: of the store RUN
    was trained on, chosen on its training images and judged on the held-out ones; of another, on halves of each class.
    """
    from analysis import MaskingConfig, ModelOptions, StudyConfig, mask_latents, set_latents

    study = StudyConfig(templates=templates, tokens=tokens, where=where, limit=limit, seed=seed)
    engine = ModelOptions(model=model, pretrained=pretrained, batch_size=batch_size, device=device)
    if set_ or add:
        fixed, raised = (read_values(*pairs) for pairs in (("--set", set_), ("--add", add)))
        with progress("intervene", "images") as report:
            moved = set_latents(
                run, store, out, set=fixed, add=raised, keep_error=keep_error, study=study, model=engine,
                overwrite=overwrite, on_progress=report,
            )  # fmt: skip
        emit_result(moved)
        return
    config = MaskingConfig(
        k=tuple(k), latents=tuple(latents), keep_error=keep_error, n_random=n_random, tau=tau, chosen_where=chosen_where
    )
    with progress("intervene", "images") as report:
        found = mask_latents(
            run, store, out, config, chosen_on=chosen_on, study=study, model=engine, overwrite=overwrite,
            on_progress=report,
        )  # fmt: skip
    emit_result(found)


@app.command(epilog="Example: patchsae attribute runs/l10 val.acts deletion.json")
def attribute(
    run: RunPath,
    store: StorePath,
    out: ResultPath = None,
    n: Annotated[list[int], Option(help="How many latents are deleted; repeat for several.")] = N_GRID,
    keep_error: KeepError = False,
    templates: Templates = "photo",
    tokens: ReplacedTokens = None,
    where: Where = None,
    limit: Limit = None,
    seed: Seed = 0,
    model: StoreModel = None,
    pretrained: StorePretrained = None,
    batch_size: BatchImages = 64,
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Which latents decisions rest on (value times gradient), tested by deleting them, beside other ways to choose."""
    from analysis import DeletionConfig, ModelOptions, StudyConfig, delete_latents

    study = StudyConfig(templates=templates, tokens=tokens, where=where, limit=limit, seed=seed)
    engine = ModelOptions(model=model, pretrained=pretrained, batch_size=batch_size, device=device)
    with progress("attribute", "images") as report:
        found = delete_latents(
            run, store, out, DeletionConfig(tuple(n), keep_error), study=study, model=engine, overwrite=overwrite,
            on_progress=report,
        )  # fmt: skip
    emit_result(found)


@app.command(epilog="Example: patchsae steer runs/l10 val.acts steerability.json --strength 50")
def steer(
    run: RunPath,
    store: StorePath,
    out: ResultPath = None,
    latents: Annotated[list[int], Option("--latent", help="These, instead of a sample; repeat for several.")] = [],
    n_latents: Annotated[int, Option(help="How many of those that fire are sampled.")] = 200,
    strengths: Annotated[list[float], Option("--strength", help="What a latent is set to; repeat.")] = STRENGTHS,
    vocabulary: Vocabulary = None,
    templates: Templates = "photo",
    tokens: ReplacedTokens = None,
    where: Where = None,
    limit: Annotated[int | None, Option(help="Look at a random sample of so many images; 32.")] = None,
    seed: Seed = 0,
    model: StoreModel = None,
    pretrained: StorePretrained = None,
    batch_size: BatchImages = 64,
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """How far a latent alone can move the model's answers over a vocabulary, beside dimensions of the stream."""
    from analysis import ModelOptions, SteerabilityConfig, StudyConfig, measure_steerability

    study = StudyConfig(templates=templates, tokens=tokens, where=where, limit=limit, seed=seed)
    engine = ModelOptions(model=model, pretrained=pretrained, batch_size=batch_size, device=device)
    with progress("steer", "latents") as report:
        found = measure_steerability(
            run, store, out, SteerabilityConfig(tuple(latents), n_latents, tuple(strengths)), vocabulary=vocabulary,
            study=study, model=engine, overwrite=overwrite, on_progress=report,
        )  # fmt: skip
    emit_result(found)


@app.command(epilog='Example: patchsae name val.concepts --vocabulary words.txt --set "907=red stripes"')
def name(
    concepts: ConceptsPath,
    vocabulary: Vocabulary = None,
    method: Annotated[list[str], Option(help="By top images, or direction (lens); repeat for both.")] = [
        "images",
        "lens",
    ],
    template: Annotated[str, Option(help="The text a word is put into.")] = "{}",
    set_: Annotated[list[str], Option("--set", help='Your own name: "907=red stripes"; nothing else is done.')] = [],
    note: Annotated[list[str], Option(help='Your own note on a latent: "907=see image 12".')] = [],
    codes: Annotated[Path | None, Option(help="The codes the table was made from, where they moved.")] = None,
    run: MovedRun = None,
    store: Annotated[str | None, Option(help="The activations, where they moved.")] = None,
    images: Annotated[Path | None, Option(help="Embed these image files instead of the activations.")] = None,
    model: StoreModel = None,
    pretrained: StorePretrained = None,
    batch_size: BatchImages = 64,
    device: Device = "auto",
) -> None:
    """Name every latent by CLIP's text tower, with scores; or write your own names, which are never overwritten."""
    from analysis import ConceptTable, name_latents, set_name

    table = ConceptTable.open(concepts)
    own = [("name", *split_pair("--set", pair)) for pair in set_] + [
        ("note", *split_pair("--note", pair)) for pair in note
    ]
    if own:
        for key, latent, text in own:
            set_name(table, latent, **{key: text})
        emit({"concepts": str(concepts), "set": [latent for _, latent, _ in own]}, f"{len(own)} written to {concepts}")
        return
    with progress("name", "images") as report:
        found = name_latents(
            table, vocabulary=vocabulary, methods=method, template=template, codes=codes, run=run, store=store,
            images=images, model=model, pretrained=pretrained, batch_size=batch_size, device=device,
            on_progress=report,
        )  # fmt: skip
    order = found.sort_by([("alignment", "descending")])
    emit({"rows": found.to_pylist()}, draw_table(order.slice(0, 20).to_pylist()))


@app.command(epilog="Example: patchsae localize val.codes --masks masks --legend classes.csv")
def localize(
    codes: CodesPath,
    masks: Annotated[Path | None, Option(help="PNG masks, named as the images; by default as extracted.")] = None,
    legend: Annotated[Path | None, Option(help="What the numbers mean: columns number, name (or uri, ...).")] = None,
    latent: Annotated[int | None, Option(help="Judge this latent, in place of the best of each concept.")] = None,
    n_top: Annotated[int, Option(help="Latents a concept.", min=1)] = 1,
    where: Where = None,
    out: Annotated[Path | None, Option(help="Write the answer as .csv or .parquet, or as a result in .json.")] = None,
    images: MovedImages = None,
    store: MovedStore = None,
    n_workers: Workers = None,
    scheduler: Scheduler = None,
    overwrite: Overwrite = False,
) -> None:
    """Compare heat maps with pixel masks: AP, pointing game and IoU of each concept's best latent.

    Latent and threshold are chosen on one half of the images with masks and judged on the other.
    """
    import pyarrow as pa

    from analysis import localize as run_localize
    from analysis import open_scheduler
    from saetrain import CodeStore

    opened = CodeStore.open(codes)
    result_file = out if out is not None and out.suffix.lower() == ".json" else None
    with open_scheduler(n_workers, scheduler), progress("read masks", "images") as report:
        result = run_localize(
            opened, result_file, masks=masks, legend=legend, latent=latent, n_top=n_top, where=where, images=images,
            store=store, overwrite=overwrite, on_progress=report,
        )  # fmt: skip
    rows = result.tables()[0]
    emit_answer(opened, pa.Table.from_pylist(rows), None if result_file else out)


@app.command(epilog="Example: patchsae rules train.codes rules.json --judge test.codes --concepts train.concepts")
def rules(
    codes: CodesPath,
    out: ResultPath = None,
    judge: Annotated[Path | None, Option(help="Codes to judge on; by default the last 20 % of the images.")] = None,
    explain: Annotated[str, Option(help="What rules learn: label, or zero-shot (the class CLIP names).")] = "label",
    tau: Annotated[float, Option(help="A latent is on a patch above this activation.")] = 0.2,
    n_patches: Annotated[int, Option(help="It fires on an image with so many such patches.")] = 3,
    n_candidates: Annotated[int, Option(help="Latents that a class may choose from.")] = 64,
    n_rules: Annotated[int, Option(help="Rules a class, at most.")] = 4,
    n_literals: Annotated[int, Option(help="Latents a rule, at most.")] = 3,
    concepts: Annotated[Path | None, Option(help="Concepts whose names the latents take.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Explain classes by a few readable rules over latents, judged on images they were not learned from."""
    from analysis import RulesConfig, learn_rules

    config = RulesConfig(
        explain=explain, tau=tau, n_patches=n_patches, n_candidates=n_candidates, n_rules=n_rules, n_literals=n_literals
    )
    with progress("rules", "shards") as report:
        found = learn_rules(codes, out, config, judge=judge, concepts=concepts, overwrite=overwrite, on_progress=report)
    emit_result(found)


@app.command(epilog="Example: patchsae report val.concepts report.html")
def report(
    concepts: ConceptsPath,
    out: Annotated[Path, Argument(metavar="OUT", help="The HTML file, e.g. report.html.")],
    results: Annotated[
        list[Path],
        Option("--result", help="A result of intervene, attribute, evaluate, steer, rules, compare; repeat."),
    ] = [],
) -> None:
    """Write one self-contained HTML page: quality, all latents, results, gallery with heat maps and numbers."""
    from analysis import write_report

    path = write_report(concepts, out, results=results)
    emit({"report": str(path), "bytes": path.stat().st_size}, f"{path} ({path.stat().st_size / 1e6:.1f} MB)")


@app.command(epilog="Example: patchsae compare val.concepts maple.concepts comparison.json")
def compare(
    base: Annotated[Path, Argument(metavar="CONCEPTS_BASE", help="Concepts of the plain model.")],
    adapted: Annotated[Path, Argument(metavar="CONCEPTS_ADAPTED", help="Of the adapted one, same images, same SAE.")],
    out: Annotated[Path, Argument(metavar="OUT", help="A JSON file; a page of the same name is written beside it.")],
    k: Annotated[list[int], Option(help="Latents a class that a masked classifier sees; repeat.")] = K_GRID[:7],
    n_top: Annotated[int, Option(help="Latents whose overlap is measured.")] = 50,
    high: Annotated[int, Option(help="Rank at which a latent's count is high.")] = 50,
    low: Annotated[int, Option(help="Rank below which it is low.")] = 100,
    n_random: Annotated[int, Option(help="Draws of the random control.")] = 2,
    tau: Tau = 0.2,
    template: Annotated[str, Option(help="The base model's text for a class.")] = "a photo of a {}.",
    limit: Annotated[int | None, Option(help="Judge a sample of so many images.")] = None,
    seed: Annotated[int, Option(help="Of halves, controls and intervals.")] = 0,
    n_seeds: Annotated[int, Option(help="Draw halves and controls so many times; intervals cover it.")] = 1,
    second_run: Annotated[
        Path | None, Option(help="A run trained on the adapted model's activations: both dictionaries by both models.")
    ] = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """What prompt tuning changed: which latents are used, or how they are mapped to classes. Writes JSON and a page."""
    from analysis import ComparisonConfig, write_adaptation_page
    from analysis import compare as run_compare

    if out.suffix.lower() == ".html":
        raise typer.BadParameter(
            f"OUT is the JSON file, e.g. {out.with_suffix('.json')}; the page is written beside it"
        )

    config = ComparisonConfig(
        k=tuple(k), n_top=n_top, high=high, low=low, n_random=n_random, tau=tau, template=template, limit=limit,
        seed=seed, n_seeds=n_seeds,
    )  # fmt: skip
    with progress("compare", "images") as report:
        found = run_compare(
            base, adapted, out, config, second_run=second_run, device=device, overwrite=overwrite, on_progress=report
        )
    page = write_adaptation_page(found, base, adapted, out.with_suffix(".html"))
    facts = {"out": str(out), "page": str(page), "conclusion": found.to_json()["conclusion"]}
    emit(facts, "\n".join(found.lines()))


@app.command(epilog="Example: patchsae info val.acts")
def info(path: AnyPath) -> None:
    """What an artifact is, whether it is complete, and what it was made from."""
    from actcache import describe

    facts = describe(path)
    emit(facts, draw_facts(facts))


@app.command(epilog="Example: patchsae verify val.acts")
def verify(
    path: AnyPath,
    repair: Annotated[bool, Option("--repair", help="Extract the damaged shards again, and only these.")] = False,
    images: Annotated[Path | None, Option(help="With --repair: where the images are, if they moved.")] = None,
    model: Annotated[str | None, Option(help="With --repair: the architecture, if it moved.")] = None,
    pretrained: Annotated[str | None, Option(help="With --repair: the weights, if they moved.")] = None,
    prompts: Annotated[str | None, Option(help="With --repair: the prompts, if they moved.")] = None,
) -> None:
    """Read every file and compare it with its checksum. Exit 1 when anything is wrong."""
    from actcache import repair as run_repair
    from actcache import verify as run_verify

    with progress("verify", "bytes") as report:
        found = run_verify(path, on_progress=report)
    if repair and not found.ok:
        with progress("repair", "images") as report:
            found = run_repair(
                path, images=images, model=model, pretrained=pretrained, prompts=prompts, on_progress=report
            )
    facts = {
        "path": path, "kind": found.kind, "ok": found.ok, "complete": found.complete, "n_files": found.n_files,
        "n_bytes": found.n_bytes, "problems": [str(problem) for problem in found.problems], "shards": found.shards,
    }  # fmt: skip
    state = "is whole" if found.ok else ("is damaged" if found.problems else "is not complete, but undamaged so far")
    text = f"{path} {state}: {found.n_files:,} files, {found.n_bytes / 1e6:,.1f} MB checked"
    advice = []
    if found.problems and not repair:
        how = (
            f"patchsae verify {path} --repair" if found.kind == "acts" else "the command that made it, with --overwrite"
        )
        advice = [f"  to repair it: {how}"]
    emit(facts, "\n".join([text, *(f"  {problem}" for problem in found.problems), *advice]))
    if not found.ok:
        raise typer.Exit(1)


# ---------------------------------------------------------------------------------------------------------------------
# Showing


def split_pair(flag: str, pair: str) -> tuple[int, str]:
    """907=red stripes -> (907, "red stripes")."""
    from actcache import SettingsError

    latent, equals, text = pair.partition("=")
    if not (equals and latent.strip().isdigit()):
        raise SettingsError(f'{flag} takes LATENT=TEXT, e.g. {flag} "907=red stripes", got {pair!r}.')
    return int(latent), text


def read_values(flag: str, pairs: list[str]) -> dict[int, float]:
    """907=5 and so on -> {907: 5.0}."""
    from actcache import SettingsError

    found: dict[int, float] = {}
    for pair in pairs:
        latent, text = split_pair(flag, pair)
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not abs(value) < float("inf") or latent in found:
            raise SettingsError(f"{flag} takes LATENT=NUMBER, each latent once, e.g. {flag} 907=5, got {pair!r}.")
        found[latent] = value
    return found


def read_shares(text: str | None) -> tuple[float, ...]:
    """1/8,1/2,1 -> numbers."""
    from actcache import SettingsError

    try:
        return tuple(float(Fraction(part)) for part in text.split(",")) if text else ()
    except (ValueError, ZeroDivisionError) as error:
        raise SettingsError(f"--prefixes must be shares such as 1/8,1/4,1/2,1, got {text!r}.") from error


def hook_point(layer: int | None, site: str | None) -> Any:
    """What the library takes for --layer and --site."""
    from actcache import HookPoint, SettingsError

    if site is None:
        return layer
    if layer is None:
        raise SettingsError("--site needs --layer.")
    return HookPoint(layer, site)


def emit(facts: dict[str, Any], text: str | Table | Group) -> None:
    """The result: one JSON object, or what people read."""
    if options.json:
        print(json.dumps(facts, default=str))
    elif isinstance(text, str):
        stdout.print(text, soft_wrap=True, highlight=False, markup=False)
    else:
        stdout.print(text)


def emit_result(result: Any) -> None:
    """A result record: its JSON, or its tables and lines."""
    tables = [draw_table(rows) for rows in result.tables()]
    lines = "\n".join(result.lines())
    emit(result.to_json(), Group(*tables, *([lines] if lines else [])) if tables else lines)


def emit_answer(codes: Any, table: Any, out: Path | None, *, n_shown: int | None = None, **more: Any) -> None:
    """A table that was found in codes, written too where there is a path to, and what it cost to read."""
    from analysis import write_answer

    facts = {"rows": table.to_pylist(), "bytes_read": codes.bytes_read, **more}  # of codes.zarr
    if out is not None:
        facts["out"] = str(write_answer(table, out))
    emit(facts, draw_table(facts["rows"][:n_shown]))


def draw_table(rows: list[dict[str, Any]]) -> Table | str:
    if not rows:
        return "nothing found"
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name, value in rows[0].items():
        table.add_column(name, justify="left" if isinstance(value, str) else "right")
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else escape(str(value)) for value in row.values()))
    return table


def draw_facts(facts: dict[str, Any]) -> Table:
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


def draw_estimate(plan: Any) -> Table:
    free, hours = "not known" if plan.free_bytes is None else decimal(plan.free_bytes), plan.seconds > 5400
    return draw_facts(
        {
            "images": plan.n_images,
            "tokens": plan.n_tokens,
            "hook points": plan.settings["hook_points"],
            "bytes": f"{decimal(plan.n_bytes)} in {plan.n_shards:,} shards, {plan.n_missing_shards:,} to be written",
            "free on that disk": free + ("" if plan.fits else f": not enough for {decimal(plan.missing_bytes)}"),
            "time": f"about {plan.seconds / (3600 if hours else 60):.1f} {'h' if hours else 'min'}",
            "rate": f"{plan.images_per_s:.1f} images/s, measured on one batch",
        }
    )


Report = Callable[..., None]


@contextmanager
def progress(verb: str, unit: str) -> Iterator[Report]:
    """A bar with rate and time left on stderr, from the first call that says there is something to do."""
    columns = (
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=16, table_column=Column(min_width=6)),
        TextColumn("{task.fields[text]}", table_column=Column(no_wrap=True)),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True, table_column=Column(no_wrap=True)),
    )
    bar = Progress(*columns, console=stderr, disable=options.quiet)
    with interrupts() as interrupted:
        task = bar.add_task(verb, total=None, text="", visible=False)

        def report(done: int, total: int, note: str = "") -> None:
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
            yield report
        finally:
            if bar.live.is_started:  # without a terminal, to stop is to print an empty line
                bar.stop()


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Tells whether SIGINT has come: its exception is lost when it comes up in a destructor or a callback of C code."""
    seen = False

    def note(number: int, frame: object) -> None:
        nonlocal seen
        seen = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note) if threading.current_thread() is threading.main_thread() else None
    try:
        yield lambda: seen
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)


@contextmanager
def steps() -> Iterator[Callable[[str, int, int], None]]:
    """Several bars below each other, one a step."""
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


if __name__ == "__main__":
    app()
