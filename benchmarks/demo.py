"""The table of `qcompile demo`, as README shows it: trains, quantizes, exports, runs and builds, about two minutes.

python -m benchmarks.demo
"""

from __future__ import annotations

import os
import subprocess
import sys

from benchmarks.record import write


def main() -> int:
    environment = {**os.environ, "COLUMNS": "120"}  # a narrow table breaks its cells
    run = subprocess.run([sys.executable, "-m", "qcompile", "demo"], stdout=subprocess.PIPE, text=True, env=environment)
    print(run.stdout)
    write("demo", {"table": [line.rstrip() for line in run.stdout.splitlines() if line.strip()]})
    return run.returncode


if __name__ == "__main__":
    sys.exit(main())
