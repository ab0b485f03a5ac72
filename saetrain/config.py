"""What an SAE is (SAEConfig) and what was done to it (TrainConfig). Frozen, no torch.

Every field changes the result and is part of a Run's identity. None means "derived"; `resolve` fills it in.
"""

import math
from dataclasses import dataclass, replace

from actcache import SettingsError

VARIANTS = ("topk", "batchtopk", "relu")
NORMALIZATIONS = ("center", "none")


@dataclass(frozen=True)
class SAEConfig:
    """The network.

    Attributes:
        variant: `topk` (k largest pre-activations, then ReLU; Gao et al. 2024), `batchtopk` (the k x B largest of a
            batch, so that a token takes as many as it needs; Bussmann et al. 2024) or `relu` (PatchSAE: ReLU with an
            L1 penalty).
        n_latents: dictionary size F; 16 x d_model when None.
        k: active latents a token (topk), on average (batchtopk).
        l1: weight of the L1 penalty (relu). 8e-5 goes with PatchSAE's normalized loss.
        normalize: `center` subtracts the mean and scales to a mean squared norm of d_model before the SAE sees a
            token; `none` feeds it raw, as PatchSAE does. None: none for relu, else center.
    """

    variant: str = "topk"
    n_latents: int | None = None
    k: int = 32
    l1: float = 8e-5
    normalize: str | None = None

    def resolve(self, d_model: int) -> "SAEConfig":
        """Fill in what depends on other fields. Raises SettingsError for values that make no SAE."""
        if self.variant not in VARIANTS:
            raise SettingsError(f"--variant must be one of {', '.join(VARIANTS)}, got {self.variant!r}.")
        n_latents = 16 * d_model if self.n_latents is None else self.n_latents
        normalize = self.normalize or ("none" if self.variant == "relu" else "center")
        if normalize not in NORMALIZATIONS:
            raise SettingsError(f"--normalize must be one of {', '.join(NORMALIZATIONS)}, got {normalize!r}.")
        if n_latents < 1:
            raise SettingsError(f"--n-latents must be at least 1, got {n_latents}.")
        if self.variant != "relu" and not 1 <= self.k <= n_latents:
            raise SettingsError(f"--k must lie in 1..{n_latents} (the number of latents), got {self.k}.")
        if not 0 <= self.l1 < math.inf:
            raise SettingsError(f"--l1 must be a number of at least 0, got {self.l1}.")
        return replace(self, n_latents=n_latents, normalize=normalize)

    @property
    def size(self) -> int:
        """n_latents of a resolved config."""
        assert self.n_latents is not None
        return self.n_latents


@dataclass(frozen=True)
class TrainConfig:
    """The training.

    Attributes:
        n_steps, batch_size: updates, and tokens an update.
        lr: Adam's peak rate. None: 2e-4 / sqrt(n_latents / 2^14) for the top-k ones (Gao et al. 2024), 4e-4 for relu
            (PatchSAE).
        warmup_steps: linear warm-up; None: 500, or a tenth of a shorter run.
        decay_fraction: linear decay to 0 over the last share of the steps.
        aux: weight of AuxK, the loss that revives dead latents (topk).
        dead_tokens: a latent is dead when it was silent for so many tokens.
        clip_norm: global gradient norm; 0 does not clip.
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
    aux: float = 1 / 32
    dead_tokens: int = 1_000_000
    clip_norm: float = 1.0
    tokens: str = "all"
    pool_tokens: int = 1 << 18
    n_streams: int = 8
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
        if not 0 <= self.decay_fraction <= 1:
            raise SettingsError(f"decay_fraction must lie in 0..1, got {self.decay_fraction}.")
        for name, number in (
            ("--seed", self.seed),
            ("warmup_steps", self.warmup_steps or 0),
            ("aux", self.aux),
            ("dead_tokens", self.dead_tokens),
            ("clip_norm", self.clip_norm),
            ("pool_tokens", self.pool_tokens),
        ):
            if not 0 <= number < math.inf:
                raise SettingsError(f"{name} must be a number of at least 0, got {number}.")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise SettingsError(f"--lr must be a number above 0, got {self.lr}.")
        lr = self.lr
        if lr is None:
            lr = 2e-4 / math.sqrt(sae.size / 2**14) if sae.variant != "relu" else 4e-4
        warmup = min(500, self.n_steps // 10) if self.warmup_steps is None else self.warmup_steps
        return replace(self, lr=lr, warmup_steps=warmup, precision=self.precision or default_precision)

    def learning_rate(self, step: int) -> float:
        """Rate of the update that follows `step` finished ones."""
        assert self.lr is not None
        assert self.warmup_steps is not None
        warmup = min(1.0, (step + 1) / max(self.warmup_steps, 1))
        n_decay = self.decay_fraction * self.n_steps
        decay = min(1.0, (self.n_steps - step) / n_decay) if n_decay else 1.0
        return self.lr * warmup * decay
