"""Models with something around or in them: written as the plain model is, or refused; never changed."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.utils import parametrizations, prune
from torch.testing._internal.distributed.fake_pg import FakeStore

import qcompile
from qcompile.checkpoint.hub.wrappers import local
from qcompile.checkpoint.write.save import save_checkpoint
from qcompile.errors import CheckpointError
from tests.qcompile.checkpoint.models import batch, read, same, save, tiny

Wrap = Callable[[Any], Any]
RECIPE = "nvfp4_weight_only"


@pytest.fixture(scope="module")
def plain() -> Any:
    torch.manual_seed(0)
    return tiny("llama", torch.float32, num_hidden_layers=1)


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def write(model: Any, directory: Path, **options: Any) -> dict[str, torch.Tensor]:
    save_checkpoint(model, directory, **{"format": "modelopt", "recipe": RECIPE, "progress": False, **options})
    return read(directory)


def state(model: torch.nn.Module) -> tuple[dict[str, torch.Tensor], list[tuple[int, int, bool]]]:
    """Tensors, and the hooks and mode of each module."""
    hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks), m.training) for m in model.modules()]
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}, hooks


def assert_written_like(given: Any, expected: Any, directory: Path) -> None:
    """The same files, and `given` as it was."""
    directory.mkdir(exist_ok=True)
    before, hooks = state(given)
    found, wanted = write(given, directory / "given"), write(expected, directory / "expected")
    assert found.keys() == wanted.keys() and not [name for name in wanted if not same(found[name], wanted[name])]
    configs = [json.loads((directory / side / "config.json").read_text()) for side in ("given", "expected")]
    assert configs[0] == configs[1]
    after, hooks_after = state(given)
    assert hooks == hooks_after and before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def compiled_block(model: Any) -> Any:
    model.model.layers[0] = torch.compile(model.model.layers[0])
    return model


WRAPPERS: list[Wrap] = [
    torch.compile,
    compiled_block,
    torch.nn.DataParallel,
    lambda model: torch.compile(torch.nn.DataParallel(compiled_block(model))),
]


@pytest.mark.parametrize("wrap", WRAPPERS, ids=["compile", "compiled-block", "data-parallel", "all"])
def test_wrappers_are_taken_off(tmp_path: Path, plain: Any, wrap: Wrap) -> None:
    assert_written_like(wrap(copy.deepcopy(plain)), plain, tmp_path)


def test_one_process_of_ddp_and_of_fsdp2(tmp_path: Path, plain: Any, group: None) -> None:
    parallel = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(plain))
    assert_written_like(parallel, plain, tmp_path / "ddp")
    sharded = copy.deepcopy(plain)
    fully_shard(sharded.model.layers[0])
    fully_shard(sharded)
    assert type(sharded).__name__ == "FSDPLlamaForCausalLM"
    found = write(sharded, tmp_path / "fsdp")
    assert not [n for n, tensor in read(tmp_path / "ddp" / "expected").items() if not same(found[n], tensor)]
    assert json.loads((tmp_path / "fsdp/config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_a_shard_is_not_a_tensor() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        whole = DTensor.from_local(torch.ones(2, 2), mesh, [Replicate()], run_check=False)
        assert torch.equal(local("w", whole), torch.ones(2, 2))
        with pytest.raises(CheckpointError, match=r"w is sharded over 2 processes \(DTensor\): gather it first"):
            local("w", DTensor.from_local(torch.ones(2, 2), mesh, [Shard(0)], run_check=False))
    finally:
        dist.destroy_process_group()


def old_weight_norm(linear: torch.nn.Linear) -> None:
    with pytest.warns(FutureWarning):
        torch.nn.utils.weight_norm(linear)
    linear.weight_g.data *= 1.5


def new_weight_norm(linear: torch.nn.Linear) -> None:
    parametrizations.weight_norm(linear).parametrizations.weight.original0.data *= 1.5


def pruned(linear: torch.nn.Linear) -> None:
    prune.l1_unstructured(linear, "weight", 0.3)
    linear.weight_orig.data *= 2  # what is trained


@pytest.mark.everyday(3)
@pytest.mark.parametrize(
    "compute",
    [
        old_weight_norm,
        new_weight_norm,
        pruned,
        torch.nn.utils.spectral_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
    ],
)
def test_computed_weights_are_written_as_values(tmp_path: Path, plain: Any, compute: Callable[[Any], object]) -> None:
    given, expected = copy.deepcopy(plain), copy.deepcopy(plain)
    compute(given.model.layers[0].self_attn.q_proj)
    with torch.no_grad():
        logits = given(**batch()).logits  # hooks compute it when they are called
        expected.model.layers[0].self_attn.q_proj.weight.copy_(given.model.layers[0].self_attn.q_proj.weight)
        assert torch.equal(expected(**batch()).logits, logits)
    given.train()  # a spectral norm would take a step now
    assert_written_like(given, expected, tmp_path)
    report = save_checkpoint(given, tmp_path / "x", format="modelopt", recipe=RECIPE, progress=False)
    assert report.notices[0].startswith("model.layers.0.self_attn.q_proj.weight: written as computed")


def lora(model: Any) -> None:
    """Under peft's names, by somebody else."""
    layer = model.model.layers[0].self_attn.q_proj
    layer.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(128, 4, bias=False)})


