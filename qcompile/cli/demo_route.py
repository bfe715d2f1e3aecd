"""The demo's route: train, quantize, export, run, build, and say in one table how each form of the model did."""

from __future__ import annotations

import copy
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.export import Dim

import qcompile
from qcompile.cli.console import err, interactive, out, step
from qcompile.demo.measure import accuracy, run_onnx
from qcompile.demo.model import Digits, DigitViT, load_digits, train
from qcompile.demo.table import TARGETS, Row, results_table
from qcompile.engine.backend import find_backend
from qcompile.errors import EngineError, ExpectationError, QCompileError
from qcompile.files import replaced
from qcompile.onnx.session import import_onnxruntime
from qcompile.outputs import check_writable
from qcompile.progress import progress_bar

_CALIBRATION_IMAGES = 128
_TOP1_MARGIN = 0.01


def run_demo(*, epochs: int = 30, output: Path | None = None) -> int:
    """Run the demo and print its table.

    Args:
        epochs: length of the training; 30 reach about 98 %.
        output: existing directory to keep the ONNX files and engines in; None uses a temporary one.

    Returns:
        0, or 1 if an accuracy is more than a point below the model's or an attention is not fused in FP8.

    Raises:
        QCompileError: scikit-learn or ONNX Runtime is not installed; VerificationError: the file failed a check.
    """
    if epochs < 1:
        raise QCompileError(f"{epochs} epochs: the model has to be trained for 1 or more")
    started = time.perf_counter()
    with _folder(output) as folder:
        import_onnxruntime()  # that it is there is known before the training
        targets = [target for target in TARGETS if _builds(target)]
        digits = load_digits()
        model = _trained(digits, epochs)
        rows = _accuracies(model, digits, folder)
        _build(rows, digits, targets)
        out().print(results_table(rows, len(digits.test_images)))
        shortfalls = _shortfalls(rows)
        for shortfall in shortfalls:
            err().print(f"falls short: {shortfall}", style="bold red", markup=False, soft_wrap=True)
    if output is not None:
        step(f"the files are in {output}")
    step(f"done in {time.perf_counter() - started:.0f} s")
    return 1 if shortfalls else 0


@contextmanager
def _folder(output: Path | None) -> Iterator[Path]:
    if output is None:
        with tempfile.TemporaryDirectory(prefix="qcompile-demo-") as folder:
            yield Path(folder)
    else:
        check_writable(output / "vit-fp8.onnx")
        yield output


def _trained(digits: Digits, epochs: int) -> DigitViT:
    step(f"training a vision transformer on {len(digits.images)} images of digits, {epochs} epochs")
    started = time.perf_counter()
    with progress_bar("training", epochs, interactive()) as bar:
        model = train(digits, epochs, bar.advance)
    step(f"trained in {time.perf_counter() - started:.0f} s")
    return model


def _accuracies(model: DigitViT, digits: Digits, folder: Path) -> list[Row]:
    """Write the ONNX files and measure every form of the model on the held-out images."""
    images, labels = digits.test_images, digits.test_labels
    batch = {"images": {0: Dim("batch")}}
    with torch.no_grad():
        reference = model(images)
    rows = [Row("model, float32", accuracy(reference, labels, reference))]

    step("exporting the float16 model with torch.onnx.export, for comparison")
    plain = folder / "vit-fp16.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        half = copy.deepcopy(model).half()
        with replaced(plain) as new:
            torch.onnx.export(
                half, (images[:2].half(),), new, dynamo=True, dynamic_shapes=batch, external_data=False, verbose=False
            )
    rows.append(Row("float16 ONNX", accuracy(run_onnx(plain, images), labels, reference), plain))

    for name, recipe, file in (("FP8", "fp8", "vit-fp8.onnx"), ("NVFP4", "nvfp4_fp8_attention", "vit-nvfp4.onnx")):
        step(f"quantizing with the recipe {recipe}, calibrated with {_CALIBRATION_IMAGES} training images")
        program = qcompile.quantize(
            model,
            (images[:2],),
            recipe=recipe,
            calibration=list(torch.split(digits.images[:_CALIBRATION_IMAGES], 32)),
            dynamic_shapes=batch,
            progress=interactive(),
        )
        with torch.no_grad():
            logits = program.module()(images)
        measured = accuracy(logits, labels, reference)
        step(f"exporting and verifying {file}")
        quantized = folder / file
        qcompile.export_onnx(program, quantized, target="tensorrt")
        if name == "FP8":
            rows.append(Row("FP8 program", measured))
            measured = accuracy(run_onnx(quantized, images), labels, reference)
            rows.append(Row("FP8 ONNX", measured, quantized))
        else:  # ONNX Runtime has no FP4
            rows.append(Row("NVFP4 program", measured, quantized, targets=("sm120",)))
    return rows


def _builds(target: str) -> bool:
    """Whether a builder that is installed builds for `target`; says why not."""
    try:
        find_backend(target)
    except EngineError as error:
        step(f"no engines for {target}: {error}")
        return False
    return True


def _build(rows: list[Row], digits: Digits, targets: list[str]) -> None:
    """Engines of every file for the targets."""
    shape = tuple(digits.images.shape[1:])
    profile = {"images": ((1, *shape), (64, *shape), (len(digits.test_images), *shape))}
    for target in targets:
        for row in rows:
            if row.file is not None and target in row.targets:
                step(f"building {row.file.name} for {target}")
                engine = row.file.with_suffix(f".{target}.engine")
                row.engines[target] = qcompile.build_engine(
                    row.file, engine, target=target, profiles=profile, progress=interactive()
                )


def _shortfalls(rows: list[Row]) -> list[str]:
    """What the quantized forms lack: accuracy against the model, fused attentions in their engines."""
    model, found = rows[0], []
    for row in rows[2:]:
        if row.accuracy.top1 < model.accuracy.top1 - _TOP1_MARGIN:
            found.append(f"{row.name}: top-1 {row.accuracy.top1:.1%}, the model has {model.accuracy.top1:.1%}")
        for engine in row.engines.values():
            try:
                engine.check({"attention_fp8": max(1, engine.attention.total)})
            except ExpectationError as error:
                found.append(str(error))
    return found
