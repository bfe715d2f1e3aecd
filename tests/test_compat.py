"""Private names of other libraries: all are there and behave, each stands in one place, and a lost one is said."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import passes
import qcompile
from passes.errors import CompatError
from passes.private import Private, lazily
from qcompile.compat import probes

LIBRARIES = {
    "accelerate", "compressed_tensors", "diffusers", "modelopt", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "peft",
    "tensorrt", "tensorrt_rtx", "timm", "torch", "torch_tensorrt", "torchao", "torchvision", "transformers",
}  # fmt: skip
ALLOWED = {
    "_pytree": "torch.utils._pytree: torch.export's own interface has its types, and it is what every caller imports",
    "_ops": "torch._ops.OpOverload and HigherOrderOperator: the types of what graphs call",
    "_schema": "of an OpOverload: the one way to know its arguments",
    "_parameters": "a table of nn.Module, which state dicts and hooks are made of",
    "_buffers": "another one",
    "_modules": "another one",
    "_forward_hooks": "another one",
    "_forward_pre_hooks": "another one",
    "_save_to_state_dict": "documented as what a module overrides to say what is in its state",
    "_tensor_name": "the attribute by which torch.nn.utils.prune finds its own hooks",
    "_version": "a tensor's counter of changes in place, of which autograd's errors speak",
    "_fsdp_wrapped_module": "looked for to refuse what has it",
    "_replace": "of a named tuple, documented",
    "_exit": "os._exit, documented",
    "_getframe": "sys._getframe, documented",
    "_initializing": "of a module's spec, as importlib itself asks",
    "_fields": "documented: the names of a named tuple",
    "_qcompile": "our own mark on a function of torch",
}
"""What may be used without a detour, and why; operators such as aten._to_copy are written in graphs, and are probed."""

HOMES = ("passes/compat.py", "qcompile/compat/")
_BY_NAME = {"getattr", "hasattr", "setattr", "delattr", "attrgetter"}


def test_every_probe_finds_what_it_looks_for() -> None:
    found = list(probes())
    assert {"torch", "onnxscript", "onnx_ir"} <= {private.library for private in found}
    assert len({(str(private), private.purpose) for private in found}) == len(found) > 50
    assert [problem for private in found if (problem := private.problem())] == []


@pytest.mark.parametrize(
    ("private", "words"),
    [
        (Private("torch._guards", "nothing", "a test"), "torch._guards.nothing is not there, without which a test"),
        (Private("torch._nothing", "name", "a test"), "torch._nothing.name is not there"),
        (Private("torch", "Tensor._nothing", "a test"), "torch.Tensor._nothing is not there"),
        (Private("torch", "_C", "a test", lambda _: False), "torch._C is there and behaves in another way"),
        (Private("torch", "_C", "a test", lambda c: c.nothing()), "torch._C fails with AttributeError: "),
    ],
)
def test_what_a_lost_name_says(private: Private, words: str) -> None:
    problem = private.problem() or ""
    assert words in problem and problem.startswith("torch 2") and "constraints.txt" in problem


def test_a_lost_name_is_said_where_it_is_imported() -> None:
    get, names = lazily(__name__, {"lost": Private("torch._guards", "nothing", "a test")})
    assert "lost" in names()
    with pytest.raises(CompatError, match=r"torch\._guards\.nothing is not there"):
        get("lost")
    with pytest.raises(AttributeError, match="has no attribute 'other'"):
        get("other")


def test_a_home_imports_nothing_before_it_is_asked() -> None:
    modules = sorted(Path(next(iter(qcompile.__path__)), "compat").glob("*.py"))
    names = ["passes.compat", *(f"qcompile.compat.{path.stem}" for path in modules if path.stem != "__init__")]
    code = f"import sys, {', '.join(names)}; print(sorted({LIBRARIES} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_private_names_stand_in_their_homes() -> None:
    strangers = []
    for package in (passes, qcompile):
        root = Path(next(iter(package.__path__)))
        for path in sorted(root.rglob("*.py")):
            name = path.relative_to(root.parent).as_posix()
            if not name.startswith(HOMES):
                strangers += [f"{name}:{line}: {found}" for line, found in private_names(path.read_text("utf-8"))]
    assert strangers == []


@pytest.mark.parametrize(
    "code",
    [
        "from torch._guards import detect_fake_mode",
        "import torch._inductor.config",
        "from torch.amp.autocast_mode import _enter_autocast",
        "x = torch._C._has_mkldnn",
        "y = node._dynamo_source",
        "z = getattr(module, '_orig_mod', None)",
        "NAME = 'modelopt.torch._deploy'",
    ],
)
def test_the_search_finds(code: str) -> None:
    assert list(private_names(code))


def private_names(code: str) -> Iterator[tuple[int, str]]:
    """Line and name of each private name of another module or object in `code`."""
    tree = ast.parse(code)
    own = {"cls", "self"}
    for node in ast.walk(tree):
        own |= {node.name} if isinstance(node, ast.FunctionDef | ast.ClassDef) else set()
        own |= {node.id} if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else set()
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("cls", "self"):
            own.add(node.attr)
    for node in ast.walk(tree):
        for name in _mentioned(node):
            private = [part for part in name.split(".") if part.startswith("_") and not part.startswith("__")]
            if any(part not in ALLOWED and part not in own for part in private):
                yield node.lineno, name  # type: ignore[attr-defined]


def _mentioned(node: ast.AST) -> Iterator[str]:
    """Dotted names of other libraries, and attributes of objects."""
    if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in LIBRARIES:
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name.partition(".")[0] in LIBRARIES)
    elif isinstance(node, ast.Attribute):
        owner = ast.unparse(node.value)
        if owner not in ("self", "cls") and owner.rpartition(".")[2] not in ("aten", "mkldnn"):
            yield node.attr
    elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in _BY_NAME:
        yield from (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
        yield from (name for name in (node.value,) if name.partition(".")[0] in LIBRARIES)
