#!/usr/bin/env bash
# torch.onnx.export writes bfloat16 activations that its own opset does not have, and reports success.
#
# Versions: torch 2.13.0, onnx 1.23.2, onnxscript 0.7.2.
# ONNX gives HardSwish, Softplus, Elu, Mish, Selu and HardSigmoid bfloat16 in opset 22, and Einsum in none up to 23. The
# exporter writes them at opset 18 (its default is below 22, too) and 21 all the same, for Einsum at 22 and 23, with no cast, warning or
# error. onnx.checker with full_check refuses each file; without full_check it passes.
# Seen: "X typestr: T, has unsupported type: tensor(bfloat16)".
# What helps: opset_version=22 or later for bfloat16 models, and products in place of einsum.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 onnx==1.23.2 onnxscript==0.7.2 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import logging

import onnx
import torch
from torch import nn

logging.disable(logging.WARNING)


class Product(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return torch.einsum("bsk,nk->bsn", x, self.weight)


modules = {"HardSwish": nn.Hardswish(), "Softplus": nn.Softplus(), "Elu": nn.ELU(), "Mish": nn.Mish(),
           "Selu": nn.SELU(), "HardSigmoid": nn.Hardsigmoid(), "Einsum": Product()}
failed = False
for name, module in modules.items():
    for opset in (18, 21, 22, 23):
        x = torch.randn(2, 4, 8, dtype=torch.bfloat16)
        program = torch.onnx.export(module.to(torch.bfloat16).eval(), (x,), dynamo=True, opset_version=opset, verbose=False)
        model = program.model_proto
        assert name in [node.op_type for node in model.graph.node]
        onnx.checker.check_model(model)
        try:
            onnx.checker.check_model(model, full_check=True)
            verdict = "valid"
        except onnx.shape_inference.InferenceError as error:
            verdict = "bfloat16 refused" if "unsupported type: tensor(bfloat16)" in str(error) else str(error)
        expected = "valid" if opset >= 22 and name != "Einsum" else "bfloat16 refused"
        print(f"{name:12} opset {opset}: {verdict}")
        failed |= verdict != expected
raise SystemExit("this has changed" if failed else 0)
PYTHON
