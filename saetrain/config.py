"""What an SAE is (SAEConfig) and what was done to it (TrainConfig). Frozen, no torch.

Every field changes the result and is part of a Run's identity. None means "derived"; `resolve` fills it in.
"""

import math
from dataclasses import dataclass, replace

from actcache import SettingsError

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
        variant: `topk` (k largest pre-activations, then ReLU; Gao et al. 2024), `batchtopk` (the k x B largest of a
            batch, so that a token takes as many as it needs; Bussmann et al. 2024), `relu` (PatchSAE: ReLU with an
            L1 penalty), `jumprelu` (a trained threshold a latent; Rajamanoharan et al. 2024, arXiv 2407.14435) or
            `gated` (which latents are active and how much are told apart; the same, arXiv 2404.16014).
        n_latents: dictionary size F; 16 x d_model when None.
        k: active latents a token (topk), on average (batchtopk).
        prefixes: sizes of nested dictionaries as shares of F, ascending to 1 (Matryoshka; Bussmann et al. 2025, arXiv
            2503.17547): the first latents alone must reconstruct too. Top-k variants only; () is a plain SAE.
        l1: weight of the sparsity penalty (relu, gated, jumprelu); what the control of `target_l0` starts from.
            None: 8e-5 for relu (it goes with PatchSAE's normalized loss), 1e-3 for gated and tanh, 1 for quadratic.
        target_l0: active latents a token that the penalty's weight is steered to (relu, gated, jumprelu with tanh) or
            that the penalty itself names (quadratic). None: not steered for relu, else k.
        penalty: of jumprelu. `quadratic`: (l0 / target_l0 - 1)^2; `tanh`: mean sum of tanh(4 value) (Anthropic,
            January 2025).
        bandwidth: width of the window around a threshold in which it takes gradients (jumprelu), in units of x'.
        normalize: `center` subtracts the mean and scales to a mean squared norm of d_model before the SAE sees a
            token; `none` feeds it raw, as PatchSAE does. None: none for relu, else center.
    """

    variant: str = "topk"
    n_latents: int | None = None
    k: int = 32
    prefixes: tuple[float, ...] = ()
    l1: float | None = None
    target_l0: float | None = None
    penalty: str = "quadratic"
    bandwidth: float = 0.3
    normalize: str | None = None

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
        n_steps, batch_size: updates, and tokens an update.
        lr: Adam's peak rate. None: 2e-4 / sqrt(n_latents / 2^14) (Gao et al. 2024), for relu
            4e-4 (PatchSAE).
        warmup_steps: linear warm-up; None: 500, or a tenth of a shorter run.
        decay_fraction: linear decay to 0 over the last share of the steps.
        aux: weight of AuxK, the loss that revives dead latents. None: 0 for relu, else 1/32.
        ghost: PatchSAE's ghost gradients, which revive dead latents of relu. None: for relu without `aux`.
        resample_every: steps between replacements of dead latents by badly reconstructed tokens; 0: never.
        dead_tokens: a latent is dead when it was silent for so many tokens.
        init: dictionary at the start: `random` directions, or `data`: those of tokens, blended with random ones.
        where: which images are trained on, by columns of images.parquet: "split == 'train' and label < 10".
        clip_norm: limit of the global gradient norm, of the mean over tokens of ||x' - x'^||^2, as peers count it; 0
            does not clip. None: 1, for relu 0 (PatchSAE).
        tokens: which tokens of an image are trained on: all, patch or cls.
        pool_tokens: tokens held and shuffled at once.
        n_streams: virtual streams a batch is drawn from; the number of processes must divide it.
        precision: float32 or bfloat16 matmuls (masters stay float32). None: bfloat16 where the hardware has it.
    """

    n_steps: int = 10_000
    batch_size: int = 4096
    lr: float | None = None
    warmup_steps: int | None = None
    decay_fraction: float = 0.2
    aux: float | None = None
    ghost: bool | None = None
    resample_every: int = 0
    dead_tokens: int = 1_000_000
    clip_norm: float | None = None
    tokens: str = "all"
    pool_tokens: int = 1 << 18
    n_streams: int = 8
    init: str = "random"
    where: str | None = None
    precision: str | None = None
    seed: int = 0

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
