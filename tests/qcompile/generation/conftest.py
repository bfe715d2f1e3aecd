"""A tiny Llama with a tokenizer of bytes: its directory, and what `export --cache` makes of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qcompile
from qcompile.decoders import Cache

transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

END, PAD, VOCABULARY, POSITIONS = 256, 257, 258, 96


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as those of the hub."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("llama")
    words = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocab=words | {"</s>": END, "<pad>": PAD}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="</s>", pad_token="<pad>", clean_up_tokenization_spaces=False
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=POSITIONS,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(llama: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(llama).eval()


Make = Callable[..., tuple[Path, torch.export.ExportedProgram]]


@pytest.fixture(scope="session")
def made(llama: Path, model: Any, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """(recipe, dtype) -> a directory as `export --cache` makes it, and the program; each is made once."""
    known: dict[Any, Any] = {}

    def make(
        recipe: str | None = "fp8+fp8_kv", dtype: torch.dtype = torch.float32, logits: Any = "all"
    ) -> tuple[Path, torch.export.ExportedProgram]:
        from qcompile.generation.directory import write_companions

        key = recipe, dtype, logits
        if key not in known:
            torch.manual_seed(0)
            batches = [{"input_ids": torch.randint(0, 256, (2, 16))}]
            cache = Cache(logits=logits)
            options: dict[str, Any] = {"calibration": batches, "dtype": dtype, "progress": False, "cache": cache}
            program = qcompile.quantize(model, recipe=recipe, **options)
            folder = tmp_path_factory.mktemp("made")
            qcompile.export_onnx(program, folder / "model.onnx", target="portable")
            write_companions(folder / "model.onnx", llama)
            known[key] = folder, program
        return known[key]

    return make
