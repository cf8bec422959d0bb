"""The bench behind the defaults: small tasks of many kinds, each with its network, epochs and
strengths.

Every task is split by the seed. Images are in 0 .. 1, tables are standardised by their training
part. `eps` (PGD, L-infinity) and `noise` (sigma at the input) are strengths that hurt a plainly
trained network a lot.
"""

from __future__ import annotations

import functools
import gzip
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from vision_setup import ResidualBlock

# Debian's package dataset-fashion-mnist, or a folder with the four idx files, packed or not
FASHION = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))


@dataclass(frozen=True)
class Task:
    """load() gives x [N, ...] and y [N]; the first `train` of a permutation are for training."""

    load: Callable[[], tuple[Tensor, Tensor]]
    net: Callable[[], nn.Module]
    train: int
    epochs: int
    batch: int
    eps: float
    noise: float
    image: bool = False
    regression: bool = False


@dataclass(frozen=True)
class Split:
    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


MAX_TEST = 1500


def split(task: Task, seed: int) -> Split:
    x, y = _data(task.load)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order[: task.train], order[task.train : task.train + MAX_TEST]
    x_train, x_test, y_train, y_test = x[train], x[test], y[train], y[test]
    if not task.image:
        mean, std = x_train.mean(0), x_train.std(0).clamp(min=1e-6)
        x_train, x_test = (x_train - mean) / std, (x_test - mean) / std
    if task.regression:
        mean, std = y_train.mean(0), y_train.std(0)
        y_train, y_test = (y_train - mean) / std, (y_test - mean) / std
    return Split(x_train, y_train, x_test, y_test)


def validation(task: Task, data: Split) -> tuple[Task, Split]:
    """The last quarter of the training part in the test part's place."""
    cut = len(data.x) * 3 // 4
    return replace(task, train=cut), Split(data.x[:cut], data.y[:cut], data.x[cut:], data.y[cut:])


@cache
def _data(load: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return load()


# ---- data ----------------------------------------------------------------------------------------


def tensors(x: np.ndarray, y: np.ndarray, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    target = torch.as_tensor(y)
    target = target.float()[:, None] if target.is_floating_point() else target.long()
    return torch.tensor(x, dtype=torch.float32) / scale, target


def from_sklearn(
    name: str, scale: float = 1.0, **options: float
) -> Callable[[], tuple[Tensor, Tensor]]:
    """What sklearn.datasets.NAME gives: load_... or make_... with its options."""

    def load() -> tuple[Tensor, Tensor]:
        import sklearn.datasets

        given = {"return_X_y": True} if name.startswith("load_") else options
        return tensors(*getattr(sklearn.datasets, name)(**given), scale=scale)

    return load


def _digit_images() -> tuple[Tensor, Tensor]:
    x, y = DIGITS()
    return x.unflatten(1, (1, 8, 8)), y


def fashion() -> tuple[Tensor, Tensor]:
    def read(name: str, header: int) -> np.ndarray:
        packed, plain = FASHION / f"{name}.gz", FASHION / name
        if not (packed.exists() or plain.exists()):
            raise FileNotFoundError(
                f"FASHION_MNIST: expected Fashion-MNIST's idx files, such as {name}.gz, in "
                f"{FASHION}, got none; install Debian's dataset-fashion-mnist, or set "
                "FASHION_MNIST to the folder that has them"
            )
        data = gzip.decompress(packed.read_bytes()) if packed.exists() else plain.read_bytes()
        return np.frombuffer(data, np.uint8, offset=header)

    x = read("train-images-idx3-ubyte", 16).reshape(-1, 784)[:6000]
    return tensors(x, read("train-labels-idx1-ubyte", 8)[:6000].astype(np.int64), 255.0)


def _fashion_images() -> tuple[Tensor, Tensor]:
    x, y = _data(fashion)
    return x.unflatten(1, (1, 28, 28)), y


def _mnist1d() -> tuple[Tensor, Tensor]:
    from mnist1d.data import get_dataset_args, make_dataset

    data = make_dataset(get_dataset_args())
    return tensors(
        np.concatenate([data["x"], data["x_test"]]), np.concatenate([data["y"], data["y_test"]])
    )


def _cover() -> tuple[Tensor, Tensor]:
    """Like covertype: ten numbers, of which some depend on others, and two one-hot factors."""
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((4000, 5))
    numbers = hidden @ rng.standard_normal((5, 10)) + 0.3 * rng.standard_normal((4000, 10))
    area, soil = rng.integers(0, 4, 4000), rng.integers(0, 16, 4000)
    score = np.tanh(hidden @ rng.standard_normal((5, 24))) @ rng.standard_normal((24, 5))
    score += 1.5 * rng.standard_normal((4, 5))[area] + 1.5 * rng.standard_normal((16, 5))[soil]
    return tensors(np.concatenate([numbers, np.eye(4)[area], np.eye(16)[soil]], 1), score.argmax(1))


def _topics() -> tuple[Tensor, Tensor]:
    """Like embeddings of texts: documents of eight topics, their words' vectors averaged."""
    rng = np.random.default_rng(0)
    words = rng.standard_normal((2000, 64)) * rng.gamma(1.0, 1.0, (1, 64))
    topics = rng.dirichlet(np.full(2000, 0.02), 8)
    label = rng.integers(0, 8, 3000)
    mixed = [0.4 * topics[y] + 0.6 * topics.mean(0) for y in range(8)]
    x = np.stack([rng.multinomial(60, mixed[y] / mixed[y].sum()) @ words / 60 for y in label])
    return tensors(x, label)


# ---- networks ------------------------------------------------------------------------------------


def mlp(*sizes: int, batch_norm: bool = False) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        layers: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise(sizes[:-1]):
            norm = [nn.BatchNorm1d(fan_out)] if batch_norm else []
            layers += [nn.Linear(fan_in, fan_out), *norm, nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))

    return make


def cnn(side: int, stride: int, batch_norm: bool = False) -> Callable[[], nn.Module]:
    def norm(kind: type[nn.Module], width: int) -> list[nn.Module]:
        return [kind(width)] if batch_norm else []

    def make() -> nn.Module:
        left = side // stride // stride
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, stride, 1),
            *norm(nn.BatchNorm2d, 16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride, 1),
            *norm(nn.BatchNorm2d, 32),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * left * left, 64),
            *norm(nn.BatchNorm1d, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )

    return make


