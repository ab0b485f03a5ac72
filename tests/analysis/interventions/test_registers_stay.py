"""Where an SAE is spliced into a stream, it replaces the tokens that it was asked for; registers and prompts stay."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from actcache.store import StoreLayout
from analysis.classifier import splice
from saetrain import SAE, SAEConfig

D_MODEL = 12
ASKED = ("all", "patch", "cls")
PREFIXES = ((), ("cls",), ("reg",), ("cls", "dist"), ("cls", "reg", "reg", "reg", "reg"))


@pytest.fixture
def sae() -> SAE:
    network = SAE(SAEConfig(n_latents=20, k=3).resolve(D_MODEL), D_MODEL, seed=0)
    network.set_normalization(np.linspace(-1, 1, D_MODEL), 2.0)
    return network


def kinds_of(layout: StoreLayout) -> list[str]:
    return [*layout.prefix, *["patch"] * layout.n_patches, *["prompt"] * layout.n_extra]


@pytest.mark.parametrize(
    ("prefix", "tokens"),
    [(prefix, tokens) for prefix in PREFIXES for tokens in ("all", "patch", *prefix[:1]) if tokens in ASKED],
    ids=str,
)
@pytest.mark.parametrize("n_extra", [0, 2])
def test_only_the_tokens_asked_for_are_replaced(sae: SAE, prefix: tuple[str, ...], tokens: str, n_extra: int) -> None:
    layout = StoreLayout(3, (2, 3), D_MODEL, 16, 16, n_extra, prefix=prefix)
    x = torch.randn(3, layout.n_stream, D_MODEL, generator=torch.Generator().manual_seed(1))
    wanted = ["cls", "patch"] if tokens == "all" else [tokens]
    replaced = torch.tensor([kind in wanted for kind in kinds_of(layout)])
    places, others = torch.nonzero(replaced)[:, 0], torch.nonzero(~replaced)[:, 0]
    spliced = splice(sae, x, layout, tokens)
    assert torch.equal(spliced.old, x[:, places])
    rows = x[:, places].reshape(-1, D_MODEL)
    whole = sae.decode(*sae.encode(rows), len(rows)).view(3, len(places), D_MODEL)
    edits: dict[str, Callable[[], Tensor]] = {
        "reconstruction": lambda: spliced.whole,
        "with its error": lambda: spliced.whole + spliced.error,
        "moved": lambda: spliced.old + spliced.shift(torch.tensor([4]), torch.tensor([1.5]), add=True),
    }
    for edit in edits.values():
        edited = spliced.stream(edit())
        assert torch.equal(edited[:, others], x[:, others])
        assert torch.equal(edited[:, places], edit())
    assert torch.equal(spliced.whole, whole)
    assert torch.equal(spliced.x, x)  # the stream itself is left alone
    table = torch.zeros(3, 20, dtype=torch.bool)
    table[1] = True  # all latents of the second image
    kept = spliced.keep(table)
    assert torch.equal(kept[1], whole[1])
    assert torch.equal(kept[0], spliced.nothing.expand(len(places), -1))


def test_a_stream_of_cls_and_patches_is_cut_by_a_slice(sae: SAE) -> None:
    """Indexing by a list would copy the tokens of every batch."""
    layout = StoreLayout(3, (2, 3), D_MODEL, 16, 16, 2)
    x = torch.randn(3, layout.n_stream, D_MODEL)
    for tokens, part in (("all", slice(0, 7)), ("patch", slice(1, 7)), ("cls", slice(0, 1))):
        assert splice(sae, x, layout, tokens).part == part
