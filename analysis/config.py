"""The settings of the studies: frozen dataclasses whose fields are both keywords of the library and flags.

Whatever changes a result is a field of a `...Config` and part of the result's identity; ModelOptions holds what only
says where things are and how fast they run. This module imports nothing heavy, so the command line can read it.
"""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from actcache.errors import SettingsError
from actcache.hook_point import SITES
from actcache.options import FLOAT_MAX, JudgingConfig, check_options, option, required

TAU = 0.2
"""Default activation above which a token counts (PatchSAE, equation 4)."""

SCORES = ("mean", "max")
"""How an image's activations make a score: the mean over its tokens (PatchSAE 2.1), or the maximum."""


JUDGES = ("auto", "zero-shot", "probe", "head")
"""What answers which class an image belongs to: texts, a linear probe, or the checkpoint's own classifier."""
EXPLAINED = ("label", "model", "zero-shot", "probe", "head")
"""What rules explain: the label, or what a judge of the model answers; `model` is the judge `auto`."""
FEATURES = ("cls", "patch", "pooled")
"""What a linear probe can read: CLS, the mean of the patches, the tower's own pooled vector."""


@dataclass(frozen=True)
class ModelOptions:
    """Where the model is and how fast it runs. None of this is part of a result's identity."""

    model: str | None = option(None, "Architecture that the store was extracted with, if its file has moved.")
    pretrained: str | None = option(None, "Weights that the store was extracted with, if their file has moved.")
    batch_size: int = option(64, "Images per forward pass. Affects speed only.", at_least=1)
    device: str = option("auto", "Device: auto, cpu, cuda, cuda:1, mps. Affects speed only.")

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class TowerOptions:
    """The image tower that an SAE reads, and where in it. By default, what the SAE itself names. Raises SettingsError.

    `site` is None for the block's output, or what the SAE names.
    """

    model: str | None = option(
        None,
        "open_clip architecture, timm:NAME, folder of a model, hf-hub:OWNER/NAME, or a config JSON; by default the one "
        "that the SAE names.",
    )
    pretrained: str | None = option(None, "Tag, file or folder of weights; by default those that the SAE names.")
    image_size: str | None = option(
        None, "Height, or height x width such as 224x336, of the model's images; its own by default."
    )
    preprocess: str | Path | None = option(
        None,
        "How images are prepared, where the weights do not say it: a JSON file, an open_clip or timm name with a tag "
        "(NAME.TAG) whose preprocessing is taken, or default.",
    )
    layer: int | None = option(None, "Layer that the SAE reads, where it does not name it.", at_least=0)
    site: str | None = option(None, "Site in the block: resid_post, resid_mid, attn_out or mlp_out.")
    precision: str = option("auto", "Precision of the computation: auto, float32 or bfloat16.")
    device: str = option("auto", "Device: auto, cpu, cuda, cuda:1, mps. Affects speed only.")

    def __post_init__(self) -> None:
        check_options(self)
        if self.site is not None and self.site not in SITES:
            raise SettingsError(f"--site must be one of {', '.join(SITES)}, got {self.site!r}.")


