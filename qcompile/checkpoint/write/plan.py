"""What a recipe does to a checkpoint, decided from names alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from passes.formats import Format
from passes.groups import parallel, siblings
from passes.quantize.sites import idle_reduction
from qcompile.algorithms.scales import has_constant, is_calibrated
from qcompile.checkpoint.formats import CheckpointFormat, Contents
from qcompile.checkpoint.hub.adapters import MERGE
from qcompile.checkpoint.hub.layout import Hub, Layer, Part
from qcompile.checkpoint.hub.origin import Origin
from qcompile.checkpoint.write.activations import K, KvScales, V, cache_scales, known_scale, uncovered
from qcompile.checkpoint.write.codes import weight_like
from qcompile.errors import CheckpointError, RecipeError
from qcompile.messages import some
from qcompile.recipe import QuantizerConfig, QuantizerName, Recipe, check_quantizes, format_of, resolve, unsupported
from qcompile.recipe.globs import ATTENTION, INPUT, WEIGHT
from qcompile.schemes.scheme import Scheme

_OUTPUT = "output_quantizer"
HOW_TO_CALIBRATE = (
    "program = qcompile.quantize(model, ..., recipe=..., calibration=batches, dtype=torch.float32), then"
    " save_checkpoint(program, directory, format=..., source=the directory of the model); on the command line add"
    " --calibration"
)

_OF_ADAPTER = re.compile(r"\.(base_layer|lora_\w+)(\.|$)")
_ENTRY, _CONFIGS = 200, 1 << 20  # bytes of a tensor in the header and in the index; of other files, about


@dataclass
class Plan:
    """Which layers are quantized, and how.

    Attributes:
        schemes: layer of the model -> its scheme.
        configs: layer -> what the recipe says of its weight.
        input_scales: layer -> the constant scale of its input, where the recipe says it.
        kv_cache: keys and values are quantized, and the model has a cache of them.
        kv_scales: path of an attention -> the constant scales of its cache, where the recipe says them.
        notices: what the reader of the report should know.
        left: why layers stay in floating point although they were to be quantized -> those layers.
    """

    schemes: dict[str, Scheme] = field(default_factory=dict)
    configs: dict[str, QuantizerConfig] = field(default_factory=dict)
    input_scales: dict[str, torch.Tensor] = field(default_factory=dict)
    kv_cache: bool = False
    kv_scales: dict[str, KvScales] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    left: dict[str, list[str]] = field(default_factory=dict)

    @property
    def all_notices(self) -> list[str]:
        """`notices`, and one for each reason that layers were left for."""
        return self.notices + self.reasons

    @property
    def reasons(self) -> list[str]:
        """One for each reason that layers were left for."""
        return [
            f"{some(names)} stay{'' if names[1:] else 's'} in floating point: {reason}"
            for reason, names in self.left.items()
        ]


def plan_recipe(recipe: Recipe, hub: Hub, *, calibrated: bool = False) -> Plan:
    """What `recipe` does to the model of `hub` without looking at a value.

    Args:
        calibrated: there will be calibration, so scales may be static.

    Raises:
        RecipeError: a rule does not fit the model, or is not supported yet.
        CheckpointError: a rule asks for what needs calibration, or what no checkpoint can say.
    """
    names = list(_quantizers(hub))
    resolution = resolve(recipe, names)
    check_quantizes(recipe, names, resolution)
    for name, config in resolution.configs.items():
        if reason := unsupported(config):
            raise RecipeError(f"{name}: {reason}")
    plan = Plan(notices=[str(notice) for notice in resolution.notices])
    if not calibrated:
        _check_static(resolution.configs, hub)
    power_of_two = recipe.power_of_two
    cached = cache_scales(resolution.configs, hub, power_of_two)
    plan.kv_cache = bool(cached)
    plan.kv_scales = {path: (k, v) for path, (k, v) in cached.items() if k is not None and v is not None}
    for layer in hub.layers.values():
        weight = resolution.configs.get(f"{layer.name}.{WEIGHT}")
        x = resolution.configs.get(f"{layer.name}.{INPUT}")
        if weight is not None and _fits(layer, format_of(weight), plan):
            refuse_rotation(layer.name, weight.rotate)
            per_channel = weight.granularity == "per_channel"
            plan.schemes[layer.name] = Scheme(format_of(weight), format_of(x) if x else None, per_channel)
            plan.configs[layer.name] = weight
            if x is not None and (scale := known_scale(x, power_of_two)) is not None:
                plan.input_scales[layer.name] = scale
        elif weight is None and x is not None and not layer.stays:
            raise CheckpointError(
                f"{layer.name}: the recipe quantizes its input ({x.source}) and not its weight, which no checkpoint"
                " says: give the weight a format, or switch the input off"
            )
    plan.notices += _operand_notices(resolution.configs) + uncovered(plan.kv_scales, hub)
    return plan


def plan_program(schemes: Mapping[str, Scheme], hub: Hub) -> Plan:
    """What a quantized program says. Raises `CheckpointError` for a layer that the source does not have."""
    plan = Plan()
    for name, scheme in schemes.items():
        if name not in hub.layers:
            known = ", ".join(list(hub.layers)[:3])
            hint = f"; it is of an adapter: {MERGE}, then quantize it" if _OF_ADAPTER.search(name) else ""
            raise CheckpointError(
                f"the program quantizes {name}, and the source has no such layer (it has {known}, ...): give the"
                " directory or the module that the program was made from, not a part of it or a wrapper around it"
                f"{hint}"
            )
        if _fits(hub.layers[name], scheme.weight, plan):
            plan.schemes[name] = scheme
    return plan


def refuse_rotation(module: str, rotated: bool) -> None:
    """Raise `CheckpointError` for a layer in whose weight a Hadamard rotation is."""
    if rotated:
        raise CheckpointError(
            f"{module} is rotated (`rotate: true`), which no checkpoint format says, so servers would multiply rotated"
            " weights with inputs that are not: leave out the rotation"
        )


def _quantizers(hub: Hub) -> Iterator[QuantizerName]:
    for layer in hub.layers.values():
        for kind in (INPUT, WEIGHT, _OUTPUT):
            yield QuantizerName(f"{layer.name}.{kind}".lstrip("."), layer.module_class, _operator(layer))
    for path, attention in hub.attentions.items():
        for kind in ATTENTION:
            yield QuantizerName(f"{path}.{kind}", attention.module_class, "attention")
    for path, owner in hub.norms.items():
        yield QuantizerName(f"{path}.{_OUTPUT}", owner, "norm")


def _operator(layer: Layer) -> str | None:
    """What recipes call it; a layer that stays in any case, a convolution say, is told by its class alone."""
    return None if layer.stays else "linear" if len(layer.parts) == 1 else "experts"


def _check_static(configs: Mapping[str, QuantizerConfig], hub: Hub) -> None:
    """Scales of activations that are not found at run time come from calibration, and none of it is here."""
    static = []
    for name, config in configs.items():
        path, _, kind = name.rpartition(".")
        layer = hub.layers.get(path)
        written = layer is not None and not layer.stays if kind == INPUT else kind in (K, V)
        if written and is_calibrated(config):
            static.append(name)
    if static:
        raise CheckpointError(
            f"the recipe gives a static scale to {some(static)}, which needs calibration data: {HOW_TO_CALIBRATE}."
            " Recipes with dynamic activations (fp8_per_channel_per_token) or for weights only (nvfp4_weight_only) need"
            " none"
        )


def _fits(layer: Layer, fmt: Format, plan: Plan) -> bool:
    """Whether the layer can be quantized; notes why not."""
    if layer.refusal:
        raise CheckpointError(
            f"{layer.name} cannot be quantized in a checkpoint: {layer.refusal}; leave it out of the recipe, by a rule"
            f' such as {{quantizer: "{layer.name}.*", enable: false}}'
        )
    reason = layer.stays or next(filter(None, (idle_reduction(part.shape[1]) for part in layer.parts)), None)
    if not reason and fmt.whole_blocks and (ragged := [p for p in layer.parts if p.shape[1] % fmt.sizes[-1]]):
        reason = f"{fmt.name} has blocks of {fmt.sizes[-1]} elements, and the reduction axis has {ragged[0].shape[1]}"
    if reason:
        plan.left.setdefault(reason, []).append(layer.name)
    return not reason


def _operand_notices(configs: Mapping[str, QuantizerConfig]) -> list[str]:
    kinds = {name.rpartition(".")[2] for name in configs}
    return [unwritten_notice(kind) for kind in ("q_bmm_quantizer", "softmax_bmm_quantizer", _OUTPUT) if kind in kinds]


def unwritten_notice(kind: str) -> str:
    """Why quantizers of that kind have no place in a checkpoint."""
    if kind == _OUTPUT:
        return f"{kind}: not written, checkpoints hold scales of weights, of inputs and of the key/value cache"
    return f"{kind}: not written, the attention kernel of the server decides how it computes"


def sibling_groups(layers: Iterable[str], configs: Mapping[str, QuantizerConfig]) -> list[list[str]]:
    """The layers of each scale: those with one (global) scale each that read the same tensor share it."""
    single = [name for name in layers if configs[name].granularity != "per_channel" and has_constant(configs[name])]
    return parallel(single, lambda name: siblings(name, configs[name].format))


def contents_of(plan: Plan, hub: Hub) -> tuple[Contents, dict[str, tuple[int, int]]]:
    """What the checkpoint will hold, by names of the hub, and the shapes of the weights that are quantized.

    Raises `CheckpointError` if each layer that was to be quantized stays in floating point, with the reasons.
    """
    if plan.left and not plan.schemes:
        raise CheckpointError("no linear layer is quantized, nothing to write:\n  " + "\n  ".join(plan.reasons))
    schemes: dict[str, Scheme] = {}
    shapes: dict[str, tuple[int, int]] = {}
    floating: list[str] = []
    for layer in hub.layers.values():
        for part in layer.parts:
            if layer.name in plan.schemes:
                schemes[part.name], shapes[part.name] = plan.schemes[layer.name], part.shape
            else:
                floating.append(part.name)
    for dropped, kept in hub.tied.items():  # the other name of a quantized weight is quantized, too
        if kept in schemes:
            schemes[dropped], shapes[dropped] = schemes[kept], shapes[kept]
    floating += [key.removesuffix(".weight") for key in hub.unknown if key.endswith(".weight")]
    unquantized = [name for name in dict.fromkeys(floating) if name not in schemes]
    return Contents(schemes, unquantized, plan.kv_cache, hub.tied), shapes


def parts_by_key(plan: Plan, hub: Hub) -> dict[str, tuple[Layer, Part]]:
    """Key in the source -> what it is, for the weights that are quantized."""
    return {part.key: (hub.layers[name], part) for name in plan.schemes for part in hub.layers[name].parts}


def estimated_bytes(plan: Plan, origin: Origin, fmt: CheckpointFormat) -> int:
    """Of the files that the checkpoint will have: exact for tensors; with room for headers, JSON and small files."""
    parts, total = parts_by_key(plan, origin.hub), 0
    for key, tensor in origin.stored.items():
        if key in parts:
            layer, part = parts[key]
            made = fmt.tensors(part.name, weight_like(plan.schemes[layer.name], part.shape))
            total += sum(own.nbytes + _ENTRY for own in made.values())
        elif key not in origin.hub.dropped:
            total += tensor.nbytes + _ENTRY
    return total + _CONFIGS