def resnet() -> nn.Module:
    """Of 8 x 8 images, three blocks."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, 1, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        ResidualBlock(16, 16, 1, shortcut_norm=True),
        ResidualBlock(16, 32, 2, shortcut_norm=True),
        ResidualBlock(32, 48, 2, shortcut_norm=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(48, 10),
    )


class ViT(nn.Module):
    """16 patches, of 2 x 2 of an 8 x 8 image where nothing else is said; blocks of width
    48."""

    def __init__(self, side: int = 8, patch: int = 2, blocks: int = 2) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 48, patch, patch)
        self.place = nn.Parameter(0.02 * torch.randn((side // patch) ** 2, 48))
        block = nn.TransformerEncoderLayer(
            48, 4, 96, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, blocks, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(48), nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2) + self.place
        return self.head(self.norm(self.blocks(tokens)).mean(1))


_classes = functools.partial(
    from_sklearn, "make_classification", n_samples=3000, class_sep=1.5, random_state=0
)
DIGITS = from_sklearn("load_digits", 16.0)
TASKS = {
    "digits MLP": Task(DIGITS, mlp(64, 256, 256, 10), 500, 100, 100, 0.1, 0.5, image=True),
    "digits CNN": Task(_digit_images, cnn(8, 1), 500, 50, 50, 0.1, 0.4, image=True),
    "digits ViT": Task(_digit_images, ViT, 500, 60, 50, 0.1, 0.4, image=True),
    "fashion MLP": Task(fashion, mlp(784, 256, 256, 10), 1000, 50, 100, 0.05, 0.5, image=True),
    "fashion CNN": Task(_fashion_images, cnn(28, 2), 1000, 50, 50, 0.05, 0.3, image=True),
    "mnist1d": Task(_mnist1d, mlp(40, 128, 128, 10), 2000, 60, 100, 0.1, 0.4),
    "breast_cancer": Task(
        from_sklearn("load_breast_cancer"), mlp(30, 64, 64, 2), 300, 100, 50, 0.4, 1.5
    ),
    "wine": Task(from_sklearn("load_wine"), mlp(13, 64, 64, 3), 90, 100, 30, 0.6, 1.5),
    "iris": Task(from_sklearn("load_iris"), mlp(4, 32, 32, 3), 75, 150, 25, 0.3, 0.5),
    "classes 20": Task(
        _classes(n_features=20, n_informative=8, n_redundant=6, n_classes=4),
        mlp(20, 128, 128, 4),
        600,
        60,
        50,
        0.3,
        1.0,
    ),
    "classes 60": Task(
        _classes(n_features=60, n_informative=6, n_redundant=0, n_classes=3),
        mlp(60, 128, 128, 3),
        600,
        60,
        50,
        0.2,
        1.0,
    ),
    "moons": Task(
        from_sklearn("make_moons", n_samples=3000, noise=0.15, random_state=0),
        mlp(2, 64, 64, 2),
        300,
        100,
        50,
        0.2,
        0.4,
    ),
    "quantiles": Task(
        from_sklearn(
            "make_gaussian_quantiles", n_samples=4000, n_features=8, n_classes=3, random_state=0
        ),
        mlp(8, 64, 64, 3),
        1000,
        80,
        50,
        0.1,
        0.3,
    ),
    "cover": Task(_cover, mlp(30, 128, 128, 5), 1500, 50, 100, 0.2, 0.5),
    "topics": Task(_topics, mlp(64, 128, 128, 8), 600, 60, 50, 0.3, 1.0),
    "diabetes": Task(
        from_sklearn("load_diabetes"), mlp(10, 64, 64, 1), 250, 100, 50, 0.3, 1.0, regression=True
    ),
    "friedman": Task(
        from_sklearn("make_friedman1", n_samples=3000, n_features=10, noise=1.0, random_state=0),
        mlp(10, 64, 64, 1),
        500,
        100,
        50,
        0.1,
        0.3,
        regression=True,
    ),
}
