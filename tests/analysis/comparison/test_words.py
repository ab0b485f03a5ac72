"""The words of a comparison follow from both ends of the intervals: a certain loss is never told as a gain."""

from collections.abc import Sequence

import numpy as np
import pytest

from analysis.classifier.outcomes import Outcome
from analysis.comparison.verdict import Change, Round, conclude, say_latents, say_texts
from analysis.interventions.latent_masks import Condition
from analysis.results import ClassOverlap, CountOverlap, DatasetOverlap, OverlapMeans, Share

N, K = 400, 5
COUNTS: dict[str, int] = {"loss": 100, "uncertain": 200, "gain": 300, "none": 198}
"""How many of 400 images the adapted model tells right, where the base model tells 200."""


def comparison(whole: int, texts: int, own: int, with_base: int, n_rounds: int = 1) -> Sequence[Round]:
    """The base model is right on 200 images, seeing everything or its own latents."""
    label = np.zeros(N, dtype=np.int64)

    def right(n: int, shift: int = 0) -> Outcome:
        return Outcome(label, (np.roll(np.arange(N), shift) >= n).astype(int), label * 1.0)

    outcomes = {
        Condition("base", "all", "original"): right(200), Condition("adapted", "all", "original"): right(whole, 7),
        Condition("base", "all", "swap"): right(texts, 3),
        Condition("base", "base", "class", K, 0, True): right(200),
        Condition("adapted", "adapted", "class", K, 0, True): right(own, 7),
        Condition("adapted", "base", "class", K, 0, True): right(with_base, 3),
    }  # fmt: skip
    return [Round(i, np.arange(N, 2 * N), np.arange(N), outcomes) for i in range(n_rounds)]


def overlap() -> CountOverlap:
    means = OverlapMeans(0.5, 0.5, 1, 1, 1)
    rest = (0.5, 0.5, 1, 1, 1, (), (), ())
    return CountOverlap((ClassOverlap(*rest, class_="a"),), means, DatasetOverlap(*rest, 0.5, 0.5), ((), (), ()))


@pytest.mark.parametrize("n_rounds", [1, 3])
@pytest.mark.parametrize("whole", ["loss", "uncertain", "gain"])
@pytest.mark.parametrize("texts", ["loss", "uncertain", "gain"])
@pytest.mark.parametrize("own", ["loss", "uncertain", "gain"])
@pytest.mark.parametrize("with_base", ["loss", "uncertain", "gain"])
def test_every_combination_of_signs_has_its_words(
    n_rounds: int, whole: str, texts: str, own: str, with_base: str
) -> None:
    rounds = comparison(*(COUNTS[name] for name in (whole, texts, own, with_base)), n_rounds)
    found = conclude(rounds, overlap(), K, 50, 0)
    parts = found.sentence.split(". ")
    words = {"loss": "a certain loss", "uncertain": "an uncertain change", "gain": "a certain gain"}
    assert words[whole] in parts[0]
    latents, text = found.sentence[len(parts[0]) :].split("The whole change" if whole != "gain" else "Its texts")
    assert words[own] in latents
    said = {
        "gain": "needs no new concept",
        "loss": "all of the gain needs new latents",
        "uncertain": "not certainly above",
    }
    for sign, phrase in said.items():
        assert (phrase in latents) == (own == "gain" and with_base == sign)
    if own != "gain":
        assert "of that gain" not in latents
        assert found.without_new_concepts.share is None
        assert found.without_new_concepts.change == ("loss" if own == "loss" else None)
    accounts = {"gain": "account for", "loss": "account for none", "uncertain": "not certainly above zero"}
    if whole == "gain":
        assert accounts[texts] in text
        assert ("account for none" in text) == (texts == "loss")
        assert ("not certainly above zero" in text) == (texts == "uncertain")
    else:
        assert ("is a loss" in text) == (whole == "loss")
        assert "account for" not in text
        assert found.text_only.share is None
    assert found.points == pytest.approx(100 * (COUNTS[whole] - 200) / N)
    assert found.interval is not None
    assert found.interval[0] <= found.points <= found.interval[1]
    assert "make" not in found.sentence


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [
        (-2, -1, "loss"),
        (-1, 0, "uncertain"),
        (-1, 1, "uncertain"),
        (0, 0, "uncertain"),
        (0, 1, "uncertain"),
        (1, 2, "gain"),
    ],
)
def test_a_change_is_certain_only_if_zero_lies_outside(low: float, high: float, word: str) -> None:
    change = Change((low + high) / 2, low, high)
    assert change.word == word
    for said in (say_latents(Share(None, None, None), change, 5), say_texts(Share(None, None, None), change)):
        assert ("account" in said or "keeps" in said) is False


def test_a_share_that_is_not_known_says_why() -> None:
    assert Share(None, None, None).say() == "no share, because no gain is certain"
    assert Share(None, None, None, "loss").say() == "no share, because the loss is certain"
    assert Share(0.5, 0.25, 0.75).say() == "50% (25% to 75%)"
