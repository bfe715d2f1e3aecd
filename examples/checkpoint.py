"""Write a Hugging Face directory in FP8 for vLLM and SGLang: from a directory, tensor by tensor.

Wants the extra `transformers`.
"""

import torch
import transformers

import qcompile

torch.manual_seed(0)
config = transformers.LlamaConfig(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=9,
)
transformers.LlamaForCausalLM(config).save_pretrained("llama")  # yours: a directory from the hub

report = qcompile.save_checkpoint("llama", "llama-fp8", format="compressed-tensors", recipe="fp8_per_channel_per_token")
print("quantized:", len(report.quantized), "layers; left as they are:", *report.unquantized)

model = qcompile.load_checkpoint("llama-fp8")  # and back: the same codes and scales
ids = torch.arange(8)[None]
program = qcompile.import_quantized(model, kwargs={"input_ids": ids})
print("logits:", tuple(program.module()(input_ids=ids).logits.shape))
