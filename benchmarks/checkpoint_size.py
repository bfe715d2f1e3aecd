"""Claim: a checkpoint of 8 GB is quantized and written with at most 2 GB of memory: one shard in, one shard out.

A Llama-shaped checkpoint in bfloat16, with shards of 2 GB, is made up in a temporary directory; each case
is written by a fresh process, whose peak is everything it ever held: interpreter, imports, and files it read.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cyclopts

from benchmarks import record
from benchmarks.fresh import in_process

BAR_GB = 2.0
CASES = (("fp8", "fp8_block"), ("modelopt", "nvfp4_weight_only"))
_LAYER = 218_112_000  # parameters of a layer of Llama-3-8B
_HEADS = 2 * 32_000 * 4096

_MAKE = """
import sys
from pathlib import Path
from benchmarks.checkpoint_size import make
print(make(Path(sys.argv[1]), float(sys.argv[2])))
"""
_CHILD = """
import json, sys, time
from qcompile.checkpoint.write.save import save_checkpoint
from benchmarks.export_worker import peak_mb
source, target, format, recipe = sys.argv[1:]
imports, start = peak_mb(), time.perf_counter()
report = save_checkpoint(source, target, format=format, recipe=recipe, progress=False)
print(json.dumps({
    "layers": len(report.quantized), "written_gb": report.bytes / 1e9, "files": len(report.files),
    "seconds": time.perf_counter() - start, "imports_gb": imports / 1e3, "peak_gb": peak_mb() / 1e3,
}))
"""

app = cyclopts.App(help=__doc__)


def make(directory: Path, gigabytes: float) -> float:
    """Write a checkpoint of about that size, a layer at a time; returns its size in GB."""
    import torch  # a child runs this, as a process starts with the peak of the one that started it
    import transformers
    from safetensors.torch import save_file

    layers = max(1, round((gigabytes * 1e9 / 2 - _HEADS) / _LAYER))
    config = transformers.LlamaConfig(
        **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": layers, "vocab_size": 32_000},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "dtype": "bfloat16"},
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(directory)
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in transformers.LlamaForCausalLM(config).state_dict().items()}
    noise = torch.randn(1 << 20).bfloat16() * 0.02  # repeated: what a weight holds takes no part in this
    shards: list[dict[str, Any]] = [{}]
    for name, shape in shapes.items():
        if sum(map(_bytes, shards[-1].values())) + _bytes(shape) > 2e9:
            shards.append({})
        shards[-1][name] = shape
    places = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {
            name: noise.repeat(-(-shape.numel() // noise.numel()))[: shape.numel()].view(shape).clone()
            for name, shape in shard.items()
        }
        save_file(tensors, directory / file, {"format": "pt"})
        places.update(dict.fromkeys(shard, file))
    total = sum(map(_bytes, shapes.values()))
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": places})
    )
    return total / 1e9


def _bytes(shape: Any) -> int:
    return 2 * int(shape.numel())


def measure(source: Path, target: Path, format: str, recipe: str, size: float) -> dict[str, Any]:
    """One case in a fresh process."""
    start = time.perf_counter()
    found = in_process("-c", _CHILD, str(source), str(target), format, recipe)
    found["process_s"] = time.perf_counter() - start
    bar = {"bar": f"<= {BAR_GB} GB", "ok": found["peak_gb"] <= BAR_GB}
    return {"format": format, "recipe": recipe, "source_gb": size, **found, **bar}


@app.default
def main(*, gigabytes: float = 8.0, folder: Path | None = None, output: Path | None = None) -> int:
    """Measure time and peak memory. Exit code 1 if a case is above the bar.

    Parameters
    ----------
    gigabytes: size of the checkpoint; a small one is quick.
    folder: where to make the temporary directory, which needs 2.5 times the size.
    output: JSON file, in place of benchmarks/results/checkpoint_size.json.
    """
    rows = []
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        source = Path(temporary) / "source"
        source.mkdir()
        size = in_process("-c", _MAKE, str(source), str(gigabytes))
        for format, recipe in CASES:
            with tempfile.TemporaryDirectory(dir=temporary) as target:
                rows.append(measure(source, Path(target), format, recipe, size))
    record.show("A checkpoint larger than the memory it is written with", rows)
    record.write("checkpoint_size", rows, output, gigabytes=gigabytes)
    return int(not all(row["ok"] for row in rows))


if __name__ == "__main__":
    sys.exit(app())
