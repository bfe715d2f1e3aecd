"""What is drawn from, against the warpers of transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qcompile.generation.sampling import Sampling

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.7, 0, 1.0), (1.3, 5, 1.0), (1.0, 0, 0.8), (2.0, 9, 0.5)]
)
def test_probabilities_are_those_of_transformers(temperature: float, top_k: int, top_p: float) -> None:
    logits = torch.randn(4, 40) * 3
    warped = transformers.TemperatureLogitsWarper(temperature)(None, logits)
    warped = transformers.TopKLogitsWarper(top_k)(None, warped) if top_k else warped
    warped = transformers.TopPLogitsWarper(top_p)(None, warped) if top_p < 1 else warped
    sampling = Sampling(temperature, top_k, top_p)
    for row, expected in zip(logits.numpy(), warped.softmax(-1).numpy(), strict=True):
        np.testing.assert_allclose(sampling.probabilities(row), expected, atol=1e-6)


def test_draws_follow_the_probabilities() -> None:
    logits = np.log(np.array([[0.5, 0.3, 0.2]]))
    random = np.random.default_rng(0)
    drawn = np.concatenate([Sampling(1.0).choose(logits, random) for _ in range(2000)])
    np.testing.assert_allclose(np.bincount(drawn, minlength=3) / 2000, [0.5, 0.3, 0.2], atol=0.04)
    assert Sampling().choose(logits, random).tolist() == [0]
