"""benchmarks.gpu from end to end on a CPU: its file, its budget, and what it does with a wrong variant."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import candidates, variants
from benchmarks.gpu.cases import ModelCase, all_cases, tiny_cases
from benchmarks.gpu.models import build
from benchmarks.gpu.table import show
from benchmarks.gpu.variants import Variant


def run(output: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    code = gpu.main(["--tiny", "--no-inductor", "--output", str(output), *arguments])
    return code, json.loads(output.read_text(), parse_constant=pytest.fail)


def rows_of(written: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["case"], row["variant"]): row for row in written["rows"]}


@pytest.mark.slow
def test_a_run_writes_every_row(tmp_path: Path) -> None:
    cases = ["dit/16", "gemm/vit/2/qkv"]
    code, written = run(tmp_path / "gpu.json", "--only", *cases)
    assert code == 0
    assert {"benchmark", "date", "commit", "machine", "settings", "bars", "rows"} <= set(written)
    assert written["machine"]["torch"] == torch.__version__
    rows = rows_of(written)
    assert list(rows) == [(c.name, v) for c in tiny_cases() if c.name in cases for v in candidates.names_of(c)]
    for (_, variant), row in rows.items():
        if row["status"] == "ok":
            assert row["ms"] > 0 and row["q1"] <= row["q3"] and row["interleaved"] and row["check"]
        else:  # what torch has on no CPU
            assert row["status"] == "unavailable" and variant.startswith(("torchao", "scaled_mm")), row
    assert rows["dit/16", "bf16-compile"]["speedup"] == 1
    assert not list(tmp_path.glob(".*"))  # nothing is left beside the file


@pytest.mark.slow
def test_everything_with_inductor(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--minutes", "60", "--output", str(output)]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
    rows = rows_of(json.loads(output.read_text()))
    assert {case for case, _ in rows} == {case.name for case in tiny_cases()}
    assert {row["status"] for row in rows.values()} <= {"ok", "unavailable"}


@pytest.mark.slow
def test_a_wrong_variant_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = variants.VARIANTS[0]

    def without_bias(model: torch.nn.Module, *others: Any) -> Any:
        model.get_parameter("blocks.0.mlp.fc1.bias").zero_()
        return good.prepare(model, *others)

    def crash(*_: Any) -> Any:
        raise RuntimeError("no kernel\nimage")

    broken = [Variant("qcompile-broken", without_bias, good.judge), Variant("crash", crash, good.judge)]
    monkeypatch.setattr(variants, "VARIANTS", (good, *broken))
    code, written = run(tmp_path / "gpu.json", "--only", "dit/16")
    assert code == 1
    right, wrong, failed = written["rows"]
    assert right["status"] == "ok"
    assert wrong["status"] == "wrong" and wrong["ms"] is None and "to fp32 is" in wrong["detail"]
    assert failed["status"] == "failed" and failed["detail"] == "RuntimeError: no kernel image"


@pytest.mark.slow
def test_without_time_rows_are_skipped_and_resumed(tmp_path: Path) -> None:
    output, chosen = tmp_path / "gpu.json", ("--only", "dit/16", "--variants", "bf16-*")
    code, written = run(output, *chosen, "--minutes", "0")
    assert code == 0
    assert [row["status"] for row in written["rows"]] == ["skipped", "skipped"]
    _, resumed = run(output, *chosen, "--resume")
    assert [row["status"] for row in resumed["rows"]] == ["ok", "ok"]
    _, again = run(output, *chosen, "--resume")
    assert again["rows"] == resumed["rows"]


@pytest.mark.slow
def test_what_a_resumed_run_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing where every row is there; a case that lacks one as a whole, as rows of two runs cannot be compared."""
    names = [variant.name for variant in variants.VARIANTS[:2]]
    output, chosen = tmp_path / "gpu.json", ("--only", "dit/16", "--resume", "--variants")
    _, written = run(output, *chosen, names[0])
    (row,) = written["rows"]
    assert row["status"] == "ok"
    output.write_text(json.dumps(written | {"rows": [row | {"ms": 1e9}]}))
    assert run(output, *chosen, names[0])[1]["rows"] == [row | {"ms": 1e9}]
    _, both = run(output, *chosen, *names)
    assert [row["variant"] for row in both["rows"]] == names
    assert all(row["status"] == "ok" and row["ms"] < 1e9 for row in both["rows"])
    output.write_text(json.dumps(both | {"machine": both["machine"] | {"chip": "another"}}))
    with pytest.raises(SystemExit, match="is of another, not of"):
        run(output, *chosen, names[0])
    assert json.loads(output.read_text())["rows"] == both["rows"]


