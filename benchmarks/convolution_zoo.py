"""The models of the convolution table, random weights: classifiers, detectors, UNets, autoencoders and speech.

Parts of diffusers' and transformers' models are those that are run apart: an encoder, a decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
import transformers
from torch import Tensor, nn

from benchmarks import convnets, convnets_more, diffusion_zoo, vision
from benchmarks.models import Example, random_model


def image(make: Callable[[], nn.Module], side: int) -> Example:
    """A network that takes one image of `side` pixels."""
    x = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(1))
    return Example(settled(random_model(make)), (x,), {}, [x])


def settled(model: nn.Module) -> nn.Module:
    """`model` with batch norms that are not the identity, as after training."""
    generator = torch.Generator().manual_seed(2)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor, low in (
                (norm.weight, 0.5),
                (norm.running_var, 0.5),
                (norm.bias, -0.2),
                (norm.running_mean, -0.2),
            ):
                assert tensor is not None
                tensor.data = low + torch.rand(tensor.shape, generator=generator) * (1 if low > 0 else 0.4)
    return model


class Half(nn.Module):
    """The encoder or the decoder of an autoencoder, with the 1x1 convolution that belongs to it."""

    def __init__(self, whole: nn.Module, part: str) -> None:
        super().__init__()
        self.encodes = part == "encoder"
        self.part, self.quant_conv = (
            whole.get_submodule(part),
            whole.get_submodule("quant_conv" if self.encodes else "post_quant_conv"),
        )

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.quant_conv(self.part(x)) if self.encodes else self.part(self.quant_conv(x))
        return result


def autoencoder(part: str, make: Callable[[], Example] = diffusion_zoo.MODELS["autoencoder-kl"]) -> Example:
    x = torch.randn(1, *((3, 64, 64) if part == "encoder" else (4, 32, 32)), generator=torch.Generator().manual_seed(1))
    return Example(Half(make().model, part).eval(), (x,), {}, [x])


def wav2vec2() -> Example:
    """Seven convolutions over sound, a positional one of 128 steps in groups, then blocks."""
    config = transformers.Wav2Vec2Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, conv_dim=(32,) * 7
    )
    sound = torch.randn(1, 16000, generator=torch.Generator().manual_seed(1))
    batch = {"input_values": sound}
    return Example(random_model(partial(transformers.Wav2Vec2Model, config)), (), batch, [batch])


MODELS: Mapping[str, Callable[[], Example]] = {
    "resnet18": partial(image, convnets.resnet18, 224),
    "resnet50": partial(image, convnets.resnet50, 224),
    "regnet": partial(image, convnets.regnet, 128),
    "mobilenet-v3-small": partial(image, convnets.mobilenet_v3_small, 224),
    "efficientnet": partial(image, convnets.efficientnet, 128),
    "convnext-tiny": partial(image, convnets_more.ConvNext, 224),
    "deeplab": partial(image, convnets_more.DeepLab, 128),
    "detector": partial(image, convnets_more.Detector, 128),
    "unet-sd": diffusion_zoo.MODELS["unet-sd"],
    "unet-sdxl": diffusion_zoo.MODELS["unet-sdxl"],
    "vae-encoder": partial(autoencoder, "encoder"),
    "vae-decoder": partial(autoencoder, "decoder"),
    "whisper-encoder": partial(vision.whisper_encoder),
    "wav2vec2": wav2vec2,
}
