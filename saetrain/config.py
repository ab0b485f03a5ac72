"""What an SAE is (SAEConfig) and what was done to it (TrainConfig). Frozen, no torch.

Every field changes the result and is part of a Run's identity. None means "derived"; `resolve` fills it in.
"""

import math
from dataclasses import dataclass, replace

from actcache import SettingsError
from actcache.options import option

VARIANTS = ("topk", "batchtopk", "relu", "jumprelu", "gated")
TOP_K = ("topk", "batchtopk")
"""Variants whose number of active latents is given, not found."""
NORMALIZATIONS = ("center", "none")
PENALTIES = ("quadratic", "tanh")
INITS = ("random", "data")


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
    n_latents: int | None = option(None, "Number of latents; 16 x the model's width by default.", sweep=True)
    k: int = option(32, "Active latents per token; their average per token for batchtopk.", sweep=True)
    prefixes: tuple[float, ...] = option(
        (), "Sizes of nested (Matryoshka) dictionaries as shares, ascending to 1, e.g. 1/8,1/4,1/2,1. Top-k only."
    )
    l1: float | None = option(
        None,
        "Weight of the sparsity penalty (relu, gated, jumprelu). Default: 8e-5 for relu, 1 for jumprelu's quadratic "
        "penalty, else 1e-3.",
        sweep=True,
    )
    target_l0: float | None = option(
        None,
        "Number of active latents per token that the penalty aims at (relu, gated, jumprelu). Default: --k, or no "
        "target for relu.",
        sweep=True,
    )
    penalty: str = option("quadratic", "Sparsity penalty of jumprelu: quadratic or tanh.")
    bandwidth: float = option(0.3, "Width of the window around a jumprelu threshold that passes gradients to it.")
    normalize: str | None = option(None, "Input normalization: center (the default) or none (the default for relu).")

    def __post_init__(self) -> None:
        object.__setattr__(self, "prefixes", tuple(self.prefixes))  # JSON gives lists

    def resolve(self, d_model: int) -> "SAEConfig":
        """Fill in what depends on other fields. Raises SettingsError for values that make no SAE."""
        n_latents = 16 * d_model if self.n_latents is None else self.n_latents
        normalize = self.normalize or ("none" if self.variant == "relu" else "center")
        for name, value, known in (
            ("--variant", self.variant, VARIANTS),
            ("--normalize", normalize, NORMALIZATIONS),
            ("--penalty", self.penalty, PENALTIES),
        ):
            if value not in known:
                raise SettingsError(f"{name} must be one of {', '.join(known)}, got {value!r}.")
        if n_latents < 1:
            raise SettingsError(f"--n-latents must be at least 1, got {n_latents}.")
        if self.variant != "relu" and not 1 <= self.k <= n_latents:
            raise SettingsError(f"--k must lie in 1..{n_latents} (the number of latents), got {self.k}.")
        if self.prefixes:
            sizes = [0, *_nested(self.prefixes, n_latents)]
            if self.variant not in TOP_K or sorted(set(sizes)) != sizes or sizes[-1] != n_latents:
                raise SettingsError(
                    "--prefixes must ascend from above 0 to 1 and belong to a top-k variant, "
                    f"got {', '.join(map(str, self.prefixes))} of {n_latents} latents for {self.variant}."
                )
        l1 = self.l1
        if l1 is None:
            l1 = {"relu": 8e-5, "jumprelu": 1.0 if self.penalty == "quadratic" else 1e-3}.get(self.variant, 1e-3)
        target_l0 = self.target_l0
        if target_l0 is None and self.variant in ("jumprelu", "gated"):
            target_l0 = float(self.k)
        if not 0 <= l1 < math.inf:
            raise SettingsError(f"--l1 must be a number of at least 0, got {l1}.")
        if target_l0 is not None and not 0 < target_l0 <= n_latents:
            raise SettingsError(f"--target-l0 must lie above 0 and up to {n_latents}, got {target_l0}.")
        if not 0 < self.bandwidth < math.inf:
            raise SettingsError(f"--bandwidth must be a number above 0, got {self.bandwidth}.")
        return replace(self, n_latents=n_latents, normalize=normalize, l1=l1, target_l0=target_l0)

    @property
    def nested(self) -> tuple[int, ...]:
        """Sizes of the nested dictionaries of a resolved config; () for a plain SAE."""
        return _nested(self.prefixes, self.size)

    @property
    def weight(self) -> float:
        """l1 of a resolved config."""
        assert self.l1 is not None
        return self.l1

    @property
    def steered(self) -> bool:
        """Whether the penalty's weight follows the measured l0."""
        named = self.variant == "jumprelu" and self.penalty == "quadratic"
        return self.variant not in TOP_K and self.target_l0 is not None and not named

    @property
    def size(self) -> int:
        """n_latents of a resolved config."""
        assert self.n_latents is not None
        return self.n_latents


