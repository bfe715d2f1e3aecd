"""The shipped recipes on the module names of real models, and against the JSON schema by an independent validator."""

from __future__ import annotations

import re
from collections.abc import Iterator

import jsonschema
import pytest
import torch
import yaml

from qcompile.recipe import (
    QuantizerName,
    Recipe,
    fragment_description,
    fragment_path,
    list_fragments,
    list_recipes,
    load_recipe,
    recipe_path,
    resolve,
    unsupported,
)
from qcompile.recipe.globs import ATTENTION
from qcompile.recipe.schema import Fragment

SHIPPED = [
    "fp8",
    "fp8_block",
    "fp8_gemm",
    "fp8_per_channel_per_token",
    "fp8_qkvo-nvfp4_mlp",
    "int4_weight_only",
    "int8",
    "int8_attention",
    "int8_fast",
    "int8_per_channel_per_token",
    "nvfp4",
    "nvfp4_fast",
    "nvfp4_fp8_attention",
    "nvfp4_low_rank",
    "nvfp4_mlp_only",
    "nvfp4_weight_only",
]
EVERY_LINEAR = [name for name in SHIPPED if name not in ("nvfp4_mlp_only", "nvfp4_weight_only", "int4_weight_only")]


def quantizers(model: torch.nn.Module, prefix: str = "") -> Iterator[QuantizerName]:
    """Every quantizer that a graph of this model could have, table look-ups and routers included."""
    for path, module in model.named_modules(prefix=prefix):
        weight = getattr(module, "weight", None)
        cls = f"{type(module).__module__}.{type(module).__qualname__}"
        if isinstance(weight, torch.nn.Parameter) and weight.ndim >= 2:
            yield QuantizerName(f"{path}.weight_quantizer", cls)
            yield QuantizerName(f"{path}.input_quantizer", cls)
        if re.search(r"(attention|attn|attention\.self)$", path) and "Norm" not in cls:
            yield from (QuantizerName(f"{path}.{kind}", cls) for kind in ATTENTION)


def left_out(model: torch.nn.Module, recipe: str = "fp8", prefix: str = "") -> set[str]:
    """Paths of the modules with a weight that the recipe leaves alone; layer numbers become N."""
    found = list(quantizers(model, prefix))
    configs = resolve(load_recipe(recipe), found).configs
    names = [name.name.removesuffix(".weight_quantizer") for name in found if name.kind == "weight_quantizer"]
    inputs = {name.removesuffix(".input_quantizer") for name in configs if name.endswith(".input_quantizer")}
    weights = {name.removesuffix(".weight_quantizer") for name in configs if name.endswith(".weight_quantizer")}
    assert inputs == weights
    return {re.sub(r"\.\d+", ".N", name) for name in names if name not in weights}


def hugging_face(kind: str, **sizes: int) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, kind.split("For")[0].removesuffix("Model") + "Config")(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, **sizes
    )
    with torch.device("meta"):
        model = getattr(transformers, kind)(config)
    assert isinstance(model, torch.nn.Module)
    return model


def test_the_list_is_the_promised_one() -> None:
    assert list(list_recipes()) == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_files_fit_the_json_schema(name: str) -> None:
    schema = Recipe.model_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    data = yaml.safe_load(recipe_path(name).read_text(encoding="utf-8"))
    validator.validate(data)
    assert {tuple(rule) for rule in data["rules"] if "import" in rule} == {("import",)}
    validator.validate(load_recipe(name).model_dump(mode="json"))
    data["rules"][0]["formt"] = "fp8"
    assert not validator.is_valid(data)


@pytest.mark.parametrize("name", list_fragments())
def test_fragments_are_no_recipes(name: str) -> None:
    assert name not in list_recipes()
    assert fragment_description(name).endswith(".")
    jsonschema.validate(yaml.safe_load(fragment_path(name).read_text(encoding="utf-8")), Fragment.model_json_schema())


def test_every_fragment_is_used() -> None:
    """Or is for recipes of one's own."""
    used = {rule.where.file.split("/")[-1] for name in SHIPPED for rule in load_recipe(name).rules}
    assert {f"{name}.yaml" for name in list_fragments()} - used == {"fp8_kv_cast.yaml", "fp8_kv.yaml", "int8_kv.yaml"}


