"""Trains one peer package for real steps in its own loop, and prints one JSON line. peers.py starts it, one at a time.

Runs in the peers' environment (peers-env.sh) and imports no package of this project. Every package gets the same rows,
already centered and scaled, in the same order, and runs its own loop: SAELens `SAETrainer.fit`, dictionary_learning
`trainSAE`, overcomplete `train_sae` (its AMP loop for bfloat16). A step is timed from the moment its batch is handed
over until the loop asks for the next one. `dense` is PatchSAE's formula as plain float32 autograd on dense arrays, in
place of that paper's code.
"""

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, version

from common import parser

import numpy as np
import torch
from torch import Tensor, nn

Weights = dict[str, np.ndarray]
Peer = tuple[Callable[["Batches"], object], Callable[[], Weights]]
"""A function that trains on batches until they end, and one that returns the weights afterwards."""


class Batches:
    """Batches of rows, shuffled by (seed, epoch); records when each was handed over and when the next was requested."""

    def __init__(self, rows: Tensor, n_steps: int, batch_size: int, seed: int) -> None:
        self.rows, self.n_steps, self.batch_size, self.seed = rows, n_steps, batch_size, seed
        self.begun: list[float] = []
        self.ended: list[float] = []
        self.order, self.epoch = np.empty(0, np.int64), 0

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        self.finish()
        if len(self.begun) == self.n_steps:
            raise StopIteration
        if len(self.order) < self.batch_size:
            self.order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.rows))
            self.epoch += 1
        chosen, self.order = self.order[: self.batch_size], self.order[self.batch_size :]
        batch = self.rows[torch.from_numpy(chosen)]
        self.begun.append(time.perf_counter())
        return batch

    def finish(self) -> None:
        """Record that the last batch is finished."""
        if len(self.ended) < len(self.begun):
            self.ended.append(time.perf_counter())

    def seconds(self, n_warmup: int) -> list[float]:
        return [end - begin for begin, end in zip(self.begun, self.ended, strict=True)][n_warmup:]


