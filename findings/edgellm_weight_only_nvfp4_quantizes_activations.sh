#!/usr/bin/env bash
# TensorRT Edge-LLM exports Model Optimizer's weight-only NVFP4 as W4A4: activations are quantized, with scales of 1.
#
# Versions: tensorrt-edgellm 0.11.0 with the versions of its extras (torch 2.13.0, transformers 5.14.1,
# nvidia-modelopt 0.45.0, onnx 1.19.0, onnxscript 0.7.1).
# Model Optimizer writes W4A16_NVFP4 for a Llama: packed weights and their scales, no input_scale. tensorrt-edgellm-export
# gives each linear layer NVFP4 weights, and quantizes its input to FP4 as well, with the global scale 1, as there is none
# in the checkpoint. It exits with 0 and says nothing. Its own layers for W4A16_NVFP4 are chosen for Nemotron-H alone, and
# there for MIXED_PRECISION alone.
# The option --no-quantize-activations is no way out: it does not reach q, k and v, which the exporter fuses after it has
# read it. What helps is the algorithm NVFP4, with calibration.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.14.1 nvidia-modelopt==0.45.0 accelerate==1.15.0 \
  requests==2.34.2 safetensors==0.8.0 onnx==1.19.0 onnxscript==0.7.1 onnx-graphsurgeon==0.6.1 numpy==2.2.6
"$folder/venv/bin/pip" install --quiet --no-deps tensorrt-edgellm==0.11.0
"$folder/venv/bin/python" -W ignore - "$folder" <<'PYTHON'
import subprocess
import sys
from pathlib import Path

import modelopt.torch.quantization as mtq
import onnx
import torch
from modelopt.torch.export import export_hf_checkpoint
from onnx import numpy_helper
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

folder = Path(sys.argv[1])
checkpoint = folder / "checkpoint"
torch.manual_seed(0)
sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4}
config = LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=96, architectures=["LlamaForCausalLM"])
model = LlamaForCausalLM(config).bfloat16().eval()
mtq.quantize(model, mtq.W4A16_NVFP4_CFG)
export_hf_checkpoint(model, export_dir=checkpoint)
(checkpoint / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
stored = [name for name in load_file(checkpoint / "model.safetensors") if name.endswith("input_scale")]
print("quant_algo W4A16_NVFP4 is written:", "W4A16_NVFP4" in (checkpoint / "hf_quant_config.json").read_text())
print("input scales in the checkpoint:", stored)


def exported(name, *options):
    command = [Path(sys.executable).with_name("tensorrt-edgellm-export"), *options, checkpoint, folder / name]
    run = subprocess.run(command, capture_output=True, text=True)
    graph = onnx.load(folder / name / "llm/model.onnx").graph
    values = {init.name: init for init in graph.initializer}
    nodes = [node for node in graph.node if node.op_type == "TRT_FP4DynamicQuantize"]
    scales = {float(numpy_helper.to_array(values[node.input[1]])) for node in nodes}
    lines = (run.stdout + run.stderr).splitlines()
    told = [line for line in lines if "tensorrt_edgellm" in line and ("WARNING" in line or "ERROR" in line)]
    named = {node.input[1] for node in nodes}  # equal initializers are one
    print(f"{name}: exit {run.returncode}, {len(nodes)} inputs quantized to FP4 with scales {scales}, told: {told}, {named}")
    return run.returncode, len(nodes), scales, told, any("qkv_proj_fused" in initializer for initializer in named)


as_seen = exported("as_it_is")[:4] == (0, 4, {1.0}, [])
as_seen &= exported("with_the_option", "--no-quantize-activations") == (0, 1, {1.0}, [], True)
raise SystemExit(0 if as_seen and not stored else "behaviour has changed")
PYTHON
