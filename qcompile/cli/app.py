"""The command line as a whole: its subcommands, and how an error becomes one message and an exit code."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter
from rich.text import Text

from qcompile.cli.alone import with_values
from qcompile.cli.build import build
from qcompile.cli.calibrate import calibrate
from qcompile.cli.checkpoint import checkpoint
from qcompile.cli.command import better_command
from qcompile.cli.completion import completion_of
from qcompile.cli.console import err
from qcompile.cli.demo import demo
from qcompile.cli.doctor import doctor
from qcompile.cli.export import export
from qcompile.cli.generate import generate
from qcompile.cli.inspect import inspect
from qcompile.cli.merge import merge
from qcompile.cli.options import UsageError, check_given
from qcompile.cli.process import Process, nobody_reads
from qcompile.cli.ranks import has_part, together
from qcompile.cli.recipes import recipes
from qcompile.cli.renamed import current
from qcompile.cli.repair import repair
from qcompile.cli.started import is_first, rank
from qcompile.compat.onnx import REGISTRATION
from qcompile.errors import ExpectationError, JoinedError, QCompileError, VerificationError
from qcompile.messages import first_line
from qcompile.version import __version__

# "torchvision is not installed", and what torchao says of its own extensions when transformers imports it
_NOISY_LOGGERS = (REGISTRATION, "torch.utils._pytree", "torchao")
GOOD, FALLS_SHORT, WRONG_USAGE, INTERNAL = 0, 1, 2, 3

_HELP = """Quantize a PyTorch model, export it to ONNX, build a TensorRT engine, and prove what fused.

**From a model to an engine in one go**

    qcompile export ./vit-base -o vit.onnx --recipe fp8 --calibration photos/ \\
        --engine vit.engine --target sm89 --report vit.json
    qcompile inspect vit.json

**From a Hugging Face directory to a quantized one**, for vLLM, SGLang and transformers

    qcompile checkpoint ./llama -o ./llama-fp8 --format fp8

**From a language model to text**, with its key/value cache, for ONNX Runtime and onnxruntime-genai

    qcompile export ./llama -o llama-fp8/ --recipe fp8+fp8_kv --cache --calibration texts.jsonl
    qcompile generate llama-fp8/ --prompt "The capital of France is"

**What this machine allows**: `qcompile doctor` looks at packages, builders and devices.

**Without a model at hand**: `qcompile demo` trains a small one on real images and shows the whole route.

Exit codes: 0 good; 1 a check or an expectation failed; 2 wrong usage, or something that this version cannot do;
3 a bug in qcompile; 130 interrupted, by Ctrl-C or SIGTERM.
"""

app = App(
    name="qcompile",
    help=_HELP,
    help_format="markdown",
    version=__version__,
    version_flags=["--version"],
    result_action="return_value",
)
app.meta.suppress_keyboard_interrupt = False  # it is said, and by whom the command line is called
app.command(export)
app.command(checkpoint)
app.command(generate)
app.command(calibrate)
app.command(merge)
app.command(build)
app.command(inspect)
app.command(repair)
app.command(recipes)
app.command(demo)
app.command(doctor)
app.command(completion_of(app))


@app.meta.default
def _launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    debug: Annotated[bool, Parameter(negative="", show_default=False)] = False,
) -> int:
    """Run a subcommand.

    Parameters
    ----------
    debug:
        Show the traceback of an error (also: QCOMPILE_DEBUG=1).
    """
    command, bound, _ = app.parse_args(tokens, exit_on_error=False, print_error=False)
    if not has_part(bound.arguments):
        return GOOD
    try:
        with together(bound.arguments):
            result = command(*bound.args, **bound.kwargs)
    except (QCompileError, OSError) as error:
        if debug or os.environ.get("QCOMPILE_DEBUG"):
            raise
        if isinstance(error, JoinedError) and not is_first():  # which says the same
            return WRONG_USAGE
        better = better_command(tokens, error) if isinstance(error, QCompileError) else None
        _say(f"{error}\nThis works:\n  {better}" if better else str(error))
        return FALLS_SHORT if isinstance(error, VerificationError | ExpectationError) else WRONG_USAGE
    return result if isinstance(result, int) else GOOD


def run(tokens: Sequence[str], process: Process) -> int:
    """Run the command line on `tokens`; returns the exit code. Raises KeyboardInterrupt."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # only local files are read, and the hub's retries take minutes
    for category in (FutureWarning, DeprecationWarning, UserWarning):
        warnings.filterwarnings("ignore", category=category, module=r"(torch|transformers|onnx\w*|copyreg)\b.*")
    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    debug = "--debug" in tokens or bool(os.environ.get("QCOMPILE_DEBUG"))
    try:
        check_given(tokens)
        result = app.meta(with_values(current(tokens)), exit_on_error=False, print_error=False)
    except (CycloptsError, UsageError) as error:
        _say(f"{error}\n'qcompile --help' and 'qcompile COMMAND --help' tell more")
        return WRONG_USAGE
    except BrokenPipeError:
        nobody_reads(sys.stdout)
        return GOOD
    except Exception as error:
        if process.asked:  # what code of others makes of a KeyboardInterrupt
            raise KeyboardInterrupt from error
        if debug:
            raise
        if _lacks_memory(error):
            _say(f"there is not enough memory: {first_line(error)}")
            return WRONG_USAGE
        _say(f"{type(error).__name__}: {error}\nThis is a bug in qcompile; --debug shows where it comes from")
        return INTERNAL
    if result and process.asked:  # an error that was made of it
        raise KeyboardInterrupt
    return result if isinstance(result, int) else GOOD


def _lacks_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "allocate memory" in str(error))


def _say(message: str) -> None:
    err(of_all=True).print(Text.assemble(("error: ", "bold red"), rank(), message), soft_wrap=True)