def saelens(options: argparse.Namespace) -> Peer:
    from sae_lens import saes
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.matryoshka_batchtopk_sae import (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
    )
    from sae_lens.training.sae_trainer import SAETrainer

    F, D = options.n_latents, options.d_model
    shape = {"d_in": D, "d_sae": F, "dtype": "float32", "device": "cpu"}
    top_k, penalty = {"k": options.k}, {"l1_coefficient": options.l1}
    widths = {"matryoshka_widths": prefixes(F)}
    sparse = {"use_sparse_activations": options.peer == "saelens-sparse"}
    make_sae, make_config, extra = {
        "topk": (saes.TopKTrainingSAE, saes.TopKTrainingSAEConfig, top_k | sparse),
        "relu": (saes.StandardTrainingSAE, saes.StandardTrainingSAEConfig, penalty),
        "batchtopk": (saes.BatchTopKTrainingSAE, saes.BatchTopKTrainingSAEConfig, top_k),
        "jumprelu": (saes.JumpReLUTrainingSAE, saes.JumpReLUTrainingSAEConfig, {}),
        "gated": (saes.GatedTrainingSAE, saes.GatedTrainingSAEConfig, penalty),
        "matryoshka": (MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig, top_k | widths),
    }[options.variant]
    sae = make_sae(make_config(**extra, **shape))
    settings = SAETrainerConfig(
        total_training_samples=options.steps * options.batch_size,
        train_batch_size_samples=options.batch_size,
        lr=options.lr,
        lr_end=options.lr / 10,  # the constant schedule ignores this, but requires it
        lr_warm_up_steps=options.warmup_lr_steps,
        lr_decay_steps=options.decay_steps,
        autocast=options.precision == "bfloat16",
        dead_feature_window=max(1, options.dead_tokens // options.batch_size),
        logger=LoggingConfig(log_to_wandb=False),
    )

    def train(batches: Batches) -> None:
        SAETrainer(settings, sae, batches).fit()

    def weights() -> Weights:
        encoder, decoder, b_enc, b_dec = sae.W_enc.T, sae.W_dec, sae.b_enc, sae.b_dec
        if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
            norm = decoder.norm(dim=1)
            encoder, b_enc, decoder = encoder * norm[:, None], b_enc * norm, decoder / norm[:, None]
        if sae.cfg.apply_b_dec_to_input:
            b_enc = b_enc - encoder @ b_dec
        threshold = getattr(sae, "topk_threshold", 0.0)
        return neutral(options, encoder, b_enc, decoder, b_dec, float(threshold))

    return train, weights


def dictionary_learning(options: argparse.Namespace) -> Peer:
    from dictionary_learning import trainers
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    from dictionary_learning.training import trainSAE

    F = options.n_latents
    widths = prefixes(F)
    base, extra = {
        "topk": (trainers.TopKTrainer, {"k": options.k}),
        "batchtopk": (trainers.BatchTopKTrainer, {"k": options.k}),
        "relu": (trainers.StandardTrainer, {"l1_penalty": options.l1, "sparsity_warmup_steps": None}),
        "gated": (trainers.GatedSAETrainer, {"l1_penalty": options.l1, "sparsity_warmup_steps": None}),
        "jumprelu": (trainers.JumpReluTrainer, {"target_l0": float(options.k), "sparsity_warmup_steps": None}),
        "matryoshka": (
            MatryoshkaBatchTopKTrainer,
            {"k": options.k, "group_fractions": [float(n) / F for n in np.diff([0, *widths])]},
        ),
    }[options.variant]
    made = []

    class Trainer(base):  # to reach the SAE afterwards, and with the window for dead latents that all are given
        def __init__(self, **settings: object) -> None:
            super().__init__(**settings)
            if hasattr(self, "dead_feature_threshold"):
                self.dead_feature_threshold = options.dead_tokens
            made.append(self)

    settings = {
        "trainer": Trainer, "steps": options.steps, "activation_dim": options.d_model, "dict_size": F, "layer": 0,
        "lm_name": "none", "lr": options.lr, "warmup_steps": options.warmup_lr_steps, "seed": options.seed,
        "decay_start": options.steps - options.decay_steps if options.decay_steps else None, "device": "cpu", **extra,
    }  # fmt: skip

    def train(batches: Batches) -> None:
        # the package turns its own autocast off on a CPU, so one is set up here
        outer = torch.autocast("cpu", torch.bfloat16) if options.precision == "bfloat16" else nullcontext()
        with outer:
            trainSAE(batches, [settings], steps=options.steps, device="cpu")

    def weights() -> Weights:
        ae = made[0].ae
        b_dec = ae.b_dec if hasattr(ae, "b_dec") else ae.bias
        encoder, decoder = ae.encoder.weight, ae.decoder.weight.T
        b_enc = ae.encoder.bias - encoder @ b_dec
        threshold = float(ae.threshold) if options.variant == "batchtopk" else 0.0
        return neutral(options, encoder, b_enc, decoder, b_dec, threshold)

    return train, weights


def overcomplete(options: argparse.Namespace) -> Peer:
    from overcomplete import sae as package
    from overcomplete.sae.losses import mse_l1
    from overcomplete.sae.train import train_sae, train_sae_amp

    kinds = {
        "topk": (package.TopKSAE, {"top_k": options.k}), "jumprelu": (package.JumpSAE, {}), "relu": (package.SAE, {}),
        "batchtopk": (package.BatchTopKSAE, {"top_k": options.k * options.batch_size}),
    }  # fmt: skip
    if options.variant not in kinds:
        raise NotImplementedError(f"overcomplete has no {options.variant}")
    make_sae, extra = kinds[options.variant]
    model = make_sae(options.d_model, options.n_latents, **extra)

    def mse(x: Tensor, x_hat: Tensor, *rest: Tensor) -> Tensor:
        return (x - x_hat).square().mean()

    def penalized(x: Tensor, x_hat: Tensor, pre_codes: Tensor, codes: Tensor, dictionary: Tensor) -> Tensor:
        return mse_l1(x, x_hat, pre_codes, codes, dictionary, penalty=options.l1)

    criterion = mse if "topk" in options.variant else penalized
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(options, step))
    loop = train_sae_amp if options.precision == "bfloat16" else train_sae

    def train(batches: Batches) -> None:
        loop(model, batches, criterion, optimizer, scheduler, nb_epochs=1, monitoring=0, device="cpu")

    def weights() -> Weights:
        model.eval()
        linear, norm = model.encoder.final_block
        encoder, b_enc = linear.weight, linear.bias
        if isinstance(norm, nn.BatchNorm1d):
            factor = norm.weight / (norm.running_var + norm.eps).sqrt()
            encoder, b_enc = encoder * factor[:, None], (b_enc - norm.running_mean) * factor + norm.bias
        threshold = float(getattr(model, "running_threshold", None) or 0.0)
        return neutral(options, encoder, b_enc, model.get_dictionary(), torch.zeros(options.d_model), threshold)

    return train, weights


