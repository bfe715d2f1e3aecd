"""What each shipped recipe does to the modules of real models, and that its description says so.

Three statements have to agree: the description, read by `claims`; the table `RECIPES`, written by hand; and what the
rules decide on the modules of real model classes, sorted into roles by hand in `families.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch

from qcompile.recipe import QuantizerName, list_fragments, list_recipes, load_recipe, resolve
from qcompile.recipe.globs import ATTENTION
from tests.qcompile.recipe.families import FAMILIES

KEPT = ("head", "embedding", "router", "conditioning")
"""Roles that no shipped recipe quantizes."""

# role -> format. attn: Q, K, V and O projections; other: linears that are neither attention nor MLP, or both at once;
# conv: patch embeddings; bmm: the four operands of attention.
FP8: dict[str, str | None] = dict.fromkeys(("attn", "mlp", "other", "conv", "tower", "bmm"), "fp8")
NVFP4: dict[str, str | None] = dict.fromkeys(("attn", "mlp", "other"), "nvfp4") | {
    "conv": "fp8",
    "tower": None,
    "bmm": None,
}
RECIPES: dict[str, dict[str, str | None]] = {
    "fp8": FP8,
    "fp8_gemm": FP8 | {"bmm": None},
    "fp8_block": FP8 | {"bmm": None},
    "fp8_per_channel_per_token": FP8 | {"bmm": None},
    "int8": dict.fromkeys(FP8, "int8") | {"bmm": None},
    "int8_fast": dict.fromkeys(FP8, "int8") | {"bmm": None},
    "int8_attention": dict.fromkeys(FP8, "int8"),
    "int8_per_channel_per_token": dict.fromkeys(FP8, "int8") | {"bmm": None},
    "nvfp4": NVFP4,
    "nvfp4_fast": NVFP4,
    "nvfp4_low_rank": NVFP4,
    "nvfp4_weight_only": NVFP4 | {"conv": None},
    "int4_weight_only": dict.fromkeys(("attn", "mlp", "other"), "int4") | dict.fromkeys(("conv", "tower", "bmm")),
    "nvfp4_mlp_only": NVFP4 | {"attn": None, "other": None, "conv": None},
    "nvfp4_fp8_attention": NVFP4 | {"bmm": "fp8"},
    "fp8_qkvo-nvfp4_mlp": FP8 | {"mlp": "nvfp4", "tower": None},
}

WEIGHT_ONLY = ("nvfp4_weight_only", "int4_weight_only")

ATTENTION_MODULE = re.compile(r"(^|\.)(self_attn|encoder_attn|attn\d?|attention|SelfAttention|attention\.self)$")


@cache
def quantizers(family: str) -> dict[str, list[QuantizerName]]:
    """Role -> every quantizer of that role in the model; each weight has a role."""
    library, cls, config, roles = FAMILIES[family]
    module = pytest.importorskip(library)
    with torch.device("meta"):
        build: Callable[..., torch.nn.Module] = getattr(module, cls)
        model = build(**config) if library == "diffusers" else build(build.config_class(**config))  # type: ignore[attr-defined]
    role_of = {path: role for role, paths in roles.items() for path in paths}
    found: dict[str, list[QuantizerName]] = {"bmm": []}
    for path, owner in weights(model):
        role = role_of[re.sub(r"\d+", "N", path)]
        found.setdefault(role, []).extend(
            QuantizerName(f"{path}.{kind}_quantizer", owner) for kind in ("weight", "input")
        )
    for path, part in model.named_modules():
        if ATTENTION_MODULE.search(path) and any(True for _ in part.children()) and not in_tower(path):
            found["bmm"] += [QuantizerName(f"{path}.{kind}", class_of(part)) for kind in ATTENTION]
    unused = set(role_of) - {re.sub(r"\d+", "N", path) for path, _ in weights(model)}
    assert not unused and found["bmm"], unused
    return found


def weights(model: torch.nn.Module) -> Iterator[tuple[str, str]]:
    """(path, class of the owner) of everything that `find_sites` could call a linear, and of table look-ups."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = model.get_submodule(name.rpartition(".")[0])
        sliced = name.endswith("decoder.embed_positions.weight")  # Whisper's: neither a product nor a look-up
        if parameter.ndim >= 2 and re.search(r"weight$|experts\.\w+_proj$", name) and not sliced:
            yield re.sub(r"[._]weight$", "", name), class_of(owner)