@dataclass(frozen=True)
class ProbeConfig(JudgingConfig):
    """What a linear probe reads, and which images it is trained on. Raises SettingsError."""

    _: KW_ONLY
    probe_features: str = option(
        "cls+patch",
        "What a linear probe reads: cls (if there is one), patch (their mean), pooled, or several joined by +.",
        later=True,
    )  # CLS and the mean patch, as DINOv3's own evaluation: every tower has patches, and their changes are seen
    probe_where: str | None = option(
        None, "Filter for the training images of a linear probe: \"split == 'train'\".", later=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        parts = self.probe_features.split("+")
        if not set(parts) <= set(FEATURES) or len(set(parts)) < len(parts):
            raise SettingsError(
                f"--probe-features must be {', '.join(FEATURES)}, or several of them joined by +, got "
                f"{self.probe_features!r}."
            )


@dataclass(frozen=True)
class ClassifierConfig(ProbeConfig):
    """Which classifier judges. Raises SettingsError."""

    _: KW_ONLY
    judge: str = option(
        "auto",
        "Classifier: zero-shot (texts), head (the checkpoint's own classes), probe (a linear one, trained on other "
        "images), or auto, the first of them that the model has.",
        later=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.judge not in JUDGES:
            raise SettingsError(f"--judge must be one of {', '.join(JUDGES)}, got {self.judge!r}.")


@dataclass(frozen=True)
class StudyConfig(ClassifierConfig):
    """Which images a study looks at, which classifier judges them, and which tokens it replaces."""

    templates: str | Sequence[str] = option(
        "photo",
        "Text around a class name: photo, simple (7), openai (80), a text that contains {}, or a file of texts.",
    )
    class_names: str | Path | None = option(
        None, "File with a text for each class: lines such as `n02012849,crane`, or a JSON object."
    )
    tokens: str | None = option(
        None, "Tokens to replace: all, patch or cls. By default, those that RUN was trained on."
    )
    where: str | None = option(None, "Filter over the columns of images.parquet: \"split == 'test'\".")
    limit: int | None = option(None, "Number of images to sample at random.", at_least=1)
    seed: int = option(0, "Random seed for the samples, the halves and the random latents.", at_least=0)
    probe_store: str | None = option(
        None, "Labeled activations to train a linear probe on; by default, the training split of STORE.", later=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.probe_store is not None and self.judge in ("zero-shot", "head"):
            raise SettingsError(f"--probe-store trains a probe, but the judge is {self.judge}. Leave one of them out.")


@dataclass(frozen=True)
class MaskingConfig:
    """How masks over latents are made."""

    k: tuple[int, ...] = option(
        (1, 2, 5, 10, 50, 100, 500, 1000, 2000),
        "Number of latents to keep or drop; repeat the flag for several.",
        at_least=1,
    )  # PatchSAE's grid; all latents are always measured as well
    latents: tuple[int, ...] = option(
        (), "Latent to keep or drop instead of the top ones; repeat the flag for several.", at_least=0
    )
    keep_error: bool = option(False, "Add the part of the activations that the SAE does not reconstruct.")
    n_random: int = option(
        3, "Number of random controls, drawn from latents that fire as often as the chosen ones.", at_least=0
    )
    tau: float = option(TAU, "Activation above which a token counts for its class.", at_least=0)
    chosen_where: str | None = option(None, "Filter for the images to choose latents on: \"split == 'train'\".")

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class DeletionConfig:
    """How many latents are deleted."""

    n: tuple[int, ...] = option(
        (1, 2, 5, 10, 20, 50, 100, 200), "Number of latents to delete; repeat the flag for several.", at_least=1
    )
    keep_error: bool = option(False, "Add the part of the activations that the SAE does not reconstruct.")

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class SteerabilityConfig:
    """Which latents are set, and to what."""

    latents: tuple[int, ...] = option(
        (), "Latent to steer, instead of a sample; repeat the flag for several.", at_least=0
    )
    n_latents: int = option(200, "Number of latents to sample from those that fire.", at_least=1)
    strengths: tuple[float, ...] = option(
        (10.0, 50.0, 150.0),
        "Value to set a latent to; repeat the flag for several.",
        at_least=-FLOAT_MAX,
        at_most=FLOAT_MAX,
    )

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class ComparisonConfig(ClassifierConfig):
    """How a model is compared with its adapted version."""

    k: tuple[int, ...] = option(
        (1, 2, 5, 10, 50, 100, 500),
        "Latents per class that a masked classifier sees; repeat the flag for several.",
        at_least=1,
    )
    n_top: int = option(
        50, "Number of top latents whose overlap is measured; the conclusion uses the nearest k.", at_least=1
    )
    high: int = option(50, "A latent is high if its token count reaches the count at this rank.", at_least=1)
    low: int = option(100, "A latent is low if its token count is below the count at this rank.", at_least=1)
    n_random: int = option(2, "Number of random controls.", at_least=1)
    tau: float = option(TAU, "Activation above which a token counts for its class.", at_least=0)
    template: str = option(
        "a photo of a {}.", "Text around a class name for the base model; the adapted one has prompts."
    )
    class_names: str | Path | None = option(
        None, "File with a text for each class: lines such as `n02012849,crane`, or a JSON object."
    )
    limit: int | None = option(None, "Number of test images to sample at random.", at_least=1)
    seed: int = option(0, "Random seed for the split into halves, the controls and the intervals.", at_least=0)
    n_seeds: int = option(1, "Number of seeds (seed, seed + 1, ...) to repeat the comparison with.", at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.high > self.low:
            raise SettingsError(f"--high must be at most --low, got {self.high} and {self.low}.")


PROTOCOLS = ("visaebench",)
"""Packages whose metrics a benchmark can also give, under their own names."""


@dataclass(frozen=True)
class BenchmarkConfig:
    """What a benchmark is given beside runs and a store. Each adds measures, which are left out without it.

    Files count by their content in the identity of a result, and stores by their id.
    """

    masks: str | Path | None = option(None, "Folder of PNG masks named like the images; by default, the store's own.")
    legend: str | Path | None = option(
        None, "Table that explains the numbers in the masks: columns number and name, or uri and one per concept."
    )
    pairs: str | Path | None = option(
        None, "Table of images that differ in one attribute: columns before, after, removed and added."
    )
    hierarchy: str | Path | None = option(
        None, "JSON file of groups of sibling classes: an object of lists of class names."
    )
    transfer: str | None = option(None, "Activations of the same model on another data set.")
    embeddings: str | None = option(
        None, "Activations of the same images by another model, whose embeddings judge how alike images are."
    )
    protocol: str | None = option(None, "Metrics of another package, under its own names: visaebench.")

    def __post_init__(self) -> None:
        check_options(self)
        if self.protocol is not None and self.protocol not in PROTOCOLS:
            raise SettingsError(f"--protocol must be {' or '.join(PROTOCOLS)}, got {self.protocol!r}.")


@dataclass(frozen=True)
class RulesConfig(ProbeConfig):
    """What rules explain, and how large they may be."""

    explain: str = option(
        "label",
        "What the rules predict: label, or the class that the model predicts, by zero-shot, head, probe, or model (the "
        "first of them that it has).",
    )
    tau: float = option(TAU, "Activation above which a latent is on at a patch.", at_least=0)
    n_patches: int = option(3, "Number of such patches that an image needs for a latent to fire on it.", at_least=1)
    n_candidates: int = option(64, "Number of candidate latents for each class.", at_least=1)
    n_rules: int = option(4, "Maximum number of rules per class.", at_least=1)
    n_literals: int = option(3, "Maximum number of latents per rule.", at_least=1)
    probe_store: str | None = option(
        None, "Labeled activations to train a linear probe on; by default, those of CODES.", later=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.explain not in EXPLAINED:
            raise SettingsError(f"--explain must be one of {', '.join(EXPLAINED)}, got {self.explain!r}.")


TARGETS = ("class", "number")
"""What a column of the image table holds for a probe: classes, or numbers."""


@dataclass(frozen=True)
class ProbingConfig(JudgingConfig):
    """What is read from the image-level codes, and with how many latents."""

    label: str = required("Column of images.parquet to predict: label_name, or any other column of the images.")
    as_: str | None = option(
        None,
        "What the column holds: class, or number, the default for a column of more than 20 different numbers.",
    )
    k: tuple[int, ...] = option(
        (1, 4, 16, 64, 256),
        "Number of latents that a probe sees; repeat the flag for several. Cut to the latents that fire.",
        at_least=1,
    )
    score: str = option("max", "How an image's activations make a score: the max over its tokens, or their mean.")
    where: str | None = option(None, "Filter over the columns of images.parquet: \"split == 'test'\".")
    n_random: int = option(
        2,
        "Number of draws of random latents that fire as often as the chosen ones, and of shuffled labels.",
        at_least=1,
    )
    seed: int = option(0, "Random seed for the halves, the controls and the intervals.", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.as_ is not None and self.as_ not in TARGETS:
            raise SettingsError(f"--as must be one of {', '.join(TARGETS)}, got {self.as_!r}.")
        if self.score not in SCORES:
            raise SettingsError(f"--score must be one of {', '.join(SCORES)}, got {self.score!r}.")
        if not self.k:
            raise SettingsError("--k must name at least one number of latents, got none.")
