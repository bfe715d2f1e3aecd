"""Calibrate on a file of texts with a directory's tokenizer, and see whether it held enough of them.

Wants the extra `transformers`.
"""

import json
from pathlib import Path

import tokenizers
import torch
import transformers

import qcompile
from qcompile.report.program import ProgramReport

texts = [f"{line} " * 8 for line in (json.__doc__ or "").splitlines() if line.strip()]  # yours: text as in use
Path("texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))

words = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="<unk>"))  # yours: a directory from the hub
words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
words.train_from_iterator(texts, tokenizers.trainers.WordLevelTrainer(special_tokens=["<unk>", "</s>"]))
fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
fast.save_pretrained("llama")
torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=words.get_vocab_size(), **sizes)).eval()
model.save_pretrained("llama")

data = qcompile.calibration_data("texts.jsonl", "llama", sequence_length=64, batch_size=2)
print(f"{len(data)} batches of {tuple(data[0]['input_ids'].shape)}, the first from {data.place(0)}")
program = qcompile.quantize(model, kwargs=data[0], recipe="fp8", calibration=data, progress=False)
print(ProgramReport.of(program).ranges)
