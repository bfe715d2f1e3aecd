#!/usr/bin/env bash
# onnxscript's optimizer, which torch.onnx.export runs by default, writes a file that does not load where a model clamps
# one tensor twice by stored bounds.
#
# Versions: torch 2.13.0, onnxscript 0.7.2, onnx-ir 1.1.0, onnx 1.23.2.
# clamp with tensors becomes Max and Min; the optimizer fuses the two into a Clip and names the bounds after the input.
# For the second Clip of the same input the bounds get names of their own and are not registered as initializers: nodes
# read values that nothing makes, and the checker says that the graph is not sorted. One clamp alone is right, and so is
# the file with optimize=False. Clipped linear layers, as in audio towers of Gemma, have several such clamps.
# What helps: optimize=False, or registering the constants that nodes read and the graph lacks.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 onnxscript==0.7.2 onnx-ir==1.1.0 onnx==1.23.2 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import onnx
import torch


class Clamps(torch.nn.Module):
    """`count` clamps of one tensor, each by bounds of its own."""

    def __init__(self, count):
        super().__init__()
        self.count = count
        for i in range(count):
            self.register_buffer(f"low{i}", torch.tensor(-1.0 - i))
            self.register_buffer(f"high{i}", torch.tensor(1.0 + i))

    def forward(self, x):
        y = torch.relu(x) - 0.5
        return [torch.clamp(y, getattr(self, f"low{i}"), getattr(self, f"high{i}")) for i in range(self.count)]


def checked(count, optimize):
    """What the checker says of the exported file."""
    model = Clamps(count).eval()
    exported = torch.onnx.export(model, (torch.randn(4, 8),), dynamo=True, optimize=optimize, verbose=False)
    try:
        onnx.checker.check_model(exported.model_proto, full_check=True)
    except onnx.checker.ValidationError as error:
        return str(error).splitlines()[0]
    return "valid"


found = {(count, optimize): checked(count, optimize) for count in (1, 2) for optimize in (True, False)}
for (count, optimize), said in found.items():
    print(f"{count} clamps of one tensor, optimize={optimize}: {said}")
as_seen = found[2, True] != "valid" and all(said == "valid" for key, said in found.items() if key != (2, True))
raise SystemExit(0 if as_seen else "behaviour has changed")
PYTHON
