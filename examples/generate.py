"""A decoder with an FP8 key/value cache to ONNX, and tokens from it beside those of transformers' `generate`."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import qcompile

torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256}
model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, eos_token_id=None)).eval()
batches = [{"input_ids": torch.randint(0, 256, (2, 32))} for _ in range(4)]  # yours: qcompile.calibration_data(...)

Path("out").mkdir()
program = qcompile.quantize(
    model, recipe="fp8+fp8_kv", calibration=batches, cache="dynamic", dtype=torch.float32, progress=False
)
qcompile.export_onnx(program, "out/model.onnx", target="portable")

generator = qcompile.Generator("out")  # a directory of `qcompile export --cache` has a tokenizer, too: then give text
print("bytes of cache for each token:", generator.file.cache_bytes)
prompt = [1, 2, 3, 5, 8, 13]
(tokens,) = generator.generate(prompt, max_new_tokens=16).tokens
ids = torch.tensor([prompt])
expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)[0, 6:].tolist()
print("in FP8:", tokens)
print("float: ", expected)
