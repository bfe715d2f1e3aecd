"""Token by token against the program: what passes, and files that forget or compute something else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from qcompile.errors import VerificationError
from qcompile.generation.verify import require_steps, verify_steps

TOKENS = torch.arange(40).reshape(2, 20)


def test_every_step_is_the_programs(made: Callable[..., Any]) -> None:
    folder, program = made(None)
    report = verify_steps(folder / "model.onnx", program, TOKENS, context=96)
    require_steps(report)
    assert report.passed and max(step.error for step in report.steps) < 1e-5
    assert [(s.past, s.new) for s in report.steps if s.past == 0] == [(0, 1), (0, 8), (0, 16)]
    assert len(report.steps) == 3 * 33 and type(report).from_json(report.to_json()) == report


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["fp8+fp8_kv", "int8+int8_kv"])
def test_codes_in_float32_are_the_programs(made: Callable[..., Any], recipe: str) -> None:
    folder, program = made(recipe)
    report = verify_steps(folder / "model.onnx", program, TOKENS, context=96)
    assert report.passed and np.median([step.error for step in report.steps]) < 1e-5


def test_files_that_do_something_else_fail(made: Callable[..., Any], tmp_path: Path) -> None:
    folder, program = made(None)

    def failure(change: Callable[[onnx.GraphProto], None]) -> str:
        model = onnx.load(folder / "model.onnx")
        change(model.graph)
        onnx.save(model, tmp_path / "model.onnx")
        with pytest.raises(VerificationError) as caught:
            require_steps(verify_steps(tmp_path / "model.onnx", program, TOKENS, steps=2, context=96))
        return str(caught.value)

    def forget(graph: onnx.GraphProto) -> None:
        """The output is as long as it should be, and holds nothing."""
        for node in list(graph.node):
            for i, name in enumerate(node.output):
                if name.startswith("present."):
                    node.output[i] = f"{name}_kept"
                    zero = numpy_helper.from_array(np.zeros((), np.float32), f"{name}_zero")
                    graph.initializer.append(zero)
                    graph.node.append(onnx.helper.make_node("Mul", [f"{name}_kept", zero.name], [name]))
                    break

    def scale(graph: onnx.GraphProto) -> None:
        weight = next(t for t in graph.initializer if len(t.dims) == 2 and 258 not in t.dims)
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 3, weight.name))

    assert "the second step does not depend on the first" in failure(forget)
    assert "step by step the file is not the program" in failure(scale)
