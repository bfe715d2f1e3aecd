"""What one checkout makes of a model, as fingerprints; same_files.py starts this once for each checkout.

`python same_files_worker.py CHECKOUT MODEL RECIPE...` takes qcompile and passes from CHECKOUT and the models from
beside this file, so that both sides compile the same, and prints a line of JSON: recipe -> what was made -> its mark.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx
    from torch.export import ExportedProgram

    from benchmarks.models import Example


def models() -> dict[str, Any]:
    """Name -> what builds a tiny example: the rows of the fusion benchmark and of the coverage table."""
    from functools import partial

    from benchmarks.cases import CASES
    from benchmarks.zoo import ZOO

    found: dict[str, Any] = {case.name: partial(case.example, tiny=True) for case in CASES}
    for model in ZOO:
        found |= {
            f"{model.name}/{'dynamic' if d else 'static'}": partial(model.example, dynamic=d) for d in model.forms
        }
    return found


def of_program(program: ExportedProgram) -> Iterator[tuple[str, str]]:
    """Each weight, code and scale, and the operators in order."""
    for kind, tensors in (("state", program.state_dict), ("constant", program.constants)):
        for name, tensor in tensors.items():
            yield f"{kind} {name}", _of_tensor(tensor)
    yield "graph", _of_bytes("\n".join(map(str, (node.target for node in program.graph.nodes))).encode())


def of_file(model: onnx.ModelProto) -> str:
    """All of an ONNX file but what describes it: who made it, and where its nodes come from."""
    model.ClearField("producer_name")
    model.ClearField("producer_version")
    _without_metadata(model)
    return _of_bytes(model.SerializeToString(deterministic=True))


def _without_metadata(message: Any) -> None:
    for field, value in message.ListFields():
        if field.name in ("metadata_props", "doc_string"):
            message.ClearField(field.name)
        elif field.message_type is not None:
            for part in value if field.is_repeated else (value,):
                _without_metadata(part)


def of_directory(directory: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(directory.iterdir()):
        yield path.name, _of_bytes(path.read_bytes())


def _of_tensor(tensor: Any) -> str:
    import torch

    if not isinstance(tensor, torch.Tensor):
        return _of_bytes(repr(tensor).encode())
    raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8) if tensor.numel() else tensor.cpu()
    return f"{tensor.dtype} {list(tensor.shape)} {_of_bytes(raw.numpy().tobytes())}"


def _of_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def made(example: Example, recipe: str, folder: Path) -> dict[str, str]:
    """The program, its two ONNX files, and the checkpoints of it and of the model; an error is its sentence."""
    import onnx

    import qcompile

    found: dict[str, str] = {}
    try:
        program = example.quantized(recipe=recipe)
    except qcompile.QCompileError as error:
        return {"quantize": str(error)}
    found |= {f"program: {name}": mark for name, mark in of_program(program)}
    for target in ("tensorrt", "portable"):
        path = folder / f"{target}.onnx"
        try:
            report = qcompile.export_onnx(program, path, target=target)
        except qcompile.QCompileError as error:
            found[target] = _sentence(error, folder)
            continue
        found[target] = of_file(onnx.load(path))
        found[f"{target}: report"] = _of_bytes(repr((report.quantized, report.unquantized, report.notices)).encode())
    for format in ("fp8", "modelopt", "modelopt_mixed", "compressed-tensors"):
        for name, arguments in (("program", {"source": example.model}), ("model", {"recipe": recipe})):
            label, directory = f"{format} of the {name}", folder / f"{format}-{name}"
            source: Any = program if name == "program" else example.model
            try:
                qcompile.save_checkpoint(source, directory, format=format, progress=False, **arguments)
            except qcompile.QCompileError as error:
                found[label] = _sentence(error, folder)
            else:
                found |= {f"{label}: {file}": mark for file, mark in of_directory(directory)}
    return found


def _sentence(error: Exception, folder: Path) -> str:
    return str(error).replace(str(folder), "FOLDER")


def main(checkout: str, model: str, *recipes: str) -> None:
    root = Path(__file__).parents[1]
    package: Any = types.ModuleType("benchmarks")
    package.__path__ = [str(root / "benchmarks")]
    sys.modules["benchmarks"] = package
    sys.path[0] = checkout
    import qcompile

    if not Path(str(qcompile.__file__)).is_relative_to(checkout):
        raise SystemExit(f"qcompile comes from {qcompile.__file__}, not from {checkout}")
    results = {}
    for recipe in recipes:
        with tempfile.TemporaryDirectory(prefix="same_files") as folder:
            results[recipe] = made(models()[model](), recipe, Path(folder))
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
