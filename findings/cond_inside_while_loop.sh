#!/usr/bin/env bash
# torch.onnx.export writes torch.cond and while_loop each alone, but no cond inside of a while_loop.
#
# Versions: torch 2.13.0, onnxscript 0.7.2, onnx-ir 1.1.0, onnx 1.23.2.
# torch.export captures a while_loop whose body has a torch.cond (decoding that stops or chooses by data). The exporter
# makes a function of each subgraph, in the domain pkg.torch.__subgraph__, and inlines them at the end; with one inside
# another its inliner finds two versions of that domain: PassError, "Opset mismatch when inlining". A cond in a cond,
# and each operator by itself, are written.
# What helps: torch.where in place of the inner cond, where both sides may be computed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 onnxscript==0.7.2 onnx-ir==1.1.0 onnx==1.23.2 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch._higher_order_ops import while_loop


def choose(x):
    return torch.cond(x.sum() > 0, lambda a: a.sin(), lambda a: a.cos(), (x,))


def repeat(x, body):
    return while_loop(lambda i, x: i < 3, lambda i, x: (i + 1, body(x)), (torch.tensor(0), x))[1]


FORMS = {
    "cond": choose,
    "while_loop": lambda x: repeat(x, torch.sin),
    "cond in cond": lambda x: torch.cond(x.sum() > 1, choose, lambda a: a.tan(), (x,)),
    "cond in while_loop": lambda x: repeat(x, choose),
}


class Model(torch.nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form = form

    def forward(self, x):
        return self.form(x)


def written(form):
    program = torch.export.export(Model(form), (torch.ones(3),))
    try:
        torch.onnx.export(program, dynamo=True, verbose=False)
    except Exception as error:
        causes = f"{error} {error.__cause__}"
        return "Opset mismatch when inlining" if "Opset mismatch when inlining" in causes else causes
    return "written"


found = {name: written(form) for name, form in FORMS.items()}
for name, said in found.items():
    print(f"{name}: {said}")
nested = found.pop("cond in while_loop")
as_seen = nested == "Opset mismatch when inlining" and set(found.values()) == {"written"}
raise SystemExit(0 if as_seen else "behaviour has changed")
PYTHON
