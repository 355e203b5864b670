"""The built-in data: 1797 handwritten digits of 8 × 8 pixels, and prompts that ask for them.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning
Repository (CC BY 4.0), as shipped with scikit-learn.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PHRASINGS = (
    "a handwritten {word}",
    "the digit {numeral}",
    "a photo of the number {word}",
    "handwritten digit {numeral}",
    "a scan of the digit {word}",
    "the number {numeral} in ink",
    "a {word} written by hand",
    "{word}",
)
TEST_SIZE = 360
SPLIT_SEED = 0


@cache
def load_digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """((train images, train labels), (held-out images, held-out labels)): 1437 and 360 digits.

    Images are [n, 1, 8, 8] fp32 in [−1, 1], labels [n] int64. The split is stratified and fixed by
    SPLIT_SEED alone, so that no evaluation ever meets a training digit.
    """
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    data = load()
    train, held_out = train_test_split(
        range(len(data.target)), test_size=TEST_SIZE, stratify=data.target, random_state=SPLIT_SEED
    )
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 8 - 1
    labels = torch.from_numpy(data.target).long()
    return (images[train], labels[train]), (images[held_out], labels[held_out])


def prompts() -> list[str]:
    """All prompts; the one in row i asks for the digit i mod 10."""
    return [
        phrasing.format(word=word, numeral=digit)
        for phrasing in PHRASINGS
        for digit, word in enumerate(WORDS)
    ]
