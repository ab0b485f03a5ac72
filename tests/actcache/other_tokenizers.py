"""Tokenizers that are not CLIP's, without their files: what is tested is which token the towers make of which place."""

import torch
from torch import Tensor

VOCABULARY = 9003
"""Numbers below this one."""


class Words:
    """A tokenizer as SigLIP's: a number for each word, then 1 at the end, which is its padding too; `.` is no word.

    It has no token for the start.
    """

    def __init__(self, context_length: int = 12) -> None:
        self.context_length = context_length

    def __call__(self, texts: list[str], context_length: int | None = None) -> Tensor:
        context_length = context_length or self.context_length
        rows = []
        for text in texts:
            words = [3 + sum(map(ord, word)) % 9000 for word in text.lower().split() if word != "."]
            ids = [*words[: context_length - 1], 1]
            rows.append(ids + [1] * (context_length - len(ids)))
        return torch.tensor(rows)


class Ended(Words):
    """The same with 2 at the end and 0 as padding."""

    def __call__(self, texts: list[str], context_length: int | None = None) -> Tensor:
        ids = super().__call__(texts, context_length)
        context_length = ids.shape[1]
        ended = torch.where(ids == 1, 0, ids)
        for row in ended:
            row[int((row != 0).sum().clamp(max=context_length - 1))] = 2
        return ended
