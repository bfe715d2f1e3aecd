"""A measurement in a fresh process, which neither sees nor leaves anything in this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def in_process(*arguments: str) -> Any:
    """The JSON value in the last line that `python ARGUMENTS` prints, run in the root of the repository.

    Raises:
        RuntimeError: the process failed; with the end of what it printed.
    """
    result = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if result.returncode:
        raise RuntimeError(f"python {' '.join(arguments)[:200]} failed:\n{result.stderr[-3000:]}")
    return json.loads(result.stdout.splitlines()[-1])
