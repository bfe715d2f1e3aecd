"""`generate` of transformers through the back end: tokens, logits of each step, and how often is compiled.

The judge of a quantized model is the program of `qcompile.quantize` without a cache: it computes the whole sequence at
once, so a step that reads a wrong, stale or forgotten cache has other logits. Of a model that is not quantized it is
transformers itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcompile
from qcompile.errors import ExpectationError
from tests.qcompile.dynamo.support import DYNAMIC, Mlp, assert_same, compiled, rounded_copy

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None, "attn_implementation": "sdpa", "tie_word_embeddings": False,
}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen3": ("Qwen3Config", {}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
LENGTH, STEPS = 9, 33
# graphs of a first `generate`: prefill, then decode; a cache that grows is compiled for its first length, then for all
GRAPHS = {"dynamic": 3, "static": 2}
# a sliding cache grows to its window, and then slides
GRAPHS_SLIDING = {"dynamic": 6, "static": 3}


def decoder(kind: str, **changed: Any) -> Any:
    """A model of random weights that are large enough for each step to have another token."""
    name, own = KINDS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**SIZES, **own, **changed})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for path, weight in model.named_parameters():
        if "norm" not in path:
            nn.init.normal_(weight, std=0.2)
    return model


def prompt(padded: bool, batch: int = 2, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    """Token ids and their mask; the first row of a padded batch has three tokens less, at its left."""
    ids = torch.randint(2, 128, (batch, length))
    mask = torch.ones_like(ids)
    if padded:
        ids[0, :3] = mask[0, :3] = 0
    return ids, mask


def generate(model: Any, ids: Tensor, mask: Tensor, cache: str, steps: int = STEPS, **more: Any) -> Any:
    kwargs = {"cache_implementation": cache} if cache == "static" else {}
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=steps, do_sample=False, return_dict_in_generate=True,
        output_logits=True, **kwargs, **more,
    )  # fmt: skip


class Whole(nn.Module):
    """All logits of a sequence, without a cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        result = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        return result.logits  # type: ignore[no-any-return]


