"""Claim: a 2.4 GB model becomes a verified NVFP4 file with at most 1.3 x its own memory, and TensorRT parses the file.

Random weights in half precision; each case in a fresh process. The peak is that of the process, the model in it, from
start to verified file. Interpreter, imports and exporter take some of it whatever the model, as a tiny one shows that
goes first; the ratio is shown with and without that. Scales are those of `max`: what gptq keeps of the inputs is a
setting of it.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import cyclopts

from benchmarks import record
from benchmarks.fresh import in_process

BAR = 1.3
CASES = (
    ("llama", "nvfp4_weight_only", "bfloat16"),
    ("llama", "nvfp4", "bfloat16"),
    ("embedding", "nvfp4", "float16"),
)

app = cyclopts.App(help=__doc__)


def measure(model: str, recipe: str, dtype: str) -> dict[str, Any]:
    """One case in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.onnx")
        found = in_process("-m", "benchmarks.large_worker", model, recipe, dtype, path)
    ratio = (found["peak_gb"] - found["tiny_gb"]) / found["model_gb"]
    return {
        "model": model,
        "recipe": recipe,
        "dtype": dtype,
        **found,
        "ratio": ratio,
        "ratio_with_tiny": found["peak_gb"] / found["model_gb"],
        "bar": f"<= {BAR}, parsed",
        "ok": ratio <= BAR and found["parsed"],
    }


@app.default
def main(*, output: Path | None = None) -> int:
    """Measure peak memory. Exit code 1 if a case is above the bar, or its file does not parse.

    Parameters
    ----------
    output: JSON file, in place of benchmarks/results/large_model.json.
    """
    rows = [measure(*case) for case in CASES]
    record.show("A large model to a verified NVFP4 file: peak memory", rows)
    record.write("large_model", rows, output)
    return int(not all(row["ok"] for row in rows))


if __name__ == "__main__":
    sys.exit(app())
