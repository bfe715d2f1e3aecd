"""The JSON files of a checkpoint: their names, and reading one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qcompile.errors import CheckpointError, QCompileError
from qcompile.messages import first_line

CONFIG, HF_QUANT_CONFIG = "config.json", "hf_quant_config.json"
INDEX = "model.safetensors.index.json"


def read_json(path: Path, error: type[QCompileError] = CheckpointError) -> dict[str, Any]:
    """The object that a JSON file holds. Raises `error` for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        raise error(f"{path} cannot be read: {first_line(cause)}") from cause
    if not isinstance(content, dict):
        raise error(f"{path} holds no JSON object")
    return content