def hook_made(model: Any) -> None:
    layer = model.model.layers[0].self_attn.q_proj
    weight = layer._parameters.pop("weight")
    layer.weight = weight.detach() * 2


def narrow(model: Any) -> None:
    model.model.layers[0].self_attn.q_proj = torch.nn.Linear(128, 64, bias=False)


def untied(model: Any) -> None:
    model.config.tie_word_embeddings = True


def nowhere(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.to("meta")


REFUSED: list[tuple[Callable[[Any], None], str]] = [
    (lora, r"^model.layers.0.self_attn.q_proj.lora_A.default: Llama.* has no .*lora_A.* merge it first: model = "),
    (hook_made, r"^model.layers.0.self_attn.q_proj.weight: .* has this tensor, and the model in memory has not"),
    (narrow, r"q_proj.weight is \[64, 128\], and LlamaForCausalLM has \[128, 128\]"),
    (untied, r"lm_head.weight is not model.embed_tokens.weight, to which the configuration ties it"),
    (nowhere, r"model.layers.0.mlp.up_proj.weight is on the meta device"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[case[0].__name__ for case in REFUSED])
def test_what_no_reader_would_find_is_refused(
    tmp_path: Path, plain: Any, change: Callable[[Any], None], message: str
) -> None:
    model = copy.deepcopy(plain)
    change(model)
    with pytest.raises(CheckpointError, match=message):
        write(model, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_the_part_of_a_wrapper_of_ones_own_is_named(tmp_path: Path, plain: Any) -> None:
    class Wrapper(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = plain

    with pytest.raises(CheckpointError, match=r"Wrapper is no PreTrainedModel .*: give its part inner"):
        write(Wrapper(), tmp_path / "out")


def test_hooks_are_said_to_be_left_out(tmp_path: Path, plain: Any) -> None:
    model = copy.deepcopy(plain)
    model.model.layers[0].mlp.up_proj.register_forward_pre_hook(lambda module, args: None)
    report = save_checkpoint(model, tmp_path / "out", format="modelopt", recipe=RECIPE, progress=False)
    assert report.notices[0].startswith("forward hooks of model.layers.0.mlp.up_proj are in no checkpoint")


def test_directories_of_wrapped_models(tmp_path: Path, plain: Any) -> None:
    """What `torch.save(compiled.state_dict())` and its like name tensors; a PeftModel or DDP, too."""
    source = save(plain, tmp_path / "source", "1GB")
    wanted = write(source, tmp_path / "wanted")
    from safetensors.torch import load_file, save_file

    tensors = load_file(source / "model.safetensors")
    for number, prefix in enumerate(("module._orig_mod.", "base_model.model.", "_orig_mod.")):
        renamed = {prefix + name.replace("layers.0.", "layers.0._orig_mod."): t for name, t in tensors.items()}
        save_file(renamed, source / "model.safetensors", {"format": "pt"})
        found = write(source, tmp_path / str(number))
        assert found.keys() == wanted.keys() and all(same(found[name], wanted[name]) for name in wanted)
    (source / "config.json").rename(source / "adapter_config.json")
    with pytest.raises(CheckpointError, match=r"source holds an adapter \(adapter_config.json\) and no model: merge"):
        write(source, tmp_path / "out")


@pytest.mark.slow
def test_a_program_of_a_wrapped_model(tmp_path: Path, plain: Any) -> None:
    program = qcompile.quantize(plain, (), batch(), recipe=RECIPE, dtype=torch.float32, progress=False)
    wanted = write(program, tmp_path / "wanted", source=plain, recipe=None)

    class Parallel(torch.nn.Module):
        """As DataParallel names its part, but traceable."""

        def __init__(self) -> None:
            super().__init__()
            self.module = plain

        def forward(self, input_ids: torch.Tensor) -> Any:
            return self.module(input_ids, use_cache=False).logits

    program = qcompile.quantize(Parallel(), (), batch(), recipe=RECIPE, dtype=torch.float32, progress=False)
    found = write(program, tmp_path / "found", source=torch.nn.DataParallel(plain), recipe=None)
    assert found.keys() == wanted.keys() and all(same(found[name], wanted[name]) for name in wanted)
