"""The catalogue of passes, its pages, and the graph of a saved program at any place: `python -m passes`."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

import qcompile
from passes.__main__ import main
from passes.catalogue import STAGES, catalogue, find, pages
from passes.pipelines import route
from passes.places import class_of
from tests.passes.support import Attention

PAGES = Path(__file__).parents[2] / "docs" / "passes"
X = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(0))


def test_every_pass_says_what_it_does() -> None:
    assert {entry.stage for entry in catalogue()} == set(STAGES)
    names = [entry.name for entry in catalogue()]
    assert len(names) == len(set(names)) and len(names) > 60
    for entry in catalogue():
        for title in ("Requires", "Ensures", "Declines when", "Why"):
            assert entry.section(title), f"{entry.name} says nothing under {title}"
        assert "Before" in entry.doc, entry.name
    for name in ("compile", "tensorrt", "portable"):
        assert {class_of(make).__name__ for make in route(name)} <= set(names)  # type: ignore[arg-type]


def test_the_pages_are_up_to_date(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--check", str(PAGES)]) == 0, capsys.readouterr().err
    assert {path.name for path in PAGES.glob("*.md")} == pages().keys()
    assert main(["--markdown", str(tmp_path / "new")]) == 0 and main(["--check", str(tmp_path / "new")]) == 0
    (tmp_path / "new" / "fuse.md").write_text("old")
    assert main(["--check", str(tmp_path / "new")]) == 1
    assert "fuse.md is out of date: python -m passes --markdown" in capsys.readouterr().err


def test_the_catalogue_in_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(entry.name in printed for entry in catalogue()) and "fuse: Q/DQ and the operators" in printed
    assert main(["FuseAttentionQdq"]) == 0
    entry = find("FuseAttentionQdq")
    assert entry is not None and entry.doc in capsys.readouterr().out
    assert main(["FuseAttention"]) == 1
    assert "there is no pass FuseAttention here; did you mean FuseAttentionQdq" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["show", "--help"])
    assert "trusts the file" in capsys.readouterr().out


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["show", *arguments]) == 0
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("programs") / "f.pt2")
    torch.export.save(torch.export.export(Attention().eval(), (X,)), path)
    return path


def test_the_graph_at_any_place(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    fired = [line.split()[1] for line in said(capsys, path).splitlines() if not line.startswith(" ")]
    assert fired.index("ViewsToReshape") < fired.index("InsertQdq") < fired.index("FuseAttentionQdq")
    assert "qcompile.attention" in said(capsys, path, "--until", "FuseAttention")
    assert "\n+dequantize" in said(capsys, path, "--diff", "InsertQdq")
    for arguments, told in (
        (["show", path, "--until", "Nothing"], "there is no pass Nothing here"),
        (["show", f"{path}.no"], "there is no file"),
    ):
        assert main(arguments) == 1
        assert told in capsys.readouterr().err


@pytest.mark.slow
def test_programs_targets_and_formats(path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "qcompile.attention" not in said(capsys, path, "--until", "InsertQdq")
    assert "i8[" in said(capsys, path, "--format", "int8", "--until", "FoldW")
    assert "it changed nothing; it found nothing to rewrite" in said(capsys, path, "--diff", "NormalizeLinear")
    quantized = str(tmp_path / "q.pt2")
    program = qcompile.quantize(torch.export.load(path), calibration=[(X,)], progress=False)
    torch.export.save(program, quantized)
    assert "MergeParallelLinears" in said(capsys, quantized)
    assert "InsertQdq" not in said(capsys, quantized, "--target", "portable")
    assert "DecomposeAttention" in said(capsys, quantized, "--target", "inductor")
    for arguments, told in (
        (["show", quantized, "--until", "InsertQdq"], "InsertQdq is not on the way of this program"),
        (["show", path, "--format", "nvfp4"], "show takes fp8 and int8"),
    ):
        assert main(arguments) == 1
        assert told in capsys.readouterr().err


@pytest.mark.slow
def test_the_example_of_an_own_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What docs/passes-of-your-own.md says of its kernels."""
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(PAGES.parents[1] / "examples" / "own_pass.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "own passes: 0; GEMMs in FP8: 3;" in printed and "own passes: 1; GEMMs in FP8: 2;" in printed
    assert "3 in FP8, then 2" in (PAGES.parent / "passes-of-your-own.md").read_text(encoding="utf-8")