def whole(mask: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The mask of a batch that was continued to `length`, and the positions that transformers gives its tokens."""
    longer = torch.cat([mask, mask.new_ones(len(mask), length - mask.shape[1])], 1)
    return longer, (longer.cumsum(1) - 1).clamp_min(0)


def calibrated(model: nn.Module, recipe: str, length: int, mask: Tensor) -> dict[str, Tensor] | None:
    """Ranges of a recipe that wants some, over whole sequences, by the names of `model`."""
    if recipe == DYNAMIC:
        return None
    example = (torch.randint(2, 128, (2, length)), *whole(mask, length))
    state = qcompile.calibrate(Whole(model), example, recipe=recipe, calibration=[example], progress=False)
    return {name.removeprefix("model."): amax for name, amax in state.items()}


def logits_at_once(model: nn.Module, out: Any, mask: Tensor, recipe: str, state: dict[str, Tensor] | None) -> Tensor:
    """What the quantized program gives for the sequences that were generated, at each step: (steps, batch, tokens)."""
    args = (out.sequences, *whole(mask, out.sequences.shape[1]))
    named = None if state is None else {f"model.{name}": amax for name, amax in state.items()}
    program = qcompile.quantize(
        Whole(model), args, recipe=recipe, calibration=named, dtype=torch.float32, progress=False
    ).module()
    with torch.no_grad():
        return program(*args)[:, mask.shape[1] - 1 : -1].transpose(0, 1)  # type: ignore[no-any-return]


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def assert_quantized_tokens(out: Any, expected: Tensor, plain: Tensor) -> None:
    """Logits and tokens of each step are those expected, and not those of the float model.

    Sums of another order may lie on the other side of the middle between two codes: in one row of twenty an element
    may be one code off, which no wrong cache looks like: that has all rows behind it wrong.
    """
    logits, largest = torch.stack(out.logits), float(expected.abs().max())
    errors = (logits - expected).abs().amax(-1) / largest  # of each step and row of the batch
    assert float(errors.max()) < 0.05 and float((errors > 1e-5).float().mean()) < 0.05, errors
    assert torch.equal(out.sequences[:, -len(logits) :].T, expected.argmax(-1))
    assert float((plain - expected).abs().max()) > 1e-3 * float(expected.abs().max()), "nothing was quantized"


def check(kind: str, cache: str, recipe: str, padded: bool, target: str = "eager") -> int:
    """Generates through the back end and judges every step; returns how many graphs there were."""
    model = decoder(kind)
    ids, mask = prompt(padded)
    state = calibrated(model, recipe, LENGTH + STEPS, mask)
    options = {"recipe": recipe, "calibration": state, "target": target, "expect": {"linear": 4}}
    run = torch.compile(model, backend="qcompile", options=options)
    out = generate(run, ids, mask, cache)
    count = graphs()
    expected = logits_at_once(model, out, mask, recipe, state)
    with torch.no_grad():
        plain = Whole(model)(out.sequences, *whole(mask, out.sequences.shape[1]))[:, LENGTH - 1 : -1].transpose(0, 1)
    assert_quantized_tokens(out, expected, plain)
    return count


@pytest.mark.everyday(1)
@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_a_small_model(cache: str) -> None:
    """A cache that is written in place has its writes in the graph, and its length is a tensor that is added to."""
    model = decoder("llama", num_hidden_layers=1)
    ids, mask = prompt(True)
    expected, plain = generate(rounded_copy(model), ids, mask, cache, 5), generate(model, ids, mask, cache, 5)
    out = generate(compiled(model), ids, mask, cache, 5)
    assert_quantized_tokens(out, torch.stack(expected.logits), torch.stack(plain.logits))
    assert graphs() == GRAPHS[cache]


@pytest.mark.slow
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("recipe", [DYNAMIC, "fp8", "int8"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_tokens_and_graphs(kind: str, cache: str, recipe: str, padded: bool) -> None:
    most = (GRAPHS_SLIDING if kind == "gemma3" else GRAPHS)[cache]
    assert check(kind, cache, recipe, padded) <= most


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["fp8", "int8"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_by_inductor(cache: str, recipe: str) -> None:
    assert check("llama", cache, recipe, True, target="inductor") == GRAPHS[cache]


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_without_a_recipe_tokens_are_those_of_the_model(kind: str, cache: str) -> None:
    model = decoder(kind)
    ids, mask = prompt(True)
    expected = generate(model, ids, mask, cache)
    run = torch.compile(model, backend="qcompile", options={"target": "eager"})
    out = generate(run, ids, mask, cache)
    assert torch.equal(out.sequences, expected.sequences)
    assert_same(torch.stack(out.logits), torch.stack(expected.logits))


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_as_many_graphs_as_another_back_end(kind: str, cache: str) -> None:
    """Over several prompts: a second of the same shape compiles nothing, others what Dynamo compiles for any."""
    counts: dict[str, list[int]] = {}
    ours: dict[str, Any] = {"recipe": DYNAMIC, "target": "eager"}
    for backend, options in (("eager", None), ("qcompile", ours)):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = decoder(kind, num_hidden_layers=2)
        model.forward = torch.compile(model.forward, backend=backend, options=options)
        counts[backend] = []
        for batch, length in [(2, 9), (2, 9), (2, 11)]:
            generate(model, *prompt(False, batch, length), cache, 20)
            counts[backend].append(graphs())
    more = 1 if (kind, cache) == ("gemma3", "dynamic") else 0  # a sliding cache's size is fixed once more than needed
    assert all(0 <= ours - theirs <= more for ours, theirs in zip(*reversed(counts.values()), strict=True))
    assert counts["qcompile"][1] == counts["qcompile"][0]
    assert counts["eager"][1] == counts["eager"][0]


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_dynamic_true_compiles_few_graphs_for_all_prompts(cache: str) -> None:
    """Prefill and decode; batches of one row, which Dynamo compiles apart, are two more, and it may guard a batch."""
    model = decoder("llama", num_hidden_layers=1)
    run = compiled(model, DYNAMIC, dynamic=True, fullgraph=False)
    counts = []
    for batch, length in [(2, 9), (2, 11), (3, 12), (1, 12), (4, 7), (1, 9), (5, 15)]:
        generate(run, *prompt(False, batch, length), cache, 4)
        counts.append(graphs())
    assert counts == [2, 2, 3, 5, 5, 5, 5]


# ways to compile a model that generates


def small() -> Any:
    return decoder("llama", num_hidden_layers=1)


def by_module(model: Any) -> Any:
    return torch.compile(model, backend="qcompile", options=OPTIONS)


def by_forward(model: Any) -> Any:
    model.forward = torch.compile(model.forward, backend="qcompile", options=OPTIONS)
    return model


def in_place(model: Any) -> Any:
    model.compile(backend="qcompile", options=OPTIONS)
    return model


OPTIONS: dict[str, Any] = {"recipe": DYNAMIC, "target": "eager"}
WAYS = [by_forward, in_place, by_module]


@pytest.fixture(scope="module")
def expected() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """A prompt, its mask, and the logits of four steps of the quantized program."""
    ids, mask = prompt(False)
    torch._dynamo.reset()
    out = generate(by_module(small()), ids, mask, "dynamic", 4)
    yield ids, mask, logits_at_once(small(), out, mask, DYNAMIC, None)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("outer", [False, True], ids=["", "compiled by transformers, too"])
@pytest.mark.parametrize("way", WAYS)
def test_ways_to_compile(way: Any, outer: bool, expected: tuple[Tensor, Tensor, Tensor]) -> None:
    """On a GPU transformers compiles the steps of a static cache itself, with Inductor: what is compiled stays so."""
    ids, mask, logits = expected
    seen: list[Any] = []

    def other(gm: Any, _: Any) -> Any:
        seen.append(gm)
        return gm.forward

    more = {"compile_config": on_any_device(backend=other)} if outer else {}
    out = generate(way(small()), ids, mask, "static", 4, **more)
    assert_same(torch.stack(out.logits), logits)
    assert not seen and graphs() == GRAPHS["static"]


def on_any_device(**settings: Any) -> Any:
    config = transformers.CompileConfig(mode=None, **settings)
    config._compile_all_devices = True  # or on a GPU only
    return config


@pytest.mark.slow
def test_compiled_by_transformers(expected: tuple[Tensor, Tensor, Tensor]) -> None:
    """`compile_config` is for the steps after the prefill, which runs as it is."""
    ids, mask, _ = expected
    model = small()
    out = generate(model, ids, mask, "static", 4, compile_config=on_any_device(backend="qcompile", options=OPTIONS))
    assert graphs() == 1
    assert qcompile.explain(model).graphs[0].coverage["linear"][0] == 7
    assert_same(out.logits[0], generate(small(), ids, mask, "static", 1).logits[0])


class Counter(Mlp):
    """A model with a `generate` of its own, that keeps something."""

    calls = 0

    def generate(self, x: Tensor, steps: int) -> Tensor:
        assert type(self).__name__ == "Counter" and isinstance(self, Counter)
        self.calls += steps
        for _ in range(steps):
            x = self(x)
        return x


def test_generate_of_any_module_runs_what_was_compiled() -> None:
    """torch hands out the method of the module inside, which ran that one in floating point, with no word."""
    model = Counter()
    run, judge, x = compiled(model), rounded_copy(model), torch.randn(3, 16)
    with torch.no_grad():
        assert_same(run.generate(x, 2), judge(judge(x)))  # type: ignore[attr-defined]
        assert_same(model.generate(x, 2), model(model(x)))
        assert_same(run(x), judge(x))
    assert model.calls == run.calls == 4, "what it keeps is the model's"  # type: ignore[attr-defined]
    assert not torch.allclose(model(x), judge(x)) and graphs() == 1
    run = compiled(Counter(), expect={"linear": 3})
    with (
        torch.no_grad(),
        pytest.raises(ExpectationError, match="2 of 2 linear are quantized, and 3 are"),
    ):
        run.generate(x, 1)  # type: ignore[attr-defined]


def test_generate_of_other_back_ends_is_left_as_it_is() -> None:
    run: Any = torch.compile(Counter(), backend="eager")
    by_module(Counter())
    assert run.generate.__self__ is run._orig_mod
    run.generate(torch.randn(3, 16), 2)
    assert graphs() == 0