def in_tower(path: str) -> bool:
    return re.search(r"vision_tower|visual|(^|\.)head\.", path) is not None


def class_of(module: torch.nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def claims(description: str) -> dict[str, str | None]:
    """role -> format, as the English of a shipped description has it."""
    quantized, kept = re.fullmatch(r"(.+)\. ([^.]+) stay in the model's dtype\.", description).groups()  # type: ignore[union-attr]
    parts = re.split(r", | and ", kept.lower())
    assert {"heads", "embeddings", "routers", "classifiers", "diffusion conditioning"} <= set(parts)
    ((form, scope),) = re.findall(r"\b(NVFP4|FP8|INT8|INT4)\b[^;]*? for (every linear|the linears of MLPs)", quantized)
    main = form.lower()
    rest = "fp8" if "FP8 for every other linear" in quantized else None
    assert (rest is None) == (scope == "every linear" or "every other linear" in parts)
    found: dict[str, str | None] = {"mlp": main}
    found["attn"] = found["other"] = main if scope == "every linear" else rest
    found["conv"] = None if "convolutions" in parts else "fp8" if "for convolutions" in quantized else main
    found["tower"] = None if "vision towers" in parts else main
    attention = re.search(r"\b(FP8|INT8) attention", quantized)
    found["bmm"] = attention[1].lower() if attention else None
    assert (found["bmm"] is None) == ("attention" in parts)
    return found


@pytest.mark.parametrize("recipe", list_recipes())
def test_a_description_says_what_the_table_says(recipe: str) -> None:
    description = load_recipe(recipe).metadata.description
    assert claims(description) == RECIPES[recipe]
    assert ("Activations" in description.split(". ")[-1]) == (recipe in WEIGHT_ONLY)


@pytest.mark.everyday(60)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", list_recipes())
def test_a_recipe_does_what_the_table_says(recipe: str, family: str) -> None:
    parts = quantizers(family)
    result = resolve(load_recipe(recipe), [name for found in parts.values() for name in found])
    for role, found in parts.items():
        expected = None if role in KEPT else RECIPES[recipe][role]
        for name in found:
            wanted = None if recipe in WEIGHT_ONLY and name.kind == "input_quantizer" else expected
            config = result.configs.get(name.name)
            assert (config.format if config else None) == wanted, f"{name.name} ({role})"


@pytest.mark.everyday(12)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", ["fp8_qkvo-nvfp4_mlp", "nvfp4_mlp_only"])  # they import all fragments
def test_a_wrapper_changes_no_decision(recipe: str, family: str) -> None:
    """Whether the model is an attribute, a member of a Sequential, or in two wrappers."""
    found = [name for names in quantizers(family).values() for name in names]
    rules = load_recipe(recipe)
    alone = resolve(rules, found)
    for prefix in ("m.", "0.", "pipe.1.net."):
        inside = resolve(rules, [QuantizerName(prefix + name.name, name.module_class) for name in found])
        assert {prefix + name: config for name, config in alone.configs.items()} == inside.configs
        assert {prefix + name: rule for name, rule in alone.disabled.items()} == inside.disabled


def test_the_recipes_of_the_wrappers_import_all_fragments() -> None:
    recipes = [load_recipe(name) for name in ("fp8_qkvo-nvfp4_mlp", "nvfp4_mlp_only")]
    files = {rule.where.file.rpartition("/")[2] for recipe in recipes for rule in recipe.rules}
    # two of bare globs, one by what is in a graph, which these names do not know, and those for who asks
    asked_for = {"nvfp4_linears.yaml", "int8_linears.yaml", "convolutions_half.yaml"}
    asked_for |= {"fp8_kv_cast.yaml", "fp8_kv.yaml", "int8_kv.yaml"}
    assert files == {f"{name}.yaml" for name in list_fragments()} - asked_for


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "flux", "vit"])
@pytest.mark.parametrize("recipe", [name for name in list_recipes() if "nvfp4" in name])
def test_one_override_rotates_nvfp4_and_nothing_else(recipe: str, family: str) -> None:
    found = [name for names in quantizers(family).values() for name in names]
    plain = resolve(load_recipe(recipe), found).configs
    rotated = resolve(load_recipe(recipe, ["rules[format=nvfp4].rotate=true"]), found).configs
    assert any(config.rotate for config in rotated.values()) and not any(config.rotate for config in plain.values())
    assert {name: config.rotate for name, config in rotated.items()} == {
        name: config.format == "nvfp4" for name, config in plain.items()
    }


