#!/usr/bin/env bash
# torch.onnx.export multiplies with other heads' weights where a model has as many blocks as heads: no word, the shapes fit.
#
# Versions: torch 2.13.0, onnxscript 0.7.2, onnx-ir 1.1.0, onnx 1.23.2, onnxruntime 1.31.1.
# A blocked attention flattens [batch, heads, blocks, length, width] to [batch, heads, blocks * length, width], multiplies
# with weights of [heads, width, n], and takes the blocks apart again. onnxscript's optimizer, which the exporter runs by
# default, writes a Reshape, a MatMul and a Reshape as one MatMul where the sizes before and behind would broadcast.
# With as many blocks as heads they do, and the weights of head h meet block h: the relative error is that of chance.
# With another number of blocks, or with optimize=False, the file is right. Audio towers of Gemma have this form.
# What helps: optimize=False, or onnxscript's rules without one_reshape_matmul_reshape_rule and
# two_reshapes_matmul_reshape_rule.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 onnxscript==0.7.2 onnx-ir==1.1.0 onnx==1.23.2 onnxruntime==1.31.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import numpy
import onnxruntime
import torch

HEADS, LENGTH, WIDTH, COLUMNS = 2, 12, 32, 13


class ByHead(torch.nn.Module):
    """Every head has weights of its own, for all of its blocks."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(HEADS, WIDTH, COLUMNS))

    def forward(self, x):
        batch, heads, blocks, length, width = x.shape
        flat = x.reshape(batch, heads, blocks * length, width)
        return (flat @ self.weight).reshape(batch, heads, blocks, length, COLUMNS)


def error(blocks, optimize):
    """The largest difference of ONNX Runtime's result from torch's, relative to the largest number."""
    torch.manual_seed(0)
    model, x = ByHead().eval(), torch.randn(1, HEADS, blocks, LENGTH, WIDTH)
    exported = torch.onnx.export(model, (x,), dynamo=True, optimize=optimize, verbose=False)
    session = onnxruntime.InferenceSession(exported.model_proto.SerializeToString())
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    want = model(x).detach().numpy()
    return float(numpy.abs(got - want).max() / numpy.abs(want).max())


errors = {(blocks, optimize): error(blocks, optimize) for blocks in (2, 3) for optimize in (True, False)}
for (blocks, optimize), value in errors.items():
    print(f"{HEADS} heads, {blocks} blocks, optimize={optimize}: relative error {value:.2g}")
as_seen = errors[2, True] > 0.5 and all(value < 1e-4 for key, value in errors.items() if key != (2, True))
raise SystemExit(0 if as_seen else "behaviour has changed")
PYTHON
