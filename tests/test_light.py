"""What is loaded when: help and completion in no time, operators of saved programs whoever is imported first."""

from __future__ import annotations

import subprocess
import sys

import pytest

MODULES = ("formats", "pipelines")
HEAVY = "{'torch', 'onnx', 'onnx_ir', 'onnxscript', 'onnxruntime', 'transformers', 'tensorrt_rtx'}"

# each case in a process of its own that has imported torch, and nothing of ours
IN_FORKS = """
import os, torch
for names, true in cases:
    child = os.fork()
    if not child:
        exec(f"import {names}")
        print(bool(eval(true)), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["export", "--help"],
        ["completion", "bash"],
        ["nothing"],
        ["recipes", "list"],
        ["recipes", "show", "fp8"],
        ["recipes", "show", "fp8", "--set", "metadata.name=mine"],
        ["recipes", "check", "--schema"],
    ],
    ids=" ".join,
)
def test_the_command_line_imports_what_it_runs(argv: list[str]) -> None:
    code = f"import sys; from qcompile.cli import main; main({argv}); print(sorted({HEAVY} & sys.modules.keys()))"
    assert run(code).splitlines()[-1] == "[]"


@pytest.mark.parametrize("first", ["import qcompile, torch", "import torch, qcompile", "import passes, torch"])
def test_operators_are_there_whichever_is_imported_first(first: str) -> None:
    rest = (
        "print(torch.ops.qcompile.quantize.default, 'torch._inductor' in sys.modules, type(torch.__loader__).__name__)"
    )
    assert run(f"import sys; {first}; {rest}") == "qcompile.quantize.default False SourceFileLoader"


def test_an_import_brings_in_nobody_else() -> None:
    loaded = "{name.partition('.')[0] for name in set(sys.modules) - before}"
    code = f"import sys; before = set(sys.modules); import passes, qcompile; print({loaded} - sys.stdlib_module_names)"
    assert set(run(code).strip("{}").replace("'", "").split(", ")) == {"passes", "qcompile"}


def test_an_import_changes_nothing_of_others() -> None:
    """Nothing but operators and a result of our own is registered, and no warning is hidden."""
    state = """
def foreign(types):
    return sorted((found for found in types if found.__module__ != "passes.result"), key=repr)
def state():
    names = torch._C._dispatch_get_all_op_names()
    return (
        [name for name in names if not name.startswith("qcompile::")],
        list(warnings.filters), list(sys.meta_path), foreign(torch.utils._pytree.SUPPORTED_NODES),
        {name for name in sys.modules if name.partition(".")[0] not in ("passes", "qcompile")},
        logging.root.handlers[:], sys.excepthook, signal.getsignal(signal.SIGINT), dict(os.environ),
    )
"""
    begin = f"import logging, os, signal, sys, warnings, torch, torch.utils._pytree\n{state}\nbefore = state()\n"
    compared = "print([i for i, (a, b) in enumerate(zip(before, state())) if a != b])"
    assert run(f"{begin}import passes, qcompile\n{compared}") == "[]"
    whole = "import warnings; before = list(warnings.filters); import qcompile; print(before == warnings.filters)"
    assert run(whole) == "True"


def test_public_names() -> None:
    both = "all(getattr(m, n) and n in dir(m) for m in (qcompile, passes) for n in m.__all__)"
    whole = "'torch' in passes.ir.__dict__"
    cases = [("qcompile, passes", both)]
    cases += [(f"passes.{module}, qcompile", f"qcompile.quantize and {whole}") for module in MODULES]
    assert run(f"cases = {cases}\n{IN_FORKS}").splitlines() == ["True"] * len(cases)
    with pytest.raises(AttributeError, match="module 'qcompile' has no attribute 'nothing'"):
        import qcompile

        qcompile.nothing  # noqa: B018
