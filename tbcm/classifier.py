"""The judge of the evaluation: a small CNN trained on the real training digits, on the fly."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tbcm import digits

FEATURES = 32
EPOCHS = 16
BATCH = 64
LEARNING_RATE = 3e-3
MAX_SHIFT = 0.1  # of half the image: 0.4 pixel
MAX_TURN = 0.15  # radians


class Classifier(nn.Module):
    """Logits of the ten digits over FEATURES penultimate features."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * 4 * 4, FEATURES), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(FEATURES, 10)

    def features(self, images: Tensor) -> Tensor:
        """[n, 1, 8, 8] in [−1, 1] to [n, FEATURES]."""
        return self.trunk(images)

    def forward(self, images: Tensor) -> Tensor:
        """[n, 1, 8, 8] in [−1, 1] to logits [n, 10]."""
        return self.head(self.features(images))


def augment(images: Tensor) -> Tensor:
    """Each image turned and shifted a little, at random."""
    n = len(images)
    angle = (2 * torch.rand(n) - 1) * MAX_TURN
    shift = (2 * torch.rand(n, 2, 1) - 1) * MAX_SHIFT
    c, s = angle.cos(), angle.sin()
    turn = torch.stack([torch.stack([c, -s], 1), torch.stack([s, c], 1)], 1)
    grid = F.affine_grid(torch.cat([turn, shift], 2), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


@cache
def trained_classifier() -> Classifier:
    """The classifier, trained in a few seconds; the caller's random state is left untouched."""
    (images, labels), _ = digits.load_digits()
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        net = Classifier()
        steps = EPOCHS * (len(images) // BATCH)
        optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps)
        for _ in range(steps):
            pick = torch.randint(len(images), (BATCH,))
            loss = F.cross_entropy(net(augment(images[pick])), labels[pick], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval().requires_grad_(False)


def accuracy(net: Classifier, images: Tensor, labels: Tensor) -> float:
    """Share of the images that the classifier reads as their label."""
    return (net(images).argmax(1) == labels).float().mean().item()
