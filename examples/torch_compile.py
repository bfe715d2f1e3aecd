"""Run a model in INT8 under torch.compile: no file, no export, and the weights stay the model's own."""

import torch

import qcompile

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64)).eval()
x = torch.randn(32, 64)

# `expect` makes a call that runs fewer layers quantized an error: nothing falls back without a word.
options = {"recipe": "int8_per_channel_per_token", "expect": {"linear": 2}}
compiled = torch.compile(model, backend="qcompile", options=options)
with torch.no_grad():
    error = (compiled(x) - model(x)).norm() / model(x).norm()
print(f"relative error: {error:.4f}")
assert error < 0.05

print(qcompile.explain(compiled))  # what each layer runs as, and what was left and why