def _nested(prefixes: tuple[float, ...], n_latents: int) -> tuple[int, ...]:
    return tuple(round(share * n_latents) for share in prefixes)


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

    n_steps: int = option(10_000, "Number of training steps.")
    batch_size: int = option(4096, "Tokens per step.")
    lr: float | None = option(
        None, "Peak learning rate of Adam. Default: 2e-4 / sqrt(n_latents / 16384), or 4e-4 for relu.", sweep=True
    )
    warmup_steps: int | None = option(
        None, "Steps of linear warm-up. Default: 500, or a tenth of a run shorter than 5,000 steps."
    )
    decay_fraction: float = option(0.2, "Share of the steps, at the end, over which the rate decays linearly to 0.")
    aux: float | None = option(
        None, "Weight of AuxK, the loss that revives dead latents. Default: 1/32, or 0 for relu."
    )
    ghost: bool | None = option(
        None, "Revive dead latents by ghost gradients instead of AuxK (relu only, where it is the default)."
    )
    resample_every: int = option(
        0, "Steps between replacements of dead latents by badly reconstructed tokens; 0 never replaces any."
    )
    dead_tokens: int = option(1_000_000, "Number of tokens without firing after which a latent counts as dead.")
    clip_norm: float | None = option(
        None, "Limit of the global gradient norm; 0 does not clip. Default: 1, or 0 for relu."
    )
    tokens: str = option("all", "Which tokens of an image to train on: all, patch or cls.")
    pool_tokens: int = option(1 << 18, "Number of tokens held in memory and shuffled together.")
    n_streams: int = option(8, "Number of virtual streams from which each batch is drawn.")
    init: str = option("random", "Initial dictionary: random directions, or data (directions of tokens).")
    where: str | None = option(
        None, "Train only on images that match this filter over the columns of images.parquet, e.g. 'label < 10'."
    )
    precision: str | None = option(
        None, "Precision of matrix products: float32 or bfloat16. Default: bfloat16 where the hardware supports it."
    )
    seed: int = option(0, "Random seed for the initial weights and the order of the batches.", sweep=True)

    def resolve(self, sae: SAEConfig, default_precision: str) -> "TrainConfig":
        """Fill in what depends on the SAE and the hardware. Raises SettingsError for impossible values."""
        counts = {"--n-steps": self.n_steps, "--batch-size": self.batch_size, "--n-streams": self.n_streams}
        for name, value in counts.items():
            if value < 1:
                raise SettingsError(f"{name} must be at least 1, got {value}.")
        if self.precision not in (None, "float32", "bfloat16"):
            raise SettingsError(f"--precision must be float32 or bfloat16, got {self.precision!r}.")
        if self.init not in INITS:
            raise SettingsError(f"--init must be one of {', '.join(INITS)}, got {self.init!r}.")
        if self.ghost and sae.variant != "relu":
            raise SettingsError(f"--ghost belongs to relu; {sae.variant} is revived by --aux.")
        if self.ghost and self.aux:
            raise SettingsError(f"Give --ghost or --aux, not both: --aux is {self.aux}.")
        if not 0 <= self.decay_fraction <= 1:
            raise SettingsError(f"decay_fraction must lie in 0..1, got {self.decay_fraction}.")
        for name, number in (
            ("--seed", self.seed),
            ("warmup_steps", self.warmup_steps or 0),
            ("aux", self.aux or 0),
            ("resample_every", self.resample_every),
            ("dead_tokens", self.dead_tokens),
            ("clip_norm", self.clip_norm or 0),
            ("pool_tokens", self.pool_tokens),
        ):
            if not 0 <= number < math.inf:
                raise SettingsError(f"{name} must be a number of at least 0, got {number}.")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise SettingsError(f"--lr must be a number above 0, got {self.lr}.")
        lr = self.lr
        if lr is None:
            lr = 4e-4 if sae.variant == "relu" else 2e-4 / math.sqrt(sae.size / 2**14)
        warmup = min(500, self.n_steps // 10) if self.warmup_steps is None else self.warmup_steps
        relu = sae.variant == "relu"
        aux = (0.0 if relu else 1 / 32) if self.aux is None else self.aux
        ghost = (relu and not aux) if self.ghost is None else self.ghost
        clip_norm = (0.0 if relu else 1.0) if self.clip_norm is None else self.clip_norm
        precision = self.precision or default_precision
        return replace(self, lr=lr, warmup_steps=warmup, precision=precision, aux=aux, ghost=ghost, clip_norm=clip_norm)

    def learning_rate(self, step: int) -> float:
        """Rate of the update that follows `step` finished ones."""
        assert self.lr is not None
        assert self.warmup_steps is not None
        warmup = min(1.0, (step + 1) / max(self.warmup_steps, 1))
        n_decay = self.decay_fraction * self.n_steps
        decay = min(1.0, (self.n_steps - step) / n_decay) if n_decay else 1.0
        return self.lr * warmup * decay
