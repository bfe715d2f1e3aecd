"""Where a model and its data come from on the command line: directories, files and functions, named by a string."""

from __future__ import annotations

from qcompile.source.calibration import MADE_UP, open_calibration
from qcompile.source.data import Data
from qcompile.source.declared import Declared, parse_inputs
from qcompile.source.inputs import parse_dynamic, with_dynamic_shapes
from qcompile.source.load import load_source
from qcompile.source.model import Source
from qcompile.source.preparation import Preparation

__all__ = [
    "MADE_UP",
    "Data",
    "Declared",
    "Preparation",
    "Source",
    "load_source",
    "open_calibration",
    "parse_dynamic",
    "parse_inputs",
    "with_dynamic_shapes",
]
