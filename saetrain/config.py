"""What an SAE is (SAEConfig) and how it is trained (TrainConfig). Frozen, no torch.

Every field changes the result and is part of a run's identity. None stands for a value that depends on other fields;
`resolve` derives it and gives a ResolvedSAEConfig or ResolvedTrainConfig, which is what an SAE and a run are made of.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from fractions import Fraction
from typing import ClassVar, Literal, cast, get_args

from actcache import SettingsError
from actcache.options import check_options, option


@dataclass(frozen=True)
class Defaults:
    """What a variant's derived settings are, and which settings apply to it.

    Attributes:
        l1: None takes the start value of the penalty (PENALTIES), for variants that have a choice of penalties.
        lr: None derives the rate from the number of latents.
        ghost: whether ghost gradients may revive dead latents; they do, unless `aux` is set.
        top_k: the number of active latents is given by k and there is no penalty.
        uses_k: whether k matters: as the number of active latents, or as the default of target_l0.
    """

    l1: float | None = 1e-3
    normalize: str = "center"
    lr: float | None = None
    aux: float = 1 / 32
    ghost: bool = False
    clip_norm: float = 1.0
    top_k: bool = False
    uses_k: bool = True


VARIANTS = {
    "topk": Defaults(top_k=True),
    "batchtopk": Defaults(top_k=True),
    "relu": Defaults(l1=8e-5, normalize="none", lr=4e-4, aux=0.0, ghost=True, clip_norm=0.0, uses_k=False),  # PatchSAE
    "jumprelu": Defaults(l1=None),
    "gated": Defaults(),
}
"""Every variant. What it computes is in the module of the same name in saetrain/model/variants."""
PENALTIES = {"quadratic": 1.0, "tanh": 1e-3}
"""The penalties of jumprelu, each with the weight it starts from."""
NORMALIZATIONS = ("center", "none")
TOKEN_NORMALIZATIONS = ("layer_norm", "constant_norm_rescale")
"""Normalizations of each token by its own size, which an SAE of another package may have; none is trained here."""
INITS = ("random", "data")
PRECISIONS = ("float32", "bfloat16")
Tokens = Literal["all", "patch", "cls"]
"""The same as in `actcache.store`, which would load zarr here."""


def parse_shares(text: str) -> tuple[float, ...]:
    """1/8,1/2,1 -> (0.125, 0.5, 1.0). Raises SettingsError."""
    try:
        return tuple(float(Fraction(part)) for part in text.split(","))
    except (ValueError, ZeroDivisionError) as error:
        raise SettingsError(f"--prefixes must be shares such as 1/8,1/4,1/2,1, got {text!r}.") from error


@dataclass(frozen=True)
class SAEConfig:
    """The network.

    Attributes:
        variant: `topk` keeps the k largest pre-activations of a token, then applies ReLU (Gao et al. 2024);
            `batchtopk` keeps the k x B largest of a batch, so a token takes as many as it needs (Bussmann et al. 2024);
            `relu` is PatchSAE's ReLU with an L1 penalty; `jumprelu` trains one threshold per latent (Rajamanoharan et
            al. 2024, arXiv 2407.14435); `gated` decides separately which latents are active and how strongly
            (Rajamanoharan et al. 2024, arXiv 2404.16014).
        prefixes: Matryoshka (Bussmann et al. 2025, arXiv 2503.17547): each prefix of the dictionary must reconstruct
            the input alone. () is a plain SAE.
        l1: 8e-5 goes with PatchSAE's normalized loss. `target_l0` steers the weight from this start value.
        target_l0: the quadratic penalty of jumprelu names it directly; elsewhere the penalty's weight is steered to it.
        penalty: `quadratic` is (l0 / target_l0 - 1)^2; `tanh` is the mean sum of tanh(4 value) (Anthropic, January
            2025).
        bandwidth: in units of the normalized input x'.
        normalize: `center` subtracts the mean and scales to a mean squared norm of d_model; `none` feeds activations
            to the SAE as they are, like PatchSAE.
    """

    variant: str = option("topk", "SAE variant: topk, batchtopk, relu (PatchSAE), jumprelu or gated.", sweep=True)
    n_latents: int | None = option(
        None, "Number of latents; 16 x the model's width by default.", sweep=True, at_least=1
    )
    k: int = option(32, "Number of active latents per token; for batchtopk, their average.", sweep=True, at_least=1)
    prefixes: tuple[float, ...] = option(
        (),
        "Sizes of nested (Matryoshka) dictionaries as shares, ascending to 1, e.g. 1/8,1/4,1/2,1. Top-k only.",
        parser=parse_shares,
        above=0,
        at_most=1,
    )
    l1: float | None = option(
        None,
        "Weight of the sparsity penalty (relu, gated, jumprelu). Default: 8e-5 for relu, 1 for jumprelu's quadratic "
        "penalty, else 1e-3.",
        sweep=True,
        at_least=0,
    )
    target_l0: float | None = option(
        None,
        "Number of active latents per token that the penalty aims at (relu, gated, jumprelu). Default: --k, or no "
        "target for relu.",
        sweep=True,
        above=0,
    )
    penalty: str = option("quadratic", "Sparsity penalty of jumprelu: quadratic or tanh.")
    bandwidth: float = option(
        0.3, "Width of the window around a jumprelu threshold that passes gradients to it.", above=0
    )
    normalize: str | None = option(None, "Input normalization: center (the default) or none (the default for relu).")

    normalizations: ClassVar[tuple[str, ...]] = NORMALIZATIONS

    def __post_init__(self) -> None:
        check_options(self)
        _check_choice("--variant", self.variant, VARIANTS)
        _check_choice("--penalty", self.penalty, PENALTIES)
        if self.normalize is not None:
            _check_choice("--normalize", self.normalize, self.normalizations)
        if self.n_latents is None:
            return
        if VARIANTS[self.variant].uses_k and self.k > self.n_latents:
            raise SettingsError(f"--k must lie in 1..{self.n_latents} (the number of latents), got {self.k}.")
        if self.target_l0 is not None and self.target_l0 > self.n_latents:
            raise SettingsError(f"--target-l0 must be above 0 and at most {self.n_latents}, got {self.target_l0}.")

    def resolve(self, d_model: int) -> "ResolvedSAEConfig":
        """Derive what depends on the variant and on d_model. Raises SettingsError for values that make no SAE."""
        defaults = VARIANTS[self.variant]
        n_latents = 16 * d_model if self.n_latents is None else self.n_latents
        if self.prefixes:
            sizes = [0, *_nested_sizes(self.prefixes, n_latents)]
            if not defaults.top_k or sorted(set(sizes)) != sizes or sizes[-1] != n_latents:
                raise SettingsError(
                    "--prefixes must ascend from above 0 to 1 and need a top-k variant, "
                    f"got {', '.join(map(str, self.prefixes))} of {n_latents} latents for {self.variant}."
                )
        l1 = PENALTIES[self.penalty] if defaults.l1 is None else defaults.l1
        target_l0 = self.target_l0
        if target_l0 is None and defaults.uses_k and not defaults.top_k:
            target_l0 = float(self.k)
        derived = {
            "n_latents": n_latents,
            "l1": l1 if self.l1 is None else self.l1,
            "target_l0": target_l0,
            "normalize": self.normalize or defaults.normalize,
        }
        return ResolvedSAEConfig(**{**vars(self), **derived})


@dataclass(frozen=True, kw_only=True)
class ResolvedSAEConfig(SAEConfig):
    """A network with nothing left to derive. A target_l0 of None means that the variant has no target.

    `normalize` may also be one of TOKEN_NORMALIZATIONS, which saetrain/model/token_size.py describes.
    """

    n_latents: int = field()
    l1: float = field()
    normalize: str = field()

    normalizations: ClassVar[tuple[str, ...]] = (*NORMALIZATIONS, *TOKEN_NORMALIZATIONS)

    @property
    def per_token(self) -> bool:
        """Whether each token is normalized by its own size, so that decoding needs the activations too."""
        return self.normalize in TOKEN_NORMALIZATIONS

    @property
    def top_k(self) -> bool:
        """Whether k gives the number of active latents, so that there is no penalty."""
        return VARIANTS[self.variant].top_k

    @property
    def nested(self) -> tuple[int, ...]:
        """Sizes of the nested dictionaries; () for a plain SAE."""
        return _nested_sizes(self.prefixes, self.n_latents)

    @property
    def expected_l0(self) -> float:
        """The number of active latents per token that training aims at: target_l0, or k where there is none."""
        return self.k if self.target_l0 is None else self.target_l0

    @property
    def steering_target(self) -> float | None:
        """The l0 that the penalty's weight is steered to; None where the weight stays as it is.

        The quadratic penalty names its target itself.
        """
        defaults = VARIANTS[self.variant]
        quadratic = defaults.l1 is None and self.penalty == "quadratic"
        return None if self.top_k or quadratic else self.target_l0


@dataclass(frozen=True)
class TrainConfig:
    """The training.

    Attributes:
        lr: None gives 2e-4 / sqrt(n_latents / 2^14) (Gao et al. 2024), or 4e-4 for relu (PatchSAE).
        aux: AuxK reconstructs the residual from dead latents (Gao et al. 2024, A.2).
        ghost: PatchSAE's ghost gradients, the default for relu when `aux` is 0.
        init: `data` points latents at tokens, blended with random directions.
        clip_norm: limits the norm of the gradient of the mean over tokens of ||x' - x'^||^2, as other packages count
            it.
        n_streams: part of what defines the order of batches; the number of processes must divide it.
        precision: of the matrix products. Master weights, Adam's moments and thresholds stay float32.
    """

    n_steps: int = option(10_000, "Number of training steps.", at_least=1)
    batch_size: int = option(4096, "Number of tokens per step.", at_least=1)
    lr: float | None = option(
        None,
        "Peak learning rate of Adam. Default: 2e-4 / sqrt(n_latents / 16384), or 4e-4 for relu.",
        sweep=True,
        above=0,
    )
    warmup_steps: int | None = option(
        None, "Steps of linear warm-up. Default: 500, or a tenth of a run shorter than 5,000 steps.", at_least=0
    )
    decay_fraction: float = option(
        0.2, "Share of the steps, at the end, over which the rate decays linearly to 0.", at_least=0, at_most=1
    )
    aux: float | None = option(
        None, "Weight of AuxK, the loss that revives dead latents. Default: 1/32, or 0 for relu.", at_least=0
    )
    ghost: bool | None = option(
        None, "Revive dead latents with ghost gradients instead of AuxK (relu only, where this is the default)."
    )
    resample_every: int = option(
        0, "Steps between replacements of dead latents by badly reconstructed tokens; 0 never replaces any.", at_least=0
    )
    dead_tokens: int = option(
        1_000_000, "Number of tokens on which a latent must stay silent to count as dead.", at_least=0
    )
    clip_norm: float | None = option(
        None, "Limit of the global gradient norm; 0 does not clip. Default: 1, or 0 for relu.", at_least=0
    )
    tokens: str = option("all", "Which tokens of an image to train on: all, patch or cls.")
    pool_tokens: int = option(1 << 18, "Number of tokens held in memory and shuffled together.", at_least=0)
    n_streams: int = option(8, "Number of virtual streams from which each batch is drawn.", at_least=1)
    init: str = option("random", "Initial dictionary: random directions, or data (directions of tokens).")
    where: str | None = option(
        None, "Train only on images that match this filter over the columns of images.parquet, e.g. 'label < 10'."
    )
    precision: str | None = option(
        None, "Precision of matrix products: float32 or bfloat16. Default: bfloat16 where the hardware supports it."
    )
    seed: int = option(0, "Random seed for the initial weights and the order of the batches.", sweep=True, at_least=0)

    def __post_init__(self) -> None:
        check_options(self)
        _check_choice("--init", self.init, INITS)
        _check_choice("--tokens", self.tokens, get_args(Tokens))
        if self.precision is not None:
            _check_choice("--precision", self.precision, PRECISIONS)
        if self.ghost and self.aux:
            raise SettingsError(f"Give --ghost or --aux, not both: --aux is {self.aux}.")

    @property
    def token_kind(self) -> Tokens:
        """`tokens`, as the type that readers of a store take."""
        return cast(Tokens, self.tokens)

    def resolve(self, sae: ResolvedSAEConfig, default_precision: str) -> "ResolvedTrainConfig":
        """Derive what depends on the SAE and the hardware. Raises SettingsError for ghost gradients without relu."""
        defaults = VARIANTS[sae.variant]
        if sae.per_token:
            raise SettingsError(
                f"--normalize must be one of {', '.join(NORMALIZATIONS)} for training, got {sae.normalize!r}, which "
                "only SAEs of other packages have."
            )
        if self.ghost and not defaults.ghost:
            raise SettingsError(f"--ghost works with relu only; dead latents of {sae.variant} are revived by --aux.")
        lr = 2e-4 / math.sqrt(sae.n_latents / 2**14) if defaults.lr is None else defaults.lr
        aux = defaults.aux if self.aux is None else self.aux
        derived = {
            "lr": lr if self.lr is None else self.lr,
            "warmup_steps": min(500, self.n_steps // 10) if self.warmup_steps is None else self.warmup_steps,
            "aux": aux,
            "ghost": defaults.ghost and not aux if self.ghost is None else self.ghost,
            "clip_norm": defaults.clip_norm if self.clip_norm is None else self.clip_norm,
            "precision": self.precision or default_precision,
        }
        return ResolvedTrainConfig(**{**vars(self), **derived})


@dataclass(frozen=True, kw_only=True)
class ResolvedTrainConfig(TrainConfig):
    """A training with nothing left to derive. A `where` of None trains on all images."""

    lr: float = field()
    warmup_steps: int = field()
    aux: float = field()
    ghost: bool = field()
    clip_norm: float = field()
    precision: str = field()


def _nested_sizes(prefixes: tuple[float, ...], n_latents: int) -> tuple[int, ...]:
    return tuple(round(share * n_latents) for share in prefixes)


def _check_choice(flag: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        raise SettingsError(f"{flag} must be one of {', '.join(choices)}, got {value!r}.")
