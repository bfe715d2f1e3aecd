"""What runtimes want beside the ONNX file of a decoder: its tokenizer, its configs, and genai_config.json."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qcompile.checkpoint.files.json_files import CONFIG, read_json
from qcompile.checkpoint.files.links import leads_out
from qcompile.errors import GenerationError
from qcompile.files import replaced
from qcompile.generation.decoder_file import MASK, POSITIONS, TOKENS, DecoderFile
from qcompile.generation.session import session_entries
from qcompile.generation.settings import GENAI_CONFIG, GENERATION_CONFIG, Settings

__all__ = ["companions", "genai_config", "write_companions"]

_TOKENIZER = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab.*", "merges.txt"),
    *("spiece.model", "sentencepiece*.model"),
)
# of transformers -> of onnxruntime-genai, whose kinds differ in nothing that a file with these names does not have
_KINDS = {"gpt_oss": "gptoss", "gemma3": "gemma3_text"}
_KNOWN = {
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "gptoss", "granite"),
    *("olmo", "smollm3", "nemotron"),
}
_ANY = "decoder"


def companions(source: Path) -> list[Path]:
    """The files of `source`, a Hugging Face directory, that go beside the ONNX file. Links out of it do not."""
    found = {path for pattern in (*_TOKENIZER, GENERATION_CONFIG, CONFIG) for path in source.glob(pattern)}
    return sorted(path for path in found if path.is_file() and not leads_out(path, source))


def write_companions(model: Path, source: Path) -> list[Path]:
    """Put beside `model`, an ONNX file, what it needs of `source`, which may be the same directory. Returns the files.

    Raises:
        GenerationError: `model` is no decoder with a cache, or config.json does not describe it.
    """
    folder, file = model.parent, DecoderFile.read(model)
    content = genai_config(file, read_json(source / CONFIG, GenerationError), Settings.read(source))
    written = []
    for path in companions(source):
        written.append(folder / path.name)
        if not written[-1].exists() or not written[-1].samefile(path):
            with replaced(written[-1], GenerationError) as new:
                shutil.copyfile(path, new)
    written.append(folder / GENAI_CONFIG)
    with replaced(written[-1], GenerationError) as new:
        new.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return written


def genai_config(file: DecoderFile, config: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """genai_config.json of onnxruntime-genai. Sizes of the cache are those of the file, which alone are true.

    Args:
        config: config.json of the model. settings: what its directory says of generation.
    """
    text = {**config, **config["text_config"]} if isinstance(config.get("text_config"), dict) else config
    context = settings.context or 2048
    keys = file.caches[0]
    kind = str(config.get("model_type", ""))
    kind = _KINDS.get(kind, kind)
    ends = sorted(settings.ends) or [file.vocabulary]  # a token that there is none of: the text goes on to its limit
    inputs = {name: name for name in (TOKENS, MASK, POSITIONS) if name in file.inputs}
    return {
        "model": {
            "type": kind if kind in _KNOWN else _ANY,
            "vocab_size": file.vocabulary,
            "context_length": context,
            "bos_token_id": _token(text.get("bos_token_id"), ends[0]),
            "eos_token_id": ends if len(ends) > 1 else ends[0],
            "pad_token_id": ends[0] if settings.pad is None else settings.pad,
            "decoder": {
                "filename": file.path.name,
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": [], **session_entries(file)},
                "head_size": keys.width,
                "hidden_size": _size(text, "hidden_size", "n_embd") or keys.width * keys.heads,
                "num_attention_heads": _size(text, "num_attention_heads", "n_head") or keys.heads,
                "num_hidden_layers": file.layers,
                "num_key_value_heads": keys.heads,
                "inputs": inputs | {f"past_{kind}_names": f"past_key_values.%d.{kind}" for kind in ("key", "value")},
                "outputs": {"logits": "logits"}
                | {f"present_{kind}_names": f"present.%d.{kind}" for kind in ("key", "value")},
            },
        },
        "search": {
            "do_sample": False,
            "max_length": context,
            "min_length": 0,
            "num_beams": 1,
            "past_present_share_buffer": file.length is not None,
        },
    }


def _token(given: Any, otherwise: int) -> int:
    return given if isinstance(given, int) and not isinstance(given, bool) else otherwise


def _size(config: Mapping[str, Any], *names: str) -> int | None:
    return next((config[name] for name in names if isinstance(config.get(name), int)), None)
