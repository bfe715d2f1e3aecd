#!/usr/bin/env bash
# Model Optimizer's quantizers in torch.nn.TransformerEncoderLayer do nothing in inference: eval mode without gradients
# gives the float model's numbers, bit for bit, and no warning.
#
# Versions: nvidia-modelopt 0.47.0, torch 2.13.0.
# In eval mode and where no gradient is wanted, torch.nn.TransformerEncoderLayer runs one fused operator that reads the
# weights of its linear layers and calls none of them: the quantizers that mtq.quantize put on these see no tensor. With
# gradients, or with torch.backends.mha.set_fastpath_enabled(False), they work. So a model is calibrated, looks quantized,
# keeps its accuracy to the last digit, and is not what is exported. Whoever measures the accuracy of FP8 so measures
# nothing.
# What helps: torch.backends.mha.set_fastpath_enabled(False) for calibration and for every evaluation.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 nvidia-modelopt==0.47.0 requests==2.34.2 transformers==5.23.0 huggingface_hub==2.4.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import copy

import modelopt.torch.quantization as mtq
import torch

torch.manual_seed(0)
layer = torch.nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
x = torch.randn(2, 8, 64)


def calibrate(model):
    model(x)


torch.backends.mha.set_fastpath_enabled(False)
with torch.no_grad():
    quantized = mtq.quantize(copy.deepcopy(layer), mtq.FP8_DEFAULT_CFG, calibrate)
found = {}
for fast in (True, False):
    torch.backends.mha.set_fastpath_enabled(fast)
    with torch.no_grad():
        found[fast] = float((quantized(x) - layer(x)).abs().max())
torch.backends.mha.set_fastpath_enabled(True)
with_gradients = float((quantized(x) - layer(x)).detach().abs().max())
enabled = sum(m.is_enabled for m in quantized.modules() if isinstance(m, mtq.nn.TensorQuantizer))
print(f"{enabled} quantizers are on; largest difference from the float layer:")
print(f"  torch's default, no gradients: {found[True]:.2g}")
print(f"  fast path off, no gradients: {found[False]:.2g}")
print(f"  torch's default, with gradients: {with_gradients:.2g}")
as_seen = enabled > 0 and found[True] == 0 and found[False] > 1e-4 and with_gradients > 1e-4
raise SystemExit(0 if as_seen else "behaviour has changed")
PYTHON
