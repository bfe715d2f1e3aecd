"""`qcompile demo`: the whole route on a model that is trained on the spot."""

from __future__ import annotations

from pathlib import Path


def demo(*, epochs: int = 30, output: Path | None = None) -> int:
    """Train a small vision transformer on scikit-learn's digits, and take it to FP8 and NVFP4 engines.

    The model is trained on real images, quantized with some of them, exported, verified, run in ONNX Runtime on the
    images held out (NVFP4, which that does not run, as a program), and built for SM89 and SM120 (NVFP4 for SM120),
    beside the unquantized float16 model. One table tells accuracy, sizes, kernels, fused attentions and GEMMs. About
    two minutes; exit code 1 if accuracy or fusion falls short.

    Parameters
    ----------
    epochs:
        Length of the training.
    output:
        Keep the files in this directory. Without it they go to a temporary one.
    """
    from qcompile.cli.demo_route import run_demo

    return run_demo(epochs=epochs, output=output)
