"""The middle end: quantized IR, passes and pipelines on FX graphs. It needs torch and nothing else.

>>> gm = passes.unlift(torch.export.export(module, args).run_decompositions({}))
>>> log = passes.run_pipeline(passes.NORMALIZE, gm)
>>> log.fired, log.declined
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from passes.lazy import public
from passes.registration import register

if TYPE_CHECKING:
    from passes import ir
    from passes.base import Decline, Pass, PassLog, PassResult, run_pipeline
    from passes.errors import PassError, QCompileError
    from passes.formats import FORMATS, Format, get_format
    from passes.observe import trace
    from passes.pipelines import NORMALIZE, PORTABLE, TENSORRT, quantize_pipeline
    from passes.places import Pipeline, after, before
    from passes.program import lift, unlift
    from passes.promises import checked

__all__ = [
    "FORMATS",
    "NORMALIZE",
    "PORTABLE",
    "TENSORRT",
    "Decline",
    "Format",
    "Pass",
    "PassError",
    "PassLog",
    "PassResult",
    "Pipeline",
    "QCompileError",
    "after",
    "before",
    "checked",
    "get_format",
    "ir",
    "lift",
    "quantize_pipeline",
    "run_pipeline",
    "trace",
    "unlift",
]

_PLACES = {
    "ir": "passes.ir",
    "FORMATS": "passes.formats",
    "NORMALIZE": "passes.pipelines",
    "PORTABLE": "passes.pipelines",
    "TENSORRT": "passes.pipelines",
    "Decline": "passes.base",
    "Format": "passes.formats",
    "Pass": "passes.base",
    "PassError": "passes.errors",
    "PassLog": "passes.base",
    "PassResult": "passes.base",
    "QCompileError": "passes.errors",
    "Pipeline": "passes.places",
    "after": "passes.places",
    "before": "passes.places",
    "checked": "passes.promises",
    "get_format": "passes.formats",
    "lift": "passes.program",
    "quantize_pipeline": "passes.pipelines",
    "run_pipeline": "passes.base",
    "trace": "passes.observe",
    "unlift": "passes.program",
}

register()
__getattr__, __dir__ = public(__name__, _PLACES)
