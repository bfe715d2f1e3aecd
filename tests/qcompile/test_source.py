"""Sources and calibration data: transformers, torch.export, safetensors and numpy write what is read here."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export import ExportedProgram

import qcompile
from qcompile.errors import CalibrationError, CheckpointError, SourceError
from qcompile.frontends.quantized import is_quantized
from qcompile.remedy import remedy_of
from qcompile.source import Source, load_source, open_calibration, parse_inputs, with_dynamic_shapes

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.linear(x) + ids[:, None]


FACTORIES = """
import torch
from torch import nn
def pair(): return nn.Linear(4, 4), torch.ones(2, 4)
def keywords(): return nn.Linear(4, 4), {"input": torch.ones(2, 4)}
def dynamic(): return nn.Linear(4, 4), (torch.ones(2, 4),), {"input": {0: torch.export.Dim("rows")}}
def wrong(): return nn.Linear(4, 4)
def fails(): raise RuntimeError("out of coffee")
def batches(): return ((torch.ones(2, 4),) for _ in range(3))
def one_batch(): return torch.ones(2, 4)
def lazy(): return type("Lazy", (nn.Module,), {"forward": lambda self, input, other: input})()
constant = 3
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a module in the current directory, which is not on sys.path, as for a console script."""
    name = f"factories_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    return name


def two(batch: int = 2) -> Source:
    return Source(Two().eval(), (torch.randn(batch, 8), torch.arange(batch)))


# --- Hugging Face directories


def test_directory_with_weights(tmp_path: Path) -> None:
    model = transformers.ViTModel(transformers.ViTConfig(image_size=32, patch_size=8, **SMALL)).eval()
    model.save_pretrained(tmp_path)
    source = load_source(str(tmp_path))
    assert type(source.model) is transformers.ViTModel
    assert source.dims == {"pixel_values": [1, 3, 32, 32]}
    assert isinstance(source.model, nn.Module) and not source.model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(source.model.state_dict()[name], tensor)


def test_directory_keeps_the_dtype_of_its_weights(tmp_path: Path) -> None:
    transformers.ViTModel(transformers.ViTConfig(image_size=32, patch_size=8, **SMALL)).bfloat16().save_pretrained(
        tmp_path
    )
    source = load_source(str(tmp_path))
    assert isinstance(source.model, nn.Module)
    assert {p.dtype for p in source.model.parameters()} == {torch.bfloat16}
    assert source.kwargs["pixel_values"].dtype == torch.bfloat16


def config_only(path: Path, config: Any, architecture: str) -> str:
    config.architectures = [architecture]
    config.save_pretrained(path)
    return str(path)


BERT = {"vocab_size": 50, **SMALL}


@pytest.mark.parametrize(
    ("config", "architecture", "options", "dims"),
    [
        (
            transformers.BertConfig(max_position_embeddings=40, **BERT),
            "BertModel",
            {"batch": 3},
            {"input_ids": [3, 40], "attention_mask": [3, 40]},
        ),
        (transformers.LlamaConfig(**BERT), "LlamaForCausalLM", {"sequence": 48}, {"input_ids": [1, 48]}),
        (
            transformers.WhisperConfig(
                d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
                encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=50, max_source_positions=40, num_mel_bins=16,
                pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
            ),
            "WhisperForConditionalGeneration",
            {"submodule": "model.encoder"},
            {"input_features": [1, 16, 80]},
        ),
        (
            transformers.CLIPVisionConfig(image_size=24, patch_size=8, **SMALL),
            "CLIPVisionModel",
            {},
            {"pixel_values": [1, 3, 24, 24]},
        ),
    ],
)  # fmt: skip
def test_example_inputs_are_those_of_the_config_and_run(
    tmp_path: Path, config: Any, architecture: str, options: dict[str, Any], dims: dict[str, list[int]]
) -> None:
    source = load_source(config_only(tmp_path, config, architecture), random_weights=0, **options)
    assert source.dims == dims
    assert isinstance(source.model, nn.Module)
    with torch.no_grad():
        source.model(*source.args, **source.kwargs)


def test_the_seed_makes_the_weights_and_nothing_else_is_seeded(tmp_path: Path) -> None:
    directory = config_only(tmp_path, transformers.BertConfig(**BERT), "BertModel")
    before = torch.get_rng_state()
    first, again, other = (load_source(directory, random_weights=seed).model.state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    name = "encoder.layer.0.intermediate.dense.weight"
    assert torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name])


def test_directory_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SourceError, match=r"no config\.json"):
        load_source(str(tmp_path))
    directory = config_only(tmp_path, transformers.BertConfig(**BERT), "BertModel")
    with pytest.raises(SourceError, match=r"holds no weights.*--random-weights"):
        load_source(directory)
    with pytest.raises(SourceError, match=r"takes at most 512 tokens, not 513$") as caught:
        load_source(directory, random_weights=0, sequence=513)
    assert remedy_of(caught.value).options == {"--sequence": ("512",)}
    with pytest.raises(SourceError, match=r"no part 'decoder'; it has none"):
        load_source(directory, random_weights=0, submodule="decoder")
    (tmp_path / "model.safetensors").write_bytes(b"not a header")
    with pytest.raises(SourceError, match="the weights cannot be loaded"):
        load_source(directory)
    config_only(tmp_path, transformers.BertConfig(**BERT), "NobodysModel")
    with pytest.raises(SourceError, match="has no NobodysModel"):
        load_source(directory, random_weights=0)
    (tmp_path / "config.json").write_text('{"model_type": "nobody"}')
    with pytest.raises(SourceError, match="transformers cannot use it"):
        load_source(directory)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SourceError, match=r"pip install 'qcompile\[transformers\]'"):
        load_source(directory)


def test_a_checkpoint_that_lacks_a_weight_or_is_not_quantized_as_it_says_is_refused(tmp_path: Path) -> None:
    model = transformers.BertModel(transformers.BertConfig(**BERT))
    model.save_pretrained(tmp_path)
    state = {k: v.clone() for k, v in model.state_dict().items() if k != "pooler.dense.weight"}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"lacks pooler\.dense\.weight"):
        load_source(str(tmp_path))
    config = transformers.BertConfig(**BERT)
    config.quantization_config = {"quant_method": "fp8"}
    config_only(tmp_path, config, "BertModel")
    with pytest.raises(CheckpointError, match=r"output\.dense\.weight has dtype float32, expected float8"):
        load_source(str(tmp_path))


# --- programs


def test_program_file(tmp_path: Path) -> None:
    path = tmp_path / "two.pt2"
    torch.export.save(torch.export.export(Two(), (torch.ones(2, 8),), {"ids": torch.ones(2)}), path)
    source = load_source(str(path))
    assert isinstance(source.model, ExportedProgram) and not is_quantized(source.model)
    assert source.dims == {"x": [2, 8], "ids": [2]}


@pytest.mark.slow
def test_quantized_program_of_a_transformers_model(tmp_path: Path) -> None:
    """In a fresh process, which knows neither our operators nor transformers' output classes."""
    import subprocess

    path = tmp_path / "vit.pt2"
    model = transformers.ViTModel(transformers.ViTConfig(image_size=32, patch_size=8, **SMALL))
    program = qcompile.quantize(model, (torch.randn(1, 3, 32, 32),), recipe="fp8_per_channel_per_token", progress=False)
    torch.export.save(program, path)
    code = (
        "from qcompile.frontends.quantized import is_quantized; from qcompile.source import load_source; "
        f"s = load_source({str(path)!r}); print(is_quantized(s.model), s.dims)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split(maxsplit=1)[0] == "True" and "[1, 3, 32, 32]" in result.stdout


def test_program_file_errors(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no file"):
        load_source(str(tmp_path / "none.pt2"))
    (tmp_path / "bad.pt2").write_bytes(b"no archive")
    with pytest.raises(SourceError, match=r"bad\.pt2 cannot be read"):
        load_source(str(tmp_path / "bad.pt2"))
    with pytest.raises(SourceError, match="are for Hugging Face directories"):
        load_source(str(tmp_path / "bad.pt2"), random_weights=0)


# --- factories


def test_factories(factories: str) -> None:
    assert load_source(f"{factories}:pair").dims == {"input": [2, 4]}
    assert load_source(f"{factories}:keywords").kwargs.keys() == {"input"}
    source = load_source(f"{factories}:dynamic")
    assert source.dims == {"input": ["rows", 4]}
    with pytest.raises(SourceError, match="dynamic_shapes already"):
        with_dynamic_shapes(source, batch=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{}:wrong", "returned Linear; it has to return"),
        ("{}:fails", "RuntimeError: out of coffee"),
        ("{}:constant", "a function is wanted"),
        ("{}:missing", "has no missing"),
        ("nowhere_to_be_found:make", "no module 'nowhere_to_be_found'"),
        ("neither", "does not exist: a source is"),
    ],
)
def test_factory_errors(factories: str, name: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        load_source(name.format(factories))


# --- declared inputs


def declared(*texts: str) -> list[Any]:
    return parse_inputs(texts)


def test_a_function_that_returns_a_model_alone(factories: str) -> None:
    source = load_source(f"{factories}:wrong", inputs=declared("input=3x4:float16"))
    assert source.dims == {"input": [3, 4]} and source.args[0].dtype == torch.float16 and not source.kwargs
    source = load_source(f"{factories}:keywords", inputs=declared("input=3x4:float32"))
    assert source.kwargs["input"].shape == (3, 4) and not source.args


def test_a_program_without_example_inputs(tmp_path: Path) -> None:
    path = str(tmp_path / "two.pt2")
    program = torch.export.export(Two(), (torch.ones(2, 8),), {"ids": torch.ones(2, dtype=torch.int64)})
    program._example_inputs = None  # as of programs that other tools made
    torch.export.save(program, path)
    with pytest.raises(SourceError, match="without example inputs; declare them: --input") as told:
        load_source(path)
    texts = [text for text in str(told.value).split() if "=" in text]
    assert texts == ["x=2x8:float32", "ids=2:int64"]
    source = load_source(path, inputs=declared(*texts))
    assert source.dims == {"x": [2, 8], "ids": [2]} and not source.kwargs["ids"].any()
    quantized = qcompile.quantize(source.model, recipe="fp8_per_channel_per_token", progress=False)
    assert quantized.module()(torch.ones(2, 8), ids=torch.ones(2, dtype=torch.int64)).shape == (2, 8)
    for wrong in (["x=2x8:float32"], ["x=2x9:float32", texts[1]], [texts[0], "ids=2:int32"], [*texts, "y=1:bool"]):
        with pytest.raises(SourceError, match=r"other inputs .*: --input x=2x8:float32 ids=2:int64"):
            load_source(path, inputs=declared(*wrong))


def test_a_directory_whose_inputs_are_declared(tmp_path: Path) -> None:
    directory = config_only(tmp_path, transformers.BertConfig(**BERT), "BertModel")
    texts = ("input_ids=2x16:int64", "attention_mask=2x16:int64", "position_ids=2x16:int64")
    source = load_source(directory, random_weights=0, inputs=declared(*texts))
    assert isinstance(source.model, nn.Module) and source.kwargs["attention_mask"].all()
    assert source.kwargs["input_ids"].unique().numel() > 8 and not source.kwargs["position_ids"].any()
    with torch.no_grad():
        source.model(**source.kwargs)
    config_only(tmp_path, transformers.ResNetConfig(depths=[1], hidden_sizes=[8], embedding_size=8), "ResNetModel")
    with pytest.raises(SourceError, match=r"no image_size.*--input NAME=SHAPE:DTYPE"):
        load_source(directory, random_weights=0)
    pixels = declared("pixel_values=1x3x32x32:float32")
    assert load_source(directory, random_weights=0, inputs=pixels).dims == {"pixel_values": [1, 3, 32, 32]}
    with pytest.raises(SourceError, match=r"--input pixels: .* takes no such input; it takes pixel_values"):
        load_source(directory, random_weights=0, inputs=declared("pixels=1:bool"))


def test_declarations(factories: str) -> None:
    assert [str(one) for one in declared("step=:int64", "x=2x3:bool")] == ["step=:int64", "x=2x3:bool"]
    for bad in ("x", "x=2x3", "x=2x:int64", "x=2:long", "=2:int64"):
        with pytest.raises(SourceError, match="write it as name=shape:dtype"):
            declared(bad)
    with pytest.raises(SourceError, match="given twice"):
        declared("x=2:int64", "x=2:int64")
    with pytest.raises(SourceError, match="needs input, too"):
        load_source(f"{factories}:lazy", inputs=declared("other=2:int64"))


def test_batches_of_arguments_and_keywords_together(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(4, 8), "ids": torch.arange(4)}, tmp_path / "data.pt")
    source = Source(Two().eval(), (torch.ones(2, 8),), {"ids": torch.arange(2)})
    args, kwargs = open_calibration(str(tmp_path / "data.pt")).batches(source)[1]  # type: ignore[index]
    assert args[0].shape == (2, 8) and kwargs["ids"].tolist() == [2, 3]


# --- dynamic shapes


def test_dynamic_shapes_are_what_torch_export_takes() -> None:
    source = with_dynamic_shapes(two(batch=1), batch=True)
    assert source.dims == {"x": ["batch", 8], "ids": ["batch"]}
    assert source.args[0].shape == (2, 8), "torch.export takes a size of 1 for a constant"
    program = torch.export.export(source.model, source.args, dynamic_shapes=source.dynamic_shapes)  # type: ignore[arg-type]
    assert program.module()(torch.ones(5, 8), torch.ones(5)).shape == (5, 8)


def test_dynamic_shapes_of_nested_and_variable_inputs() -> None:
    class Nested(nn.Module):
        def forward(self, pair: dict[str, Tensor], *more: Tensor) -> Tensor:
            return pair["a"] + pair["b"] + more[0]

    ones = torch.ones(3, 4)
    source = Source(Nested(), ({"a": ones, "b": ones}, ones))
    assert list(source.inputs) == ["pair_a", "pair_b", "more_0"]
    source = with_dynamic_shapes(source, ["pair_a:0=n", "pair_b:0=n", "more_0:-2=n"])
    assert source.dims == {name: ["n", 4] for name in source.inputs}
    program = torch.export.export(source.model, source.args, dynamic_shapes=source.dynamic_shapes)  # type: ignore[arg-type]
    five = torch.ones(5, 4)
    assert program.module()({"a": five, "b": five}, five).shape == (5, 4)


def test_inputs_without_a_name_of_their_own_stay_static() -> None:
    class Open(nn.Module):
        def forward(self, x: Tensor, **named: Tensor) -> Tensor:
            return x + named["z"]

    source = Source(Open(), (torch.ones(3, 4),), {"z": torch.ones(3, 4)})
    assert list(source.inputs) == ["x", "z"]
    assert with_dynamic_shapes(source, ["x:1=n"]).dims["x"] == [3, "n"]
    with pytest.raises(
        SourceError, match=r"z: torch\.export has no dynamic shapes for what forward takes as \*\*named"
    ):
        with_dynamic_shapes(source, batch=True)


@pytest.mark.parametrize(
    ("dynamic", "message"),
    [
        (["x"], "write it as input:axis=dimension"),
        (["y:0=n"], "no input 'y'; the inputs are x, ids"),
        (["x:2=n"], r"x has 2 axes, \[2, 8\]"),
        (["x:1=n", "ids:0=n"], "differ in size: x:1 is 8, ids:0 is 2"),
    ],
)
def test_dynamic_errors(dynamic: list[str], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        with_dynamic_shapes(two(), dynamic)


# --- calibration data


@pytest.mark.parametrize("suffix", ["pt", "safetensors", "npz"])
def test_named_tensors_are_cut_into_batches(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"data.{suffix}"
    data = {"ids": torch.arange(5), "x": torch.arange(40.0).reshape(5, 8)}
    if suffix == "pt":
        torch.save(data, path)
    elif suffix == "safetensors":
        save_file(data, path)
    else:
        np.savez(path, **{name: tensor.numpy() for name, tensor in data.items()})
    batches = list(open_calibration(str(path)).batches(two()))
    assert [len(batch) for batch in batches] == [2, 2, 2]
    assert [batch[1].tolist() for batch in batches] == [[0, 1], [2, 3], [4]], "each sample once"
    assert torch.equal(batches[2][0], data["x"][4:])


def test_one_tensor_for_a_model_with_one_input(tmp_path: Path) -> None:
    np.save(tmp_path / "data.npy", np.ones((4, 4), np.float64))
    source = Source(nn.Linear(4, 4), (torch.ones(2, 4),))
    batches = list(open_calibration(str(tmp_path / "data.npy")).batches(source))
    assert len(batches) == 2 and batches[0][0].dtype == torch.float32
    with pytest.raises(CalibrationError, match="one tensor, but the model has the inputs x, ids"):
        open_calibration(str(tmp_path / "data.npy")).batches(two())


def test_calibration_from_a_function_or_a_list(factories: str, tmp_path: Path) -> None:
    source = load_source(f"{factories}:pair")
    assert len(list(open_calibration(f"{factories}:batches").batches(source))) == 3
    with pytest.raises(SourceError, match="has to return an iterable of batches"):
        open_calibration(f"{factories}:one_batch").batches(source)
    torch.save([(torch.ones(2, 4),)], tmp_path / "list.pt")
    assert len(list(open_calibration(str(tmp_path / "list.pt")).batches(source))) == 1


def test_random_data_stays_in_the_range_of_the_example() -> None:
    source = Source(Two(), (torch.randn(64, 8) * 3 + 10, torch.randint(5, 9, (64,))))
    batches = list(open_calibration("random").batches(source))
    again = list(open_calibration("random").batches(source))
    for (x, ids), (x2, ids2) in zip(batches, again, strict=True):
        assert torch.equal(x, x2) and torch.equal(ids, ids2)
        assert abs(float(x.mean()) - 10) < 1 and abs(float(x.std()) - 3) < 0.5
        assert int(ids.min()) >= 5 and int(ids.max()) <= 8 and ids.dtype == torch.int64
    assert not torch.equal(batches[0][0], batches[1][0])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"x": torch.ones(4, 8)}, "lacks ids; the model's inputs are x, ids"),
        ({"x": torch.ones(4, 8), "ids": torch.ones(4), "y": torch.ones(4)}, "holds y, which the model does not take"),
        ({"x": torch.ones(4, 8), "ids": torch.ones(4)}, "ids is torch.float32, but the model takes torch.int64"),
        ({"x": torch.ones(4), "ids": torch.arange(4)}, r"x is \[4\], but the model takes \[2, 8\]"),
        ({"x": torch.ones(4, 8), "ids": torch.arange(6)}, "different numbers of samples: x has 4, ids has 6"),
        ({"x": torch.ones(1, 8), "ids": torch.arange(1)}, "1 samples, fewer than one batch of 2"),
        (3, "holds a int"),
    ],
)
def test_calibration_errors(tmp_path: Path, data: Any, message: str) -> None:
    torch.save(data, tmp_path / "data.pt")
    with pytest.raises(CalibrationError, match=message):
        open_calibration(str(tmp_path / "data.pt")).batches(two())


