"""The JSON files of a checkpoint: their names, and reading one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qcompile.errors import CheckpointError, QCompileError
from qcompile.messages import first_line

CONFIG, HF_QUANT_CONFIG = "config.json", "hf_quant_config.json"
INDEX = "model.safetensors.index.json"

LARGEST = 100_000_000  # the index of a model with 100,000 tensors has a tenth of it


def read_json(path: Path, error: type[QCompileError] = CheckpointError) -> dict[str, Any]:
    """The object that a JSON file holds. Raises `error` for anything else."""
    try:
        if path.exists() and not path.is_file() and not path.is_dir():  # a named pipe would be waited for
            raise error(f"{path} is no file")
        with path.open("rb") as file:
            text = file.read(LARGEST + 1)
        if len(text) > LARGEST:
            raise error(f"{path} has more than {LARGEST} bytes, which is too much for a JSON file of a checkpoint")
        content = json.loads(text.decode("utf-8"))
    except RecursionError as cause:
        raise error(f"{path} cannot be read: it is nested too deeply") from cause
    except (OSError, ValueError) as cause:
        raise error(f"{path} cannot be read: {first_line(cause)}") from cause
    if not isinstance(content, dict):
        raise error(f"{path} holds no JSON object")
    return content
