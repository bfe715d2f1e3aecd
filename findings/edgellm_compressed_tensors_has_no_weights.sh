#!/usr/bin/env bash
# TensorRT Edge-LLM exports a compressed-tensors NVFP4 checkpoint as float16 layers whose weights nothing has set.
#
# Versions: tensorrt-edgellm 0.11.0 with the versions of its extra (torch 2.13.0, transformers 5.14.1, onnx 1.19.0,
# onnxscript 0.7.1), compressed-tensors 0.20.0.
# A Llama in nvfp4-pack-quantized, which transformers reads. tensorrt-edgellm-export does not know quant_method
# compressed-tensors, builds float16 layers, finds no tensor called weight for them, and exports them as they are: what
# happened to be in the memory. The graph passes onnx's full check, the exit code is 0, nothing is said but that 21
# tensors were skipped (INFO). With torch filling memory that is not set by NaN, all weights of these layers are NaN.
# Of FP8 and INT8 in compressed-tensors, and of quant_method fp8, the codes are exported and the scales left out.
# Its experimental builder, in the same wheel, does know this format.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.14.1 compressed-tensors==0.20.0 accelerate==1.15.0 \
  safetensors==0.8.0 onnx==1.19.0 onnxscript==0.7.1 onnx-graphsurgeon==0.6.1 numpy==2.2.6
"$folder/venv/bin/pip" install --quiet --no-deps tensorrt-edgellm==0.11.0
"$folder/venv/bin/python" -W ignore - "$folder" 2> "$folder/errors" <<'PYTHON' || { cat "$folder/errors"; exit 1; }
import subprocess
import sys
from pathlib import Path

import onnx
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from tensorrt_edgellm import AutoModel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

folder = Path(sys.argv[1])
checkpoint = folder / "checkpoint"
torch.manual_seed(0)
sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4}
model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=96)).bfloat16().eval()
ids = torch.arange(8)[None]
with torch.no_grad():
    expected = model(ids).logits.float()

groups = {"config_groups": {"NVFP4A16": ["Linear"]}, "ignore": ["lm_head"], "format": "nvfp4-pack-quantized"}
apply_quantization_config(model, QuantizationConfig(**groups))
for module in model.modules():
    if scheme := getattr(module, "quantization_scheme", None):
        weight = module.weight.data
        total = generate_gparam(weight.min(), weight.max())
        blocks = weight.unflatten(-1, (-1, 16))
        scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), scheme.weights, global_scale=total)
        module.weight_global_scale.data = total.reshape(module.weight_global_scale.shape)
        module.weight_scale.data = scale.to(module.weight_scale.dtype)
compressor = ModelCompressor.from_pretrained_model(model)
compressor.compress_model(model)
model.save_pretrained(checkpoint)
compressor.update_config(checkpoint)
(checkpoint / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
with torch.no_grad():
    read = AutoModelForCausalLM.from_pretrained(checkpoint).eval()(ids).logits.float()
error = float((read - expected).norm() / expected.norm())
print(f"transformers reads it: logits differ from those of bfloat16 by {error:.2f}")

command = [Path(sys.executable).with_name("tensorrt-edgellm-export"), checkpoint, folder / "out"]
run = subprocess.run(command, capture_output=True, text=True)
lines = (run.stdout + run.stderr).splitlines()
told = [line for line in lines if "tensorrt_edgellm" in line and ("WARNING" in line or "ERROR" in line)]
graph = onnx.load(folder / "out/llm/model.onnx")
onnx.checker.check_model(graph, full_check=True)
print(f"tensorrt-edgellm-export: exit {run.returncode}, told: {told}; onnx's full check passes")

torch.use_deterministic_algorithms(True)  # torch.empty is then filled with NaN
loaded = AutoModel.from_pretrained(str(checkpoint))
weights = {name: p for name, p in loaded.named_parameters() if "_proj" in name and name.endswith("weight")}
weights |= {name: b for name, b in loaded.named_buffers() if "_proj" in name and name.endswith("weight")}
unset = [name for name, weight in weights.items() if weight.isnan().all()]
print(f"{len(unset)} of {len(weights)} weights were never set: {', '.join(unset)}")
as_seen = error < 0.3 and run.returncode == 0 and not told and len(unset) == len(weights) == 5
raise SystemExit(0 if as_seen else "behaviour has changed")
PYTHON
