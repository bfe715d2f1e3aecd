"""A broken source, a request that cannot be met, or a run that stops: one error, and nothing that looks complete."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import qcompile
from qcompile import outputs
from qcompile.checkpoint.files import directory, shards
from qcompile.checkpoint.files.directory import new_directory
from qcompile.checkpoint.write.job import check_names
from qcompile.checkpoint.write.save import save_checkpoint
from qcompile.errors import CheckpointError
from tests.qcompile.checkpoint.models import program, read, save, tiny

Break = Callable[[Path], None]
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return save(tiny("llama", num_hidden_layers=1), tmp_path_factory.mktemp("whole") / "source")


@pytest.fixture
def source(whole: Path, tmp_path: Path) -> Path:
    """A copy to break, and nothing else in the directory around it."""
    import shutil

    return Path(shutil.copytree(whole, tmp_path / "source"))


def write(model: Any, directory: Path | None = None, **options: Any) -> Any:
    arguments = {"format": "modelopt", "recipe": "nvfp4_weight_only", "progress": False, **options}
    return save_checkpoint(model, directory or Path(model).with_name("out"), **arguments)


def shard_of(source: Path, name: str) -> Path:
    return source / json.loads((source / INDEX).read_text())["weight_map"][name]


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


Q = "model.layers.0.self_attn.q_proj.weight"


def _truncate(source: Path) -> None:
    path = shard_of(source, Q)
    path.write_bytes(path.read_bytes()[:-100])


def _no_header(source: Path) -> None:
    shard_of(source, Q).write_bytes(b"\xff" * 100)


def _lose_shard(source: Path) -> None:
    shard_of(source, Q).unlink()


def _lose_tensor(source: Path) -> None:
    edit(shard_of(source, Q), lambda tensors: tensors.pop(Q))


def _lose_parameter(source: Path) -> None:
    _lose_tensor(source)
    edit_json(source / INDEX, lambda index: index["weight_map"].pop(Q))


def _set(value: Any) -> Break:
    return lambda source: edit(shard_of(source, Q), lambda tensors: tensors.update({Q: value(tensors[Q])}))


def _one(value: float) -> Break:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[3, 5] = value
        return tensor

    return _set(change)


def _quantized(source: Path) -> None:
    edit_json(source / "config.json", lambda config: config.update(quantization_config={"quant_method": "fp8"}))


def _architecture(source: Path) -> None:
    edit_json(source / "config.json", lambda config: config.update(architectures=["NoSuchModel"]))


BREAKS: list[tuple[str, Break, str]] = [
    ("truncated", _truncate, r"model-0000\d-of-0000\d.safetensors is truncated: \S+ ends at byte"),
    ("no header", _no_header, r"safetensors is truncated, or no safetensors file"),
    ("no shard", _lose_shard, r"index.json names model-0000\d-of-0000\d.safetensors, which is not there"),
    ("not in the shard", _lose_tensor, rf"safetensors lacks {Q}, which {INDEX} says it holds"),
    ("not in the index", _lose_parameter, rf"source lacks {Q}, which LlamaForCausalLM needs"),
    ("int", _set(lambda t: t.to(torch.int8)), rf"safetensors: {Q} is torch.int8: a weight to quantize is float16"),
    ("fp8", _set(lambda t: t.to(torch.float8_e4m3fn)), rf"{Q} is torch.float8_e4m3fn"),
    ("shape", _set(lambda t: t[:64].clone()), rf"{Q} is \[64, 128\], and the model that config.json describes has"),
    ("nan", _one(float("nan")), rf"safetensors: {Q} holds NaN or infinity"),
    ("inf", _one(float("-inf")), rf"safetensors: {Q} holds NaN or infinity"),
    ("no config", lambda s: (s / "config.json").unlink(), r"source has no config.json"),
    ("config", lambda s: (s / "config.json").write_text("{"), r"config.json cannot be read"),
    ("quantized", _quantized, r"source is quantized already \(fp8\)"),
    ("architecture", _architecture, r"transformers \S+ has no NoSuchModel"),
    ("index", lambda s: (s / INDEX).write_text("[]"), rf"{INDEX} holds no JSON object"),
    ("no index", lambda s: (s / INDEX).unlink(), rf"holds no weights: neither model.safetensors nor {INDEX}"),
    ("outside", lambda s: edit_json(s / INDEX, lambda i: i["weight_map"].update({Q: "../x"})), r"names ../x"),
]


@pytest.mark.parametrize(("breaks", "message"), [case[1:] for case in BREAKS], ids=[case[0] for case in BREAKS])
def test_a_broken_source_is_one_error_and_nothing_is_written(source: Path, breaks: Break, message: str) -> None:
    breaks(source)
    with pytest.raises(CheckpointError, match=message):
        write(source)
    assert [path.name for path in source.parent.iterdir()] == ["source"]


def test_a_nan_in_a_block_format_that_reads_once(source: Path) -> None:
    _one(float("nan"))(source)
    with pytest.raises(CheckpointError, match=rf"{Q} holds NaN or infinity"):
        write(source, format="fp8", recipe="fp8_block")
    assert [path.name for path in source.parent.iterdir()] == ["source"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_a_run_that_stops_leaves_nothing_and_the_next_one_works(
    source: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    real, calls = shards.write_file, []

    def stops(path: Path, tensors: Any) -> None:
        calls.append(path)
        real(path, tensors)
        if len(calls) == 2:
            raise error

    out = source.with_name("out")
    out.mkdir()
    monkeypatch.setattr(shards, "write_file", stops)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else CheckpointError):
        write(source, max_shard_size="30KB")
    assert len(calls) == 2 and not any(out.iterdir()) and not out.with_name("out.partial").exists()
    monkeypatch.setattr(shards, "write_file", real)
    write(source)
    assert read(out) and (out / "config.json").is_file() and not (out / ".qcompile-partial").exists()


def test_what_a_killed_run_left_is_removed_and_nothing_else(source: Path) -> None:
    left, mine, other = (source.with_name(n) for n in (".qcompile-0a1b2c3d", ".qcompile-mine", "out.partial"))
    for folder in (left / "new", mine, other):
        folder.mkdir(parents=True)
        (folder / "part-00001.safetensors").touch()
    (left / ".partial").write_text("out")
    report = write(source)
    assert "model.safetensors" in report.files and not [f for f in report.files if "part" in f]
    assert {path.name for path in source.parent.iterdir()} == {"source", "out", mine.name, other.name}


def test_directories_that_are_in_the_way(source: Path) -> None:
    out = source.with_name("out")
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(CheckpointError, match=r"out is not empty"):
        write(source)
    (out / "mine").unlink()
    with new_directory(out), pytest.raises(CheckpointError, match=r"another process is writing .*out: wait"):
        write(source)
    with pytest.raises(CheckpointError, match=r"there is no directory .*nowhere"):
        write(source, directory=source.parent / "nowhere" / "out")


def test_directories_that_can_only_be_replaced(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, link = source.with_name("here"), source.with_name("link")
    here.mkdir()
    monkeypatch.chdir(here)
    with pytest.raises(CheckpointError, match=r"\. is the current directory or a mount point"):
        write(source, directory=Path())
    monkeypatch.chdir(source.parent)
    link.symlink_to("here", target_is_directory=True)
    (source / "dangling.json").symlink_to("nowhere")
    report = write(source, directory=link)
    assert link.is_symlink() and (here / "config.json").is_file() and not (here / "dangling.json").exists()
    assert any("dangling.json" in notice for notice in report.notices)
    assert {path.name for path in source.parent.iterdir()} == {"source", "here", "link"}
    assert write(source, directory=source.with_name("x" * 250)).files


def test_scales_of_k_and_v_are_not_those_of_a_latent_cache(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 96}
    heads = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
    config = transformers.DeepseekV3Config(**sizes, **heads, num_attention_heads=4, num_key_value_heads=4)
    source = save(transformers.DeepseekV3ForCausalLM(config), tmp_path / "source")
    with pytest.raises(CheckpointError, match=r"0.self_attn: k and v are quantized, .* take the recipe fp8_gemm"):
        check_names(str(source), tmp_path / "out", "modelopt", qcompile.load_recipe("fp8"))
    check_names(str(source), tmp_path / "out", "modelopt", qcompile.load_recipe("fp8_gemm"))


def test_tied_weights_that_differ(tmp_path: Path) -> None:
    source = save(tiny("qwen3", num_hidden_layers=1), tmp_path / "source", shard="1GB")
    embedding = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    edit(source / "model.safetensors", lambda t: t.update({"lm_head.weight": embedding.clone()}))
    write(source)
    assert "lm_head.weight" not in read(tmp_path / "out")
    edit(source / "model.safetensors", lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(
        CheckpointError, match=r"lm_head.weight is not .*embed_tokens.weight, to which config.json ties"
    ):
        write(source, directory=tmp_path / "again")


@pytest.mark.parametrize(("format", "recipe"), [("fp8", "fp8_block"), ("modelopt", "nvfp4_weight_only")])
def test_a_disk_without_room_is_said_before_anything_is_written(
    source: Path, monkeypatch: pytest.MonkeyPatch, format: str, recipe: str
) -> None:
    report = write(source, format=format, recipe=recipe)
    size = sum(path.stat().st_size for path in source.with_name("out").glob("*"))
    assert report.bytes < size
    free: list[int] = [size - 1]
    usage = outputs.shutil.disk_usage(source)
    monkeypatch.setattr(outputs.shutil, "disk_usage", lambda path: usage._replace(free=free[0]))
    with pytest.raises(
        CheckpointError,
        match=rf"no room for .*again: about [\d,]+ bytes are needed, and {size - 1:,} are free on that disk",
    ):
        write(source, source.with_name("again"), format=format, recipe=recipe)
    assert {path.name for path in source.parent.iterdir()} == {"source", "out"}
    with pytest.raises(CheckpointError, match=r"no room for .*again"):
        check_names(str(source), source.with_name("again"), "modelopt", qcompile.load_recipe("fp8"))
    free[0] = size + (2 << 20)
    write(source, source.with_name("again"), format=format, recipe=recipe)


def test_a_parent_that_cannot_be_written(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory.os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(CheckpointError, match=r"cannot write .*out: .* is not writable for this user"):
        write(source)


def test_why_nothing_is_left_to_quantize(tmp_path: Path) -> None:
    source = save(tiny("llama", hidden_size=40, intermediate_size=56, head_dim=10), tmp_path / "source")
    with pytest.raises(CheckpointError, match=r"nothing to write:\n.*blocks of 16 elements.*reduction axis has 40"):
        write(source)


STATIC = r"static scale to .+ and \d+ more, which needs calibration data: program = qcompile.quantize"
REQUESTS: list[tuple[dict[str, Any], str]] = [
    ({"recipe": "fp8"}, STATIC),
    ({"recipe": "nvfp4"}, STATIC),
    ({"recipe": None}, r"format modelopt holds many schemes: say which with recipe="),
    ({"format": "gguf"}, r"unknown checkpoint format 'gguf'; known: fp8, modelopt, modelopt_mixed, compressed-tensors"),
    ({"format": "fp8"}, r"format fp8 cannot hold this model"),
    ({"max_shard_size": "1 box"}, r"max_shard_size='1 box': give a number of bytes"),
    ({"source": "."}, r"source= is for a program"),
]


@pytest.mark.parametrize(("options", "message"), REQUESTS)
def test_requests_that_cannot_be_met(source: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        write(source, **options)
    assert [path.name for path in source.parent.iterdir()] == ["source"]


def test_rotation_and_inputs_alone_are_refused(source: Path) -> None:
    rotated = qcompile.load_recipe("nvfp4_weight_only", ["rules[format=nvfp4].rotate=true"])
    with pytest.raises(CheckpointError, match=r"q_proj is rotated \(`rotate: true`\), which no checkpoint format says"):
        write(source, recipe=rotated)
    alone = qcompile.load_recipe("fp8_block", ["rules[+]={quantizer: '*.o_proj.weight_quantizer', enable: false}"])
    with pytest.raises(CheckpointError, match=r"o_proj: the recipe quantizes its input .* and not its weight"):
        write(source, recipe=alone, format="fp8")


def test_programs_that_do_not_fit(source: Path, tmp_path: Path) -> None:
    model, made = program("qwen3_moe", "fp8")
    for options, message in (
        ({"source": None}, r"a program needs source="),
        ({"source": model}, r"a program is quantized already: leave out recipe="),
        ({"source": source, "recipe": None}, r"experts.gate_up_proj, and the source has no such layer"),
        ({"source": tiny("qwen3_moe", num_hidden_layers=1, head_dim=16), "recipe": None}, r"_proj is \[128, 128\] in"),
        ({"source": model, "recipe": None, "format": "fp8"}, r"format fp8 cannot hold this model|no place"),
    ):
        with pytest.raises(CheckpointError, match=message):
            write(made, directory=tmp_path / "out", **options)
    with pytest.raises(CheckpointError, match=r"no linear layer of this program is quantized"):
        plain = torch.export.export(torch.nn.Linear(4, 4), (torch.ones(2, 4),))
        write(plain, directory=tmp_path / "out", source=model, recipe=None)
    with pytest.raises(CheckpointError, match=r"Linear is no PreTrainedModel"):
        write(torch.nn.Linear(4, 4), directory=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_experts_that_are_fused_on_the_hub(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 96, "head_dim": 16}
    config = transformers.GptOssConfig(**sizes, num_local_experts=2, num_attention_heads=4, num_key_value_heads=4)
    source = save(transformers.GptOssForCausalLM(config), tmp_path / "source")
    with pytest.raises(CheckpointError, match=r"experts.\w+_proj cannot be quantized in a checkpoint: its experts are"):
        write(source)
    recipe = qcompile.load_recipe("nvfp4_weight_only", ["rules[+]={quantizer: '*.experts.*', enable: false}"])
    report = write(source, recipe=recipe)
    assert len(report.quantized) == 4 and "model.layers.0.mlp.experts.down_proj" in report.unquantized
