"""`python -m qcompile` is the `qcompile` command."""

from __future__ import annotations

import sys

from qcompile.cli import main

sys.exit(main())