def test_the_report_says_why_a_convolution_and_a_vision_tower_differ() -> None:
    vit = resolve(load_recipe("nvfp4"), [name for found in quantizers("vit").values() for name in found])
    reasons = [str(notice) for notice in vit.notices if notice.kind == "reason"]
    assert len(reasons) == 2 and "1 module not quantized (classifier): by its name this is the head" in reasons[1]
    assert reasons[0].endswith(
        "1 module fp8 (vit.embeddings.patch_embeddings.projection): TensorRT runs convolutions in FP8 or INT8 only"
    )
    llava = resolve(load_recipe("nvfp4"), [name for found in quantizers("llava").values() for name in found])
    (reason,) = (
        notice.message for notice in llava.notices if "vision_towers.yaml" in notice.file and notice.kind == "reason"
    )
    assert "modules not quantized (model.vision_tower." in reason
    weight_only = resolve(load_recipe("nvfp4_weight_only"), quantizers("vit")["conv"])
    assert "1 module not quantized (vit.emb" in str([n for n in weight_only.notices if n.kind == "reason"])
    llama = resolve(load_recipe("nvfp4"), [name for found in quantizers("llama").values() for name in found])
    assert not [notice for notice in llama.notices if notice.kind == "reason"]


def test_attention_in_a_vision_tower_stays_out() -> None:
    found = [QuantizerName(f"model.vision_tower.encoder.layers.0.self_attn.{kind}") for kind in ATTENTION]
    for recipe in ("nvfp4_fp8_attention", "fp8_qkvo-nvfp4_mlp"):
        assert not resolve(load_recipe(recipe), found).configs


@pytest.mark.everyday(6)
@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("blocks.0.attn.qkv", "attn"),  # timm
        ("blocks.0.attn.proj", "attn"),
        ("blocks.0.mlp.fc1", "mlp"),
        ("model.layers.0.block_sparse_moe.experts.3.w1", "mlp"),  # Mixtral before transformers 5
        ("model.layers.0.mlp.experts.3.down_proj", "mlp"),
        ("layers.0.linear1", "mlp"),  # torch.nn.TransformerEncoder
        ("layers.0.self_attn.out_proj", "attn"),
        ("encoder.layer.11.output.dense", "mlp"),
        ("encoder.layer.11.attention.output.dense", "attn"),
        ("layers.1.blocks.0.output.dense", "other"),  # Swin before transformers 5, safe if not recognised
        ("encoder.layers.encoder_layer_0.mlp.0", "mlp"),  # torchvision
        ("transformer.blocks.0.ffn.up_proj", "mlp"),
        ("blocks.0.ffn.net.0.proj", "mlp"),  # Wan
        ("visual.transformer.resblocks.0.mlp.c_fc", "mlp"),  # open_clip, no tower of a language model
        ("vision_model.encoder.layers.0.mlp.fc1", "mlp"),
        ("model.vision_model.transformer.layers.0.mlp.fc1", "tower"),  # Llama 3.2
        ("vision_model.model.layers.0.mlp.fc1", "tower"),  # Llama 4
        ("fc", "head"),
        ("model.fc", "head"),
        ("", "other"),
    ],
)
def test_paths_of_other_libraries(path: str, role: str) -> None:
    name = QuantizerName(f"{path}.weight_quantizer".lstrip("."), "torch.nn.modules.linear.Linear")
    for recipe in list_recipes():
        config = resolve(load_recipe(recipe), [name]).configs.get(name.name)
        assert (config.format if config else None) == RECIPES[recipe].get(role), recipe
