"""What servers do not load is told where it is written, and the page about it says the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from passes.formats import FP8_128X128, INT8, NVFP4
from qcompile.checkpoint.formats import FORMATS, Contents
from qcompile.checkpoint.formats.servers import EDGE, LIMITS, SGLANG, VLLM, server_notices
from qcompile.schemes.scheme import FP8_BLOCK, FP8_CHANNEL_TOKEN, FP8_TENSOR, INT8_CHANNEL_TOKEN, NVFP4_W4A4, Scheme

PAGE = Path(__file__).parents[4] / "docs/checkpoints.md"
DENSE, OTHER = "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.o_proj"
EXPERT, NEXT = "model.layers.0.mlp.experts.3.down_proj", "model.layers.0.mlp.experts.4.down_proj"
STATIC_INT8 = Scheme(INT8, INT8, per_channel=True)


@pytest.mark.parametrize(
    ("name", "schemes", "servers"),
    [
        ("fp8", {DENSE: FP8_BLOCK}, {SGLANG, EDGE}),
        ("fp8", {EXPERT: FP8_BLOCK}, {EDGE}),
        ("modelopt", {DENSE: FP8_TENSOR}, set()),
        ("modelopt", {EXPERT: FP8_TENSOR}, {EDGE}),
        ("modelopt", {DENSE: NVFP4_W4A4}, set()),
        ("modelopt", {DENSE: FP8_CHANNEL_TOKEN}, {SGLANG, EDGE}),
        ("modelopt", {EXPERT: FP8_CHANNEL_TOKEN}, {VLLM, SGLANG, EDGE}),
        ("modelopt", {DENSE: Scheme(NVFP4)}, {EDGE}),
        ("modelopt_mixed", {DENSE: Scheme(NVFP4)}, {SGLANG, EDGE}),
        ("modelopt_mixed", {EXPERT: Scheme(NVFP4)}, {EDGE}),
        ("modelopt", {DENSE: NVFP4_W4A4, OTHER: FP8_TENSOR}, {SGLANG}),
        ("modelopt", {EXPERT: NVFP4_W4A4, OTHER: FP8_TENSOR}, set()),
        ("modelopt", {OTHER: FP8_TENSOR, EXPERT: NVFP4_W4A4}, {EDGE}),  # the first of equally many entries
        ("modelopt", {EXPERT: NVFP4_W4A4, NEXT: NVFP4_W4A4, OTHER: FP8_TENSOR, DENSE: FP8_TENSOR}, {EDGE}),
        ("modelopt", {DENSE: Scheme(FP8_128X128)}, {EDGE}),
        ("modelopt", {EXPERT: FP8_TENSOR, OTHER: NVFP4_W4A4}, {EDGE}),
        ("modelopt", {EXPERT: FP8_TENSOR, OTHER: Scheme(FP8_128X128)}, {SGLANG, EDGE}),
        ("modelopt_mixed", {EXPERT: FP8_TENSOR}, {SGLANG, EDGE}),
        ("compressed-tensors", {DENSE: NVFP4_W4A4, OTHER: FP8_TENSOR}, {SGLANG, EDGE}),
        ("compressed-tensors", {DENSE: INT8_CHANNEL_TOKEN}, {EDGE}),
        ("compressed-tensors", {EXPERT: INT8_CHANNEL_TOKEN}, {SGLANG, EDGE}),
        ("compressed-tensors", {DENSE: STATIC_INT8}, {SGLANG, EDGE}),
        ("compressed-tensors", {EXPERT: STATIC_INT8}, {VLLM, SGLANG, EDGE}),
    ],
)
def test_who_does_not_load_it(name: str, schemes: dict[str, Scheme], servers: set[str]) -> None:
    notices = server_notices(name, Contents(schemes))
    assert {server for server in (VLLM, SGLANG, EDGE) if any(server in notice for notice in notices)} == servers
    assert all(notice.startswith("model.layers.0.") for notice in notices)


def test_floating_projections_beside_quantized_layers() -> None:
    contents = Contents({DENSE: NVFP4_W4A4}, ["model.layers.0.self_attn.q_proj", "lm_head"])
    assert any(SGLANG in notice for notice in server_notices("compressed-tensors", contents))
    assert not server_notices("modelopt", contents)


@pytest.mark.parametrize(("scheme", "words"), [(FP8_TENSOR, "for FP8, too, and stops"), (NVFP4_W4A4, "quantizes the")])
def test_floating_experts_beside_quantized_layers(scheme: Scheme, words: str) -> None:
    notices = server_notices("modelopt", Contents({OTHER: scheme}, [EXPERT, "lm_head"]))
    assert [EXPERT in notice and EDGE in notice and words in notice for notice in notices] == [True]
    assert not server_notices("modelopt", Contents({EXPERT: NVFP4_W4A4}, [OTHER, "lm_head"]))


def test_the_page_has_every_limit() -> None:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| {VLLM.split()[0]}")]
    text = PAGE.read_text(encoding="utf-8")
    for limit in LIMITS:
        cells = (
            limit.server,
            ", ".join(f"`{name}`" for name in limit.formats),
            limit.what,
            limit.effect,
            limit.instead,
        )
        assert f"| {' | '.join(cells)} |" in text
    assert rows and {name for limit in LIMITS for name in limit.formats} == set(FORMATS)