def test_arrays_that_are_no_tensors_are_named_and_never_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return (tmp_path / "sprung").touch, ()  # type: ignore[return-value]

    for array in (np.array([Trap()], dtype=object), np.array(["text"])):
        np.savez(tmp_path / "data.npz", x=array, ids=np.arange(2))
        with pytest.raises(CalibrationError, match=r"data\.npz: the array 'x' is no tensor"):
            open_calibration(str(tmp_path / "data.npz")).batches(two())
    assert not (tmp_path / "sprung").exists()


def test_so_many_samples_are_taken_as_asked(factories: str, tmp_path: Path) -> None:
    torch.save({"x": torch.ones(6, 8), "ids": torch.arange(6)}, tmp_path / "data.pt")
    batches = list(open_calibration(str(tmp_path / "data.pt"), samples=3).batches(two()))
    assert [batch[1].tolist() for batch in batches] == [[0, 1], [2]]
    source = load_source(f"{factories}:pair")
    for text, samples, count in ((f"{factories}:batches", 3, 2), ("random", 12, 6), ("random", None, 4)):
        assert len(list(open_calibration(text, samples=samples).batches(source))) == count


def test_data_give_a_directory_the_sizes_of_its_inputs(tmp_path: Path) -> None:
    """And an attention_mask of a decoder makes it an input."""
    directory = config_only(tmp_path, transformers.LlamaConfig(**BERT), "LlamaForCausalLM")
    np.savez(tmp_path / "ids.npz", input_ids=np.ones((3, 24), np.int64), attention_mask=np.ones((3, 24), np.int64))
    data = open_calibration(str(tmp_path / "ids.npz"), directory)
    source = load_source(directory, random_weights=0, shapes=data.shapes())
    assert source.dims == {"input_ids": [1, 24], "attention_mask": [1, 24]}
    assert [batch["attention_mask"].shape for batch in data.batches(source)] == 3 * [(1, 24)]
    source = load_source(directory, random_weights=0, sequence=16, shapes=data.shapes())
    with pytest.raises(CalibrationError, match=r"input_ids is \[3, 24\].*captured with \[1, 16\]") as told:
        data.batches(source)
    assert remedy_of(told.value).options == {"--sequence": ("24",)}


def test_calibration_file_errors(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="no calibration file"):
        open_calibration(str(tmp_path / "none.npz")).batches(two())
    with pytest.raises(CalibrationError, match="is not there: give a folder of images"):
        open_calibration("images.zip").batches(two())
    for suffix in ("pt", "safetensors", "npz", "npy"):
        (tmp_path / f"bad.{suffix}").write_bytes(b"nothing like it")
        with pytest.raises(CalibrationError, match="cannot be read as tensors"):
            open_calibration(str(tmp_path / f"bad.{suffix}")).batches(two())
