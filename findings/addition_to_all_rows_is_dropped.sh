#!/usr/bin/env bash
# torch.onnx.export drops what was there before where a model adds to all rows of a tensor: index_add becomes its source.
#
# Versions: torch 2.13.0, onnxscript 0.7.2, onnx-ir 1.1.0, onnx 1.23.2, onnxruntime 1.31.1.
# index_add, and index_put with accumulate, become a ScatterND with reduction "add". onnxscript's optimizer, which the
# exporter runs by default, replaces a ScatterND whose constant indices are all rows in order by its updates; it does not
# ask for the reduction, so that the sum loses a summand. With the rows in another order, or with optimize=False, the
# file is right. Positions that are added by a stored index, and experts that are summed, have this form.
# What helps: optimize=False, or onnxscript's rules without no_op_static_scatter_nd_rule.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 onnxscript==0.7.2 onnx-ir==1.1.0 onnx==1.23.2 onnxruntime==1.31.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import numpy
import onnxruntime
import torch

ROWS = 4


class Sum(torch.nn.Module):
    """Adds `update` to the rows of `x`, in this order."""

    def __init__(self, order):
        super().__init__()
        self.register_buffer("order", torch.tensor(order))

    def forward(self, x, update):
        return x.index_add(0, self.order, update), x.index_put((self.order,), update, accumulate=True)


def results(order, optimize):
    """Whether each result of ONNX Runtime is torch's, and whether it is the update alone."""
    model, args = Sum(order).eval(), (torch.ones(ROWS, 8), torch.arange(ROWS * 8.0).reshape(ROWS, 8))
    exported = torch.onnx.export(model, args, dynamo=True, optimize=optimize, verbose=False)
    session = onnxruntime.InferenceSession(exported.model_proto.SerializeToString())
    feeds = {value.name: arg.numpy() for value, arg in zip(session.get_inputs(), args)}
    got, want = session.run(None, feeds), [result.numpy() for result in model(*args)]
    right = all(numpy.array_equal(a, b) for a, b in zip(got, want))
    return "right" if right else "the update alone" if all(numpy.array_equal(a, args[1].numpy()) for a in got) else "other"


cases = [(order, optimize) for order in ([0, 1, 2, 3], [1, 0, 2, 3]) for optimize in (True, False)]
found = {(str(order), optimize): results(order, optimize) for order, optimize in cases}
for (order, optimize), said in found.items():
    print(f"rows {order}, optimize={optimize}: {said}")
first = ("[0, 1, 2, 3]", True)
as_seen = found[first] == "the update alone" and all(said == "right" for key, said in found.items() if key != first)
raise SystemExit(0 if as_seen else "behaviour has changed")
PYTHON