@pytest.mark.parametrize("name", SHIPPED)
def test_names_match_and_this_version_runs_them(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.metadata.name == name
    model = [QuantizerName(f"layers.0.{kind}") for kind in ("fc1.weight_quantizer", "fc1.input_quantizer", *ATTENTION)]
    configs = resolve(recipe, model).configs
    assert [unsupported(config) for config in configs.values()] == [None] * len(configs)
    linear = 1 if name.endswith("_weight_only") else 2
    assert len(configs) == linear + (4 if re.search("(FP8|INT8) attention", recipe.metadata.description) else 0)


@pytest.mark.parametrize(
    ("name", "weight", "activation"),
    [
        ("fp8", ("fp8", "per_tensor", False), ("fp8", "per_tensor", False)),
        ("fp8_gemm", ("fp8", "per_tensor", False), ("fp8", "per_tensor", False)),
        ("fp8_per_channel_per_token", ("fp8", "per_channel", False), ("fp8", "per_token", True)),
        ("fp8_block", ("fp8", "per_block", False), ("fp8", "per_block", True)),
        ("int8", ("int8", "per_channel", False), ("int8", "per_tensor", False)),
        ("int8_per_channel_per_token", ("int8", "per_channel", False), ("int8", "per_token", True)),
        ("nvfp4", ("nvfp4", "per_block", False), ("nvfp4", "per_block", True)),
        ("fp8_qkvo-nvfp4_mlp", ("fp8", "per_tensor", False), ("fp8", "per_tensor", False)),
    ],
)
def test_layouts_are_the_promised_ones(
    name: str, weight: tuple[str, str, bool], activation: tuple[str, str, bool]
) -> None:
    configs = resolve(
        load_recipe(name), [QuantizerName("up.weight_quantizer"), QuantizerName("up.input_quantizer")]
    ).configs
    found = [(config.format, config.granularity, config.dynamic) for config in configs.values()]
    assert found == [weight, activation]


def test_blocks_of_fp8_are_those_of_the_checkpoints() -> None:
    found = [QuantizerName("up.weight_quantizer"), QuantizerName("up.input_quantizer")]
    configs = resolve(load_recipe("fp8_block"), found).configs
    assert [config.block_shape for config in configs.values()] == [(128, 128), (1, 128)]


@pytest.mark.parametrize("name", EVERY_LINEAR)
@pytest.mark.parametrize("prefix", ["", "wrapper.model"])
def test_a_vit_keeps_only_its_classifier(name: str, prefix: str) -> None:
    path = f"{prefix}.classifier".lstrip(".")
    assert left_out(hugging_face("ViTForImageClassification"), name, prefix) == {path}


def test_a_vit_has_its_patch_embedding_and_pooler_in() -> None:
    assert left_out(hugging_face("ViTModel")) == set()


@pytest.mark.parametrize(
    ("kind", "sizes", "expected"),
    [
        ("LlamaForCausalLM", {"vocab_size": 64}, {"model.embed_tokens", "lm_head"}),
        ("LlamaForSequenceClassification", {"vocab_size": 64}, {"model.embed_tokens", "score"}),
        (
            "BertForMaskedLM",
            {"vocab_size": 64},
            {f"bert.embeddings.{n}_embeddings" for n in ("word", "position", "token_type")}
            | {"cls.predictions.decoder", "cls.predictions.transform.dense"},
        ),
        ("BertModel", {"vocab_size": 64}, {f"embeddings.{n}_embeddings" for n in ("word", "position", "token_type")}),
        (
            "MixtralForCausalLM",
            {"vocab_size": 64, "num_key_value_heads": 2},
            {"model.embed_tokens", "lm_head", "model.layers.N.mlp.gate"},
        ),
        (
            "Qwen3MoeForCausalLM",
            {"vocab_size": 64, "num_key_value_heads": 2, "moe_intermediate_size": 32, "num_experts": 4},
            {"model.embed_tokens", "lm_head", "model.layers.N.mlp.gate"},
        ),
    ],
)
def test_what_hugging_face_models_keep(kind: str, sizes: dict[str, int], expected: set[str]) -> None:
    assert left_out(hugging_face(kind, **sizes)) == expected


@pytest.mark.parametrize(
    ("path", "quantized"),
    [
        ("patch_embed.proj", True),
        ("blocks.0.attn.qkv", True),
        ("head", False),
        ("heads.head", False),
        ("model.head_dist", False),
        ("model.layers.0.mlp.gate_proj", True),
        ("model.layers.0.mlp.experts.3.gate_proj", True),
        ("model.layers.0.mlp.experts.gate_up_proj", True),
        ("model.layers.0.mlp.shared_expert.gate_proj", True),
        ("model.layers.0.mlp.shared_expert_gate", False),
        ("model.layers.0.block_sparse_moe.gate", False),
        ("model.layers.0.mlp.router", False),
        ("encoder.block.1.layer.1.mlp.router.classifier", False),
        ("roberta.lm_head.dense", False),
        ("lm_head.decoder", False),
        ("decoder.layers.0.fc1", True),
        ("transformer.blocks.0.multihead.out_proj", True),
        ("sa.heads.0.key", True),
        ("pooler.dense", True),
        ("single_transformer_blocks.0.proj_out", True),
        ("wrapper.single_transformer_blocks.0.proj_out", True),
        *((f"{prefix}proj_out", False) for prefix in ("", "m.", "0.", "a.b.", "pipe.0.transformer.")),
        *((f"{prefix}fc", False) for prefix in ("", "m.", "1.", "module.", "a.b.", "m.0.", "encoder.")),  # ResNet
        ("fc.0", False),
        ("fc.2", False),
        ("last_linear", False),
        ("logits", False),
        ("m.to_logits", False),
        ("mlp_head.1", False),
        ("classification_head.out_proj", False),
        ("cls.seq_relationship", False),
        ("generator_predictions.dense", False),
        ("vocab_projector", False),
        ("sequence_summary.start_logits", False),
        ("m.output", False),  # Llama as Meta and torchtune have it
        ("decoder", False),  # ModernBERT, PyTorch's language models
        ("model.decoder", False),
        ("final_layer.linear", False),
        *((f"{path}.fc", True) for path in ("layers.0", "blocks.3.mlp", "mlp", "h.0", "encoder.1", "layer1.0.se")),
        *((f"m.{path}.fc", True) for path in ("layers.0", "blocks.3.mlp", "mlp", "h.0", "stages.0.ffn")),
        ("fc1", True),
        ("layers.0.fc2", True),
        ("layers.0.attention.output", True),
        ("encoder.layer.0.output.dense", True),
        ("decoder.layers.0.self_attn.q_proj", True),
        ("decoder.block.0.layer.0.SelfAttention.q", True),
        ("decoder_embed", True),
        ("vision_model.head.mlp.fc1", False),
        ("", True),
    ],
)
def test_module_paths_of_other_libraries(path: str, quantized: bool) -> None:
    name = f"{path}.weight_quantizer".lstrip(".")
    assert (
        name in resolve(load_recipe("fp8"), [QuantizerName(name, "torch.nn.modules.linear.Linear")]).configs
    ) is quantized


@pytest.mark.parametrize("name", SHIPPED)
def test_a_model_of_the_first_hour_is_quantized(name: str) -> None:
    """No rule guesses from the place of a layer: the last linear of a plain model has no name of a head."""
    paths = ["", "0", "2", "net.4", "fc1", "fc2", "fc3", "linear", "up", "down", "proj", "linear1", "ffn.0"]
    found = [QuantizerName(f"{path}.{kind}_quantizer".lstrip(".")) for path in paths for kind in ("weight", "input")]
    off = resolve(load_recipe(name), found).disabled
    assert off == {}


def test_what_a_name_tells_is_said_with_its_reason() -> None:
    found = [QuantizerName(f"{path}.weight_quantizer") for path in ("layers.0.fc", "fc", "output")]
    notices = [str(n) for n in resolve(load_recipe("nvfp4_weight_only"), found).notices if n.kind == "reason"]
    assert [text.partition(": ")[2].partition(":")[0] for text in notices] == [
        "1 module not quantized (fc)",
        "1 module not quantized (output)",
    ]


def test_attention_quantizers_of_a_real_model() -> None:
    found = [name for name in quantizers(hugging_face("ViTModel")) if name.kind in ATTENTION]
    assert len(found) == 2 * 4
    assert {config.granularity for config in resolve(load_recipe("fp8"), found).configs.values()} == {"per_tensor"}
    assert len(resolve(load_recipe("fp8"), found).configs) == 8
    assert resolve(load_recipe("fp8_gemm"), found).configs == {}


def test_a_mixed_recipe_without_fragments() -> None:
    mixed = yaml.safe_load(
        """
        metadata: {name: mixed, description: "FP8 projections and attention, NVFP4 MLP, rotated"}
        rules:
        - {quantizer: "*.self_attn.*", format: fp8}
        - {quantizer: "*.mlp.*", format: nvfp4, rotate: true}
        - {quantizer: "*.mlp.gate.*", enable: false}
        """
    )
    jsonschema.Draft202012Validator(Recipe.model_json_schema()).validate(mixed)
    found = list(quantizers(hugging_face("MixtralForCausalLM", vocab_size=64, num_key_value_heads=2)))
    found += [QuantizerName(f"model.layers.0.mlp.experts.down_proj.{kind}_quantizer") for kind in ("weight", "input")]
    configs = resolve(load_recipe(mixed), found).configs
    assert {configs[f"model.layers.0.self_attn.{p}_proj.weight_quantizer"].format for p in "qkvo"} == {"fp8"}
    expert = configs["model.layers.0.mlp.experts.down_proj.input_quantizer"]
    assert (expert.format, expert.block_shape, expert.dynamic, expert.rotate) == ("nvfp4", (1, 16), True, True)
    assert "model.layers.0.mlp.gate.weight_quantizer" not in configs