def test_the_important_cases_come_first() -> None:
    names = [case.name for case in all_cases()]
    assert names[:2] == ["vit-large/64", "llama-8b/prefill-4096"]
    assert names[2:6] == [f"gemm/vit-large/64/{n}" for n in ("fc1", "fc2")] + [
        f"gemm/llama-8b/prefill-4096/{n}" for n in ("gate_up", "down")
    ]
    assert len(names) == len(set(names))
    models = {case.name for case in all_cases() if isinstance(case, ModelCase)}
    vits = {f"vit-{size}/{batch}" for size in ("base", "large") for batch in (1, 8, 64)}
    llamas = {f"llama-8b/{step}" for step in ("prefill-512", "prefill-4096", "decode-1", "decode-8", "decode-64")}
    assert models == vits | llamas | {"dit-xl/256", "dit-xl/1024"}


def test_models_have_the_sizes_of_their_names() -> None:
    sizes = {}
    for case in all_cases(layers=1):
        if isinstance(case, ModelCase):
            with torch.device("meta"):
                sizes[case.name] = sum(parameter.numel() for parameter in case.make().parameters())
    assert sizes["vit-base/1"] == 86_567_656
    assert sizes["vit-large/1"] == 304_326_632
    assert sizes["llama-8b/decode-1"] == 218_112_000 + 4096  # a layer, and the norm after the last one
    assert sizes["dit-xl/256"] == 12 * 1152**2 + 9 * 1152 + 6 * (1152**2 + 1152)


@pytest.mark.parametrize("case", [case for case in tiny_cases() if isinstance(case, ModelCase)], ids=lambda c: c.name)
def test_models_are_the_same_each_time(case: ModelCase) -> None:
    device = torch.device("cpu")
    inputs = case.inputs(device, torch.float32)
    first, second = (build(case.make, device, torch.float32)(*inputs) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_a_step_with_a_cache_is_the_last_row_of_a_prompt() -> None:
    """The key and value of the token itself are in the cache here, at its end."""
    prompt, step = (c for c in tiny_cases() if c.name.startswith("llama/") and isinstance(c, ModelCase))
    device = torch.device("cpu")
    whole, one = (build(case.make, device, torch.float32) for case in (prompt, step))
    one.cos, one.sin = whole.cos[-1:], whole.sin[-1:]
    (x,) = prompt.inputs(device, torch.float32)
    cache: list[torch.Tensor] = []
    for layer in whole.layers:
        layer.self_attn.register_forward_hook(lambda _m, _a, result: cache.extend(result[1:]))
    expected = whole(x)[:, -1:]
    y, *new = one(x[:, -1:], *cache)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(new, [tensor[:, :, -1:] for tensor in cache])


def test_a_table_without_rich(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "rich.table", None)
    show("title", [{"case": "a", "ms": 1.23456, "empty": None, "status": "ok"}])
    assert capsys.readouterr().out == "title\ncase  ms     status\na     1.235  ok    \n"


def test_help_and_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--tiny", "--only", "nothing"]) == 2
    assert gpu.main(["--list", "--only", "vit-large/*"]) == 0
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first == "vit-large/64"
    assert last.startswith("variants of models: bf16-compile, qcompile-row")
    if not torch.cuda.is_available():
        assert gpu.main([]) == 2
        assert "--tiny" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu.main(["--help"])
    assert "examples:" in capsys.readouterr().out
