"""What a transformers model is made of, as far as a checkpoint is concerned: layers, attentions, ties."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Part:
    """One linear layer of the hub: a whole `torch.nn.Linear`, or a slice of the fused weight of all experts.

    Attributes:
        name: on the hub, `model.layers.0.mlp.experts.3.up_proj`; its weight is `<name>.weight`.
        expert: index on the first axis of the fused weight; None for a linear layer.
        start: first of its rows in that expert's matrix.
    """

    name: str
    shape: tuple[int, int]
    expert: int | None = None
    start: int = 0

    @property
    def key(self) -> str:
        return f"{self.name}.weight"

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.shape[0])


@dataclass(frozen=True)
class Layer:
    """A weight that a recipe can name.

    Attributes:
        name: what recipes and graphs call it, without `.weight_quantizer`.
        module_class: qualified class of the module that owns it.
        parts: the linear layers of the hub that it is.
        stays: why checkpoints hold it in floating point; empty for a layer that can be quantized.
        refusal: why this one cannot be, although it is a linear layer; empty for others.
    """

    name: str
    module_class: str
    parts: tuple[Part, ...]
    stays: str = ""
    refusal: str = ""


@dataclass(frozen=True)
class Attention:
    """An attention.

    Attributes:
        name: on the hub.
        cached: it is of a decoder, which keeps its keys and values.
        latent: what it keeps is what keys and values are made of (multi-head latent attention).
    """

    name: str
    module_class: str
    cached: bool
    latent: bool = False


@dataclass
class Hub:
    """The parts of a model that matter for a checkpoint.

    Attributes:
        layers: by name.
        attentions: by module path.
        norms: module path -> qualified class.
        tied: dropped name on the hub -> the one that holds its weight, both without `.weight`.
        dropped: keys of the source that are not written, as they are tied to others.
        unknown: keys that no parameter of the model takes.
    """

    layers: dict[str, Layer] = field(default_factory=dict)
    attentions: dict[str, Attention] = field(default_factory=dict)
    norms: dict[str, str] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)
    unknown: list[str] = field(default_factory=list)
