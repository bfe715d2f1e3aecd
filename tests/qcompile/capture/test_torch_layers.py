"""torch's own transformer layers with masks, which they test for being causal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import transformer

from passes.base import run_pipeline
from passes.graph import argument, calls
from passes.pipelines import NORMALIZE
from passes.program import unlift
from passes.sdpa import SDPA
from passes.testing import DYNAMIC
from qcompile.capture import capture

WIDTH, LENGTH = 16, 8
causal = nn.Transformer.generate_square_subsequent_mask


class Encoder(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, mask_check=kind != "left-aligned padding")
        self.kind = kind
        self.register_buffer("mask", causal(LENGTH))
        self.register_buffer("hidden", torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1))
        self.register_buffer("window", ~torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().triu(-2))

    def forward(self, x: Tensor, given: Tensor | None = None) -> Any:
        if "padding" in self.kind:
            mask = causal(x.shape[1]) if self.kind == "made and padding" else None
            return self.encoder(x, mask, src_key_padding_mask=given)
        masks = {"buffer": self.mask, "boolean": self.hidden, "window": self.window, "given": given}
        return self.encoder(x, masks[self.kind] if self.kind in masks else causal(x.shape[1]))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, 2, 32, batch_first=True), 1)

    def forward(self, x: Tensor, memory: Tensor) -> Any:
        return self.decoder(x, memory, tgt_mask=causal(x.shape[1]))


class Both(nn.Module):
    """With the sequence as the first axis."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Transformer(WIDTH, 2, 1, 1, 32)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.transformer(x, y, tgt_mask=causal(y.shape[0]))


PADDING = torch.arange(LENGTH) >= torch.tensor([[LENGTH], [5]])
X = torch.randn(2, LENGTH, WIDTH)
MODELS: dict[str, tuple[nn.Module, tuple[Tensor, ...], list[bool]]] = {
    "buffer": (Encoder("buffer"), (X,), [True]),
    "boolean": (Encoder("boolean"), (X,), [True]),
    "window": (Encoder("window"), (X,), [False]),
    "made": (Encoder("made"), (X,), [True]),
    "given": (Encoder("given"), (X, causal(LENGTH)), [False]),
    "made and padding": (Encoder("made and padding"), (X, PADDING), [False]),
    "padding": (Encoder("padding"), (X, PADDING), [False]),
    "left-aligned padding": (Encoder("left-aligned padding"), (X, PADDING), [False]),
    "decoder": (Decoder(), (X, torch.randn(2, 6, WIDTH)), [True, False]),
    "both": (Both(), (X.mT.permute(2, 0, 1), torch.randn(5, 2, WIDTH)), [False, True, False]),
}


@pytest.mark.everyday(2)
@pytest.mark.parametrize("name", MODELS)
def test_masks_without_a_word_of_what_they_are(name: str) -> None:
    model, args, is_causal = MODELS[name]
    program = capture(model.eval(), args)
    with torch.no_grad():
        got, want = program.module()(*args), model(*args)
        if name.endswith("padding"):  # torch makes zeros of what is padded, or not, by the path that it takes
            got, want = got[~PADDING], want[~PADDING]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    gm = unlift(program)
    run_pipeline(NORMALIZE, gm)
    assert [argument(node, "is_causal") for node in calls(gm.graph, SDPA)] == is_causal


def test_dynamic_length() -> None:
    model = Encoder("made").eval()
    gm = unlift(capture(model, (X,), dynamic_shapes=({0: DYNAMIC, 1: DYNAMIC},)))
    run_pipeline(NORMALIZE, gm)
    assert [argument(node, "is_causal") for node in calls(gm.graph, SDPA)] == [True]


def test_torch_is_left_as_it_was() -> None:
    before = transformer._detect_is_causal_mask
    capture(Encoder("made").eval(), (X,))
    assert transformer._detect_is_causal_mask is before and torch.backends.mha.get_fastpath_enabled()
