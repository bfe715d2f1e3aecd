"""A small vision transformer in plain PyTorch, and its training on the images of handwritten digits in scikit-learn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompile.errors import QCompileError

# 8x8 pixels are 16 patches of 2x2, and TensorRT fuses no FP8 attention below 32 tokens: enlarged, they are 36.
IMAGE, PATCH, WIDTH, HEADS, DEPTH = 12, 2, 64, 4, 3
_TEST = 450
_BATCH = 64


@dataclass(frozen=True)
class Digits:
    """Images [N, 1, 12, 12], float32 in -1..1, and labels [N]; test images take no part in training or calibration."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits() -> Digits:
    """The 1797 images of `sklearn.datasets.load_digits` in a fixed split. Raises QCompileError without scikit-learn."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise QCompileError("the demo's images come with scikit-learn: pip install 'qcompile[demo]'") from error
    data = datasets.load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, size=(IMAGE, IMAGE), mode="bilinear", align_corners=False)
    labels = torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[_TEST:], order[:_TEST]
    return Digits(images[train], labels[train], images[test], labels[test])


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.fc1 = nn.Linear(WIDTH, 4 * WIDTH)
        self.fc2 = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, HEADS, WIDTH // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, WIDTH)
        x = x + self.proj(mixed)
        mlp: Tensor = self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return x + mlp


class DigitViT(nn.Module):
    """Vision transformer: images [N, 1, 12, 12] to logits [N, 10], over 36 tokens that are averaged at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(1, WIDTH, PATCH, PATCH)
        # As large as the embedded patches: a model that has to find out first where a patch is learns far slower.
        self.position = nn.Parameter(torch.randn(1, (IMAGE // PATCH) ** 2, WIDTH) * 0.5)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits


@contextmanager
def _one_thread() -> Iterator[None]:
    """The operators are so small that threads wait for each other more than they work, on a busy machine above all."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def train(digits: Digits, epochs: int, tick: Callable[[], None] = lambda: None) -> DigitViT:
    """Train from scratch with a fixed seed; `tick` is called after each epoch. The caller's random state is kept."""
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(0)
        model = DigitViT()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
        steps = epochs * -(-len(digits.images) // _BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
        for _ in range(epochs):
            for chosen in torch.split(torch.randperm(len(digits.images)), _BATCH):
                logits = model(digits.images[chosen])
                loss = F.cross_entropy(logits, digits.labels[chosen], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
            tick()
    return model.eval()
