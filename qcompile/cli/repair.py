"""`qcompile repair`: an ONNX file of another tool, turned into one of standard operators that TensorRT takes."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from qcompile.cli.console import out, step, warn, write_report
from qcompile.errors import EngineError
from qcompile.outputs import check_distinct, check_room, check_writable
from qcompile.report.tables import add, show_checks, show_rows, size, table


def repair(old: Path, new: Path, /, *, report: Path | None = None) -> int:
    """Turn what other tools quantized into standard operators that TensorRT takes, and check the new file.

    For FP8 files of nvidia-modelopt (`trt::TRT_FP8QuantizeLinear` and its like), which TensorRT reads and nothing else;
    and for INT8 and INT4 files of ONNX Runtime, Quark, AIMET, NNCF, Brevitas and others, which ONNX Runtime reads and
    TensorRT refuses. The new file computes the same numbers, and TensorRT runs it in kernels of FP8 or INT8.

    ```
    qcompile repair vit.fp8.onnx vit.onnx
    qcompile repair vit.fp8.onnx vit.onnx --report repair.json
    qcompile build vit.onnx --target sm89 --expect attention_fp8=12
    ```

    What is done: weights in float behind a quantizer become codes, FP8 in the layout that their GEMM reads; Casts
    between a quantizer and a GEMM go; what the file says of types and shapes is thrown away and inferred again; opsets
    are raised as far as needed. An FP8 zero point other than 0 is written out by the formula; that of integers becomes
    an addition, and moves into the biases of GEMMs. UINT8 and UINT4 become INT8 and INT4; biases in codes become float;
    QLinearConv, QLinearMatMul, QGemm and their like, and MatMulNBits, become Q/DQ around standard operators.

    What is not: what is not quantized is not quantized; scales that are measured at run time, codes of 16 bits, and
    other operators that are not standard stay, with a warning.

    Parameters
    ----------
    old:
        ONNX file; external data is found beside it. It is not changed.
    new:
        Another file. It is moved in place when it is complete and right; above 1.8 GB its weights go to NEW.HASH.data.
        Exit code 1 if it is not, or if TensorRT or standard tools do not take it, as `inspect` says of it.
    report:
        Write what was changed, and the checks, to this JSON file.
    """
    check_writable(new, report)
    check_distinct({"the new file": new, "--report": report}, [("part of the old file, which is never changed", old)])

    from qcompile.cli.report import CommandReport
    from qcompile.engine.graph import OnnxGraph
    from qcompile.onnx.repair import repair_onnx

    with contextlib.suppress(EngineError):  # what is no ONNX file, repair_onnx says in its own words
        check_room({new: OnnxGraph.load(old).weight_bytes()})
    step(f"repairing {old}")
    done = repair_onnx(old, new)
    show_repair(out(), done.data(), new)
    if report is not None:
        write_report(report, CommandReport(source=str(old), repair=done, new=[str(new)]))
    return 0 if done.passed else 1


def show_repair(console: Console, report: Mapping[str, Any], new: object = "the new file") -> None:
    """The report of `qcompile.repair_onnx`, as `RepairReport.to_json` writes it."""
    before, after = report["bytes"]
    head = f"{new}: {size(after)}, opset {report['opset'][1]}"
    if not report["changed"]:
        console.print(Text(f"{head}; the file is standard already, and the new one equals it", style="bold"))
    else:
        console.print(Text(f"{head} (was {size(before)}, opset {report['opset'][0]})", style="bold"))
        _show_changes(console, report)
    for notice in report["notices"]:
        warn(notice)
    show_checks(console, report["checks"])


def _show_changes(console: Console, report: Mapping[str, Any]) -> None:
    found = table("Changed", "", "count", numbers=("count",))
    for operator, count in report["standardized"].items():
        add(found, f"{operator}, now standard", count)
    rows = {
        "weights folded into codes": len(report["folded"]),
        "weights stored transposed": report["transposes"],
        "codes stored as TensorRT takes them": len(report["codes"]),
        "biases folded to float": len(report["biases"]),
        "FP8 weights of convolutions that have no kernel, in float": len(report.get("floats", {})),
        "FP8 quantizers behind poolings instead of in front": report.get("pools", 0),
        "activations quantized to INT8 instead of UINT8": report["signed"],
        "integer zero points that are additions or in biases now": len(report["offsets"]),
        "Relus in front of FP8 quantizers written as Max": report["relus"],
        "Casts between quantizers and GEMMs removed": report["casts"],
        "zero points other than 0 written out": len(report["zero_points"]),
    }
    for what, count in rows.items():
        if count:
            add(found, what, count)
    total = sum(report["quantizers"].values())
    add(found, f"quantizers with an inferred shape, of {total}", report["shapes"])
    for operator, count in report["kept"].items():
        add(found, f"{operator}, kept", count)
    console.print(found)
    show_rows(console, "Weights", ("codes", "from"), list({**report["folded"], **report["codes"]}.items()))
    show_rows(console, "Zero points other than 0", ("quantizer",), [(name,) for name in report["zero_points"]])