def dense(options: argparse.Namespace) -> Peer:
    """PatchSAE's ReLU + L1 (arXiv 2412.05276) on dense arrays, without its ghost gradients and logging."""
    if options.variant != "relu":
        raise NotImplementedError(f"PatchSAE has no {options.variant}")
    D, F = options.d_model, options.n_latents
    encoder = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(D, F)))
    decoder = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(F, D)))
    b_enc, b_dec = nn.Parameter(torch.zeros(F)), nn.Parameter(torch.zeros(D))
    parameters = [encoder, b_enc, decoder, b_dec]
    optimizer = torch.optim.Adam(parameters, lr=options.lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(options, step))

    def step(x: Tensor) -> None:
        with torch.no_grad():
            decoder.div_(decoder.norm(dim=1, keepdim=True))
        with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bfloat16"):
            z = torch.relu((x - b_dec) @ encoder + b_enc)
            x_hat = z @ decoder + b_dec
        reconstruction = ((x_hat.float() - x).square() / x.norm(dim=1, keepdim=True)).mean()
        loss = reconstruction + options.l1 * z.float().abs().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            grad = decoder.grad
            grad -= (grad * decoder).sum(1, keepdim=True) * decoder
        optimizer.step()
        scheduler.step()

    def train(batches: Batches) -> None:
        for x in batches:
            step(x)

    def weights() -> Weights:
        norm = decoder.norm(dim=1, keepdim=True)
        return neutral(options, encoder.T, b_enc - b_dec @ encoder, decoder / norm, b_dec)

    return train, weights


PEERS = {
    "saelens": saelens,
    "saelens-sparse": saelens,
    "dictionary_learning": dictionary_learning,
    "overcomplete": overcomplete,
    "dense": dense,
}


def prefixes(n_latents: int) -> list[int]:
    """Matryoshka: the number of latents of each nested dictionary."""
    return [n_latents // 8, n_latents // 4, n_latents // 2, n_latents]


def rate(options: argparse.Namespace, step: int) -> float:
    """The learning rate relative to its peak, with linear warm-up and linear decay."""
    warm = min(1.0, (step + 1) / max(1, options.warmup_lr_steps))
    return min(warm, (options.steps - step) / options.decay_steps) if options.decay_steps else warm


def neutral(
    options: argparse.Namespace, encoder: Tensor, b_enc: Tensor, decoder: Tensor, b_dec: Tensor, threshold: float = 0.0
) -> Weights:
    """z = relu(encoder x + b_enc), the k largest (topk) or those above a threshold; x^ = decoder^T z + b_dec."""
    arrays = {"encoder": encoder, "b_enc": b_enc, "decoder": decoder, "b_dec": b_dec}
    sparsity = {"k": np.array(options.k)} if options.variant == "topk" else {"threshold": np.array(threshold)}
    return {name: np.ascontiguousarray(value.detach().float().numpy()) for name, value in arrays.items()} | sparsity


def make_parser() -> argparse.ArgumentParser:
    made = parser(
        __doc__, variant="topk", n_latents=12288, k=32, l1=8e-5, batch_size=4096, d_model=768, steps=5,
        warmup_lr_steps=0, decay_steps=0, dead_tokens=10_000_000, seed=0, threads=2,
    )  # fmt: skip
    made.add_argument("--peer", required=True)
    made.add_argument(
        "--l0", type=int, default=150, help="active latents per token of a timed relu, where that matters"
    )
    made.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    made.add_argument("--warmup", type=int, default=1, help="number of steps before timing starts")
    made.add_argument(
        "--lr", type=float, default=1e-7,
        help="learning rate; the default leaves the weights, and so L0, nearly unchanged",
    )  # fmt: skip
    made.add_argument("--data", required=True, help="a .npy of float16 rows [N, D], centered and scaled")
    made.add_argument("--save", help="where to save the final weights (.npz)")
    return made


def versions() -> dict[str, str]:
    versions = {}
    for name in ("torch", "numpy", "sae-lens", "dictionary-learning", "overcomplete"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def work(options: argparse.Namespace, peer: Callable[[argparse.Namespace], Peer]) -> None:
    """Train one peer, and print the time and memory it took."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    rows = torch.from_numpy(np.load(options.data)).float()
    options.d_model = rows.shape[1]
    before = peak_gb()
    batches = Batches(rows, options.steps, options.batch_size, options.seed)
    train, weights = peer(options)
    train(batches)
    batches.finish()
    if len(batches.ended) != options.steps:
        raise RuntimeError(f"{options.peer} took {len(batches.ended)} steps of {options.steps}")
    seconds = statistics.median(batches.seconds(options.warmup))
    if options.save:
        np.savez(options.save, **weights())
    result = {
        "peer": options.peer, "variant": options.variant, "precision": options.precision, "step_s": seconds,
        "tokens_per_s": options.batch_size / seconds, "peak_rss_gb": peak_gb(), "rss_before_gb": before,
        "versions": versions(),
    }  # fmt: skip
    print("\n" + json.dumps(result))


def main() -> None:
    options = make_parser().parse_args()
    work(options, PEERS[options.peer])


if __name__ == "__main__":
    main()
