"""The command line: exit codes, one message for each error, and files that other tools read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import onnx
import onnxruntime
import pytest
import yaml

from qcompile.cli import main
from qcompile.cli.options import UsageError, parse_expect, parse_profiles, require_profile

MODELS = """
import torch
from torch import nn
import torch.nn.functional as F
class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj, self.classifier = nn.Linear(64, 192), nn.Linear(64, 64), nn.Linear(64, 10)
    def forward(self, tokens):
        b, n, d = tokens.shape
        q, k, v = self.qkv(tokens).reshape(b, n, 3, 4, 16).permute(2, 0, 3, 1, 4).unbind(0)
        return self.classifier(self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d)))
def make():
    torch.manual_seed(0)
    return Attention(), (torch.randn(2, 40, 64),)
def data():
    return (torch.randn(2, 40, 64) for _ in range(2))
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory with a module `models`; exports are told apart by the directory in sys.path."""
    (tmp_path / "models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "models", raising=False)
    return tmp_path


def run(*argv: str) -> int:
    return main(argv)


EXPORT = ("export", "models:make", "-o", "model.onnx", "--calibration", "models:data")


def test_export_build_inspect(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx")
    engine = ("--engine", "model.engine", "--target", "sm89", "--expect", "attention_fp8=1", "gemm_fp8=2")
    assert run(*EXPORT[:4], *engine, "--report", "report.json", "--dry-run") == 0
    foreseen = capsys.readouterr().out
    assert {p.name for p in here.iterdir()} - {"__pycache__"} == {"models.py"}
    assert all(word in foreseen for word in ("tokens", "[2, 40, 64]", "model.engine", "engine for sm89", "report.json"))
    assert run(*EXPORT, *engine, "--report", "report.json", "--io-dtype", "float16") == 0
    assert {p.name for p in here.iterdir()} - {"__pycache__"} == {
        *("models.py", "model.onnx", "model.engine", "report.json")
    }
    onnx.checker.check_model(model := onnx.load("model.onnx"), full_check=True)
    assert {value.type.tensor_type.elem_type for value in model.graph.output} == {onnx.TensorProto.FLOAT16}
    report = json.loads((here / "report.json").read_text())
    assert report["export"]["unquantized"] == {"classifier": "linear"}
    assert report["engine"]["attention"] == {"total": 1, "fused": 1, "fp8": 1, "int8": 0}
    shown = capsys.readouterr().out
    assert "layer by layer" in shown
    coverage, _, rest = shown[shown.index("Coverage") :].partition("notice: ")
    assert "more data would help" in rest
    assert "1 of 1" in coverage and coverage in foreseen, "a dry run tells what comes"

    assert run("inspect", "report.json") == 0
    shown = capsys.readouterr().out
    assert "classifier" in shown and "1 fused, 1 of them in FP8" in shown
    assert run("inspect", "model.onnx") == 0
    shown = capsys.readouterr().out
    assert "attention" in shown and "classifier" in shown and "FAILED" not in shown

    assert run("build", "model.onnx", "--target", "sm89", "--expect", "attention_fp8=2") == 1
    assert "attention_fp8: at least 2 wanted, 1 found" in capsys.readouterr().err
    assert run("build", "model.onnx", "--target", "sm120", "--report", "build.json") == 0
    assert run("inspect", "build.json") == 0


@pytest.mark.slow
def test_dynamic_shapes_and_a_program_that_was_saved(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dynamic = ("--dynamic-batch", "--dynamic", "tokens:1=length:32:128", "--onnx-target", "portable", "--opset", "19")
    assert run(*EXPORT, *dynamic, "--save-program", "model.pt2") == 0
    session = onnxruntime.InferenceSession(
        "model.onnx", sess_options=_without_qdq(), providers=["CPUExecutionProvider"]
    )
    import numpy as np

    assert session.run(None, {"tokens": np.ones((3, 50, 64), np.float32)})[0].shape == (3, 50, 10)
    assert {o.version for o in onnx.load("model.onnx").opset_import} == {19}

    assert run("export", "model.pt2", "-o", "again.onnx") == 0
    capsys.readouterr()
    assert run("export", "model.pt2", "-o", "again.onnx", "--recipe", "fp8") == 2
    assert "is quantized already" in capsys.readouterr().err
    for command in (("build", "model.onnx"), ("export", "model.pt2", "-o", "again.onnx"), (*EXPORT, *dynamic[:3])):
        assert run(*command, "--target", "sm89") == 2
        assert "--profile batch=1,8,32 length=32,128,512" in capsys.readouterr().err
    assert run("build", "again.onnx", "--target", "sm89", "--profile", "batch=1,2,4", "length=32,64,128") == 0


def _without_qdq() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options


def test_random_calibration_says_so_loudly(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*EXPORT[:4], "--calibration", "random", "--no-compare", "--report", "report.json") == 0
    captured = capsys.readouterr()
    assert "WARNING: calibrated with random data" in captured.err and "calibrated with random data" in captured.out
    assert any(
        "random data" in notice for notice in json.loads((here / "report.json").read_text())["export"]["notices"]
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("exprt",), 'Unknown command "exprt"'),
        (("export", "models:make"), "--output"),
        ((*EXPORT, "--nonsense"), "--nonsense"),
        ((*EXPORT, "--recipe", "fp88"), "did you mean 'fp8'"),
        ((*EXPORT, "--set", "rules[99].format=fp8"), "rules[99]"),
        ((*EXPORT, "--dtype", "fp16"), "fp16"),
        ((*EXPORT, "--opset", "18"), "FP8 needs 19 or later"),
        ((*EXPORT, "--profile", "tokens=1x2,2x2,3x2"), "--profile is for an engine"),
        ((*EXPORT, "--expect", "attention_fp8"), "write it as key=count"),
        ((*EXPORT, "--expect", "speed=3"), "unknown key 'speed'"),
        ((*EXPORT, "--target", "sm1"), "sm1"),
        ((*EXPORT, "--report", "missing/report.json"), "there is no directory"),
        ((*EXPORT[:4], "--calibration", "none.npz"), "there is no calibration file none.npz"),
        (EXPORT[:4], "qcompile export models:make -o model.onnx --calibration random"),
        (("export", "nothing", "-o", "model.onnx"), "a source is a Hugging Face directory"),
        (("inspect", "nothing.onnx"), "there is no file nothing.onnx"),
        (("inspect", "."), ". is a directory: give a file"),
        (("inspect", "models.json"), "not a report of qcompile"),
        (("recipes", "check"), "name a recipe"),
    ],
)
def test_wrong_usage_is_one_message_and_writes_nothing(
    here: Path, capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], message: str
) -> None:
    (here / "models.json").write_text('{"a": 1}')
    before = {p.name for p in here.iterdir()}
    assert run(*argv) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and error.count("error: ") == 1
    assert {p.name for p in here.iterdir()} - {"__pycache__"} == before


@pytest.mark.everyday(1)
@pytest.mark.parametrize(("choice", "words"), [("k_split", "K-split products"), ("per_channel", "quantized once more")])
def test_blocks_of_fp8_are_multiplied_as_asked(here: Path, choice: str, words: str) -> None:
    options = ("--recipe", "fp8_block", "--block-fp8", choice, "--report", "report.json", "--no-compare")
    assert run(*EXPORT[:4], *options) == 0
    notices = json.loads((here / "report.json").read_text())["export"]["notices"]
    assert any(words in notice for notice in notices)


def test_a_file_that_fails_its_checks_is_exit_code_1(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*EXPORT, "--no-compare") == 0
    model = onnx.load("model.onnx")
    scale = next(n.input[1] for n in model.graph.node if n.op_type == "QuantizeLinear")
    tensor = next(i for i in model.graph.initializer if i.name == scale)
    tensor.raw_data = bytes(len(tensor.raw_data))
    onnx.save(model, "broken.onnx")
    assert run("inspect", "broken.onnx") == 1
    assert "FAILED" in capsys.readouterr().out
    (here / "cut.onnx").write_bytes((here / "model.onnx").read_bytes()[:1000])
    assert run("inspect", "cut.onnx") == 1


def test_recipes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recipes", "list") == 0
    assert "fp8_per_channel_per_token" in capsys.readouterr().out
    assert run("recipes", "show", "fp8") == 0
    shown = capsys.readouterr().out
    assert "# Linears" in shown, "comments are part of what a recipe shows"
    (here / "mine.yaml").write_text(shown)
    assert run("recipes", "check", "mine.yaml") == 0
    assert run("recipes", "check", "--schema") == 0
    schema = json.loads(capsys.readouterr().out.partition("rules\n")[2])
    jsonschema.validate(yaml.safe_load(shown), schema)
    assert run("recipes", "show", "fp8", "--set", "rules[0].format=int8") == 0
    assert yaml.safe_load(capsys.readouterr().out)["rules"][0]["format"] == "int8"
    assert run("recipes", "check", "fp8", "--set", 'rules[+]={quantizer: "*.nothing", enable: false}') == 1
    assert "can match no quantizer" in capsys.readouterr().out
    (here / "bad.yaml").write_text("rules: 3")
    assert run("recipes", "check", "bad.yaml") == 2


@pytest.mark.parametrize(
    "command",
    ["", "export", "checkpoint", "calibrate", "merge", "build", "inspect", "recipes", "demo", "doctor", "completion"],
)
def test_help_has_examples_and_markdown_eats_no_star(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*command.split(), "--help") == 0
    shown = capsys.readouterr().out
    assert "Usage: qcompile" in shown and ("qcompile " in shown.partition("Usage")[2])
    if command == "export":
        assert "*.layers.0.*" in shown


def test_as_a_process(tmp_path: Path) -> None:
    """Plain text without escape codes when nobody watches, an exit code, and a traceback only when asked for."""
    python = [sys.executable, "-m", "qcompile"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2])])}
    listed = subprocess.run([*python, "recipes", "list"], capture_output=True, text=True, env=environment)
    assert listed.returncode == 0 and "\x1b" not in listed.stdout and "fp8_gemm" in listed.stdout
    failed = subprocess.run(
        [*python, "--debug", "recipes", "show", "nothing"], capture_output=True, text=True, env=environment
    )
    assert failed.returncode != 0 and "Traceback" in failed.stderr


def test_completion_by_bash_itself(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And nothing is written."""
    assert run("completion", "bash") == 0
    script = capsys.readouterr().out
    assert {p.name for p in here.iterdir()} - {"__pycache__"} == {"models.py"}
    script += """
complete_line() {
    COMP_LINE="$*"; COMP_WORDS=($*); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMP_POINT=${#COMP_LINE}; COMPREPLY=()
    $(complete -p qcompile | sed 's/.*-F \\([^ ]*\\).*/\\1/') qcompile "${COMP_WORDS[COMP_CWORD]}" x
    echo "${COMPREPLY[@]}"
}
complete_line qcompile rec
complete_line qcompile export --cali
complete_line qcompile checkpoint m --format comp
"""
    shown = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
    assert [line.split() for line in shown.stdout.splitlines()] == [
        ["recipes"],
        ["--calibration"],
        ["compressed-tensors"],
    ]


