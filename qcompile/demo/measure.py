"""What the demo measures of each form of the model: accuracy on held-out images, and distance from the original."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qcompile.onnx.session import onnx_session


@dataclass(frozen=True)
class Accuracy:
    """top1: fraction right. error: norm of the logits' difference from the reference over the norm of the reference.

    kl: mean Kullback-Leibler divergence of the predicted distribution from the reference's, in nats.
    """

    top1: float
    error: float
    kl: float


def accuracy(logits: Tensor, labels: Tensor, reference: Tensor) -> Accuracy:
    """Compare logits [N, 10] with labels [N] and with the logits of the original model."""
    logits, reference = logits.double(), reference.double()
    kl = F.kl_div(logits.log_softmax(-1), reference.log_softmax(-1), reduction="batchmean", log_target=True)
    return Accuracy(
        top1=float((logits.argmax(-1) == labels).double().mean()),
        error=float((logits - reference).norm() / reference.norm()),
        kl=float(kl),
    )


def run_onnx(path: Path, images: Tensor) -> Tensor:
    """Logits of an ONNX file with one input, in the input's own type, from ONNX Runtime."""
    session = onnx_session(path)
    (declared,) = session.get_inputs()
    array = images.numpy().astype(np.float16 if declared.type == "tensor(float16)" else np.float32)
    return torch.from_numpy(session.run(None, {declared.name: array})[0])
