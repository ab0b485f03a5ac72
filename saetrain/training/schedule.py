"""The schedule of the learning rate: linear warm-up, a constant rate, linear decay to 0 at the end."""

from saetrain.config import ResolvedTrainConfig


def learning_rate(config: ResolvedTrainConfig, step: int) -> float:
    """The rate of the update that follows `step` finished ones."""
    warmup = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    n_decay = config.decay_fraction * config.n_steps
    decay = min(1.0, (config.n_steps - step) / n_decay) if n_decay else 1.0
    return config.lr * warmup * decay