def test_options() -> None:
    assert parse_profiles(["a=1x32,4x128,8x512", "b=1,2,3"]) == [{"a": ((1, 32), (4, 128), (8, 512)), "b": (1, 2, 3)}]
    both = parse_profiles(["past=0,0,0", "batch=1,2,3", "past=1,64,128"])
    assert both == [{"past": (0, 0, 0), "batch": (1, 2, 3)}, {"past": (1, 64, 128), "batch": (1, 2, 3)}]
    assert parse_profiles([]) == [] and parse_expect([]) is None
    assert parse_expect(["kernels=149"]) == {"kernels": 149}
    for bad in ("a", "a=1x2", "a=1x2,2x2", "=1,2,3", "a=1,2,x", "a=1,2,3,4"):
        with pytest.raises(UsageError, match="write it as dimension=min,opt,max"):
            parse_profiles([bad])
    with pytest.raises(UsageError, match="--profile b is given 2 times, and another one 3 times"):
        parse_profiles(3 * ["a=1,2,3"] + 2 * ["b=1,2,3"])
    for bad in ("kernels", "kernels=-1", "=3", "kernels=x"):
        with pytest.raises(UsageError, match="write it as key=count"):
            parse_expect([bad])
    require_profile({"a": [1, 2]}, [])
    require_profile({"a": ["n", "n + 1"]}, [{"n": (1, 2, 3)}])
    require_profile({"a": ["n"]}, [{"m": (1, 2, 3)}])  # the engine names what there is
    for given in ([], [{"n": (1, 2, 3)}]):
        with pytest.raises(UsageError, match=r"a has dynamic dimensions[^$]*--profile batch=1,8,32 n=32,128,512"):
            require_profile({"a": ["batch", "n", 7], "b": [1]}, given)
    with pytest.raises(UsageError, match=r"--profile a=1x32x7,8x128x7,32x512x7"):
        require_profile({"a": ["?", "?", 7]}, [])
