"""Optimization profiles of a decoder that generates: one for its prompt, one for every token behind it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from passes.capabilities import FUSED_ATTENTION
from qcompile.engine.graph import OnnxGraph
from qcompile.engine.limits import GenerationProfiles
from qcompile.engine.profile_dims import NAME, with_shapes
from qcompile.engine.profiles import Profile
from qcompile.errors import EngineError

LEAST = FUSED_ATTENTION["fp8"].least_keys
"""New tokens from which on a prompt's attention is fused in FP8: it may have no more keys than these."""

_PAST = re.compile(r"past_key_values\.\d+\.(key|value)")
_TOKENS = ("input_ids", "inputs_embeds")


def generation_profiles(graph: OnnxGraph, limits: GenerationProfiles) -> dict[str, Profile]:
    """Name -> profile: `prefill`, of 32 tokens and more, and `decode`, of one.

    One profile for both loses every fused attention, as it could have fewer than 32 keys for several queries.

    Raises:
        EngineError: the file has no cache, dimensions of another kind, or less room than `limits` ask for.
    """
    inputs = {
        value.name: [d.dim_param or int(d.dim_value) for d in value.type.tensor_type.shape.dim]
        for value in graph.model.graph.input
        if value.name not in {init.name for init in graph.model.graph.initializer}
    }
    caches = [dims for name, dims in inputs.items() if _PAST.fullmatch(name) and len(dims) == 4]
    tokens = next((inputs[name] for name in _TOKENS if len(inputs.get(name, ())) > 1), None)
    if not caches or tokens is None:
        raise EngineError(
            "the profiles of generation are for a decoder with a cache, and this file has no inputs input_ids and"
            f" past_key_values.0.key, but {', '.join(inputs)}: export it with a cache, or give its profiles"
        )
    batch, new = tokens[:2]
    past = caches[0][2]
    if not isinstance(new, str):
        raise EngineError(f"the file takes {new} new tokens at every call, not a prompt and single tokens")
    context = _context(graph, limits, past)
    prompt = min(limits.prompt or context, context)
    if prompt < LEAST:
        raise EngineError(
            f"a prompt of at most {prompt} tokens has no fused attention: TensorRT fuses from {LEAST} tokens on, so"
            f" give a prompt and a context of {LEAST} or more, and pad shorter ones on the left"
        )
    # with a mask a single query is fused with any number of keys, without one with as many as several queries are
    fewest = 0 if "attention_mask" in inputs else LEAST - 1
    lengths = {
        "prefill": ((LEAST, max(LEAST, prompt // 2), prompt), (0, 0, context - LEAST)),
        "decode": ((1, 1, 1), (fewest, max(fewest, context // 2), context - 1)),
    }
    rows = {batch: (1, limits.batch, limits.batch)} if isinstance(batch, str) else {}
    if isinstance(batch, int) and limits.batch not in (1, batch):
        raise EngineError(
            f"the file takes {batch} sequences at once, not {limits.batch}: export it with a dynamic batch"
        )
    return {
        name: _complete(
            {**rows, new: sizes, **({past: before} if isinstance(past, str) else {})}, inputs, sizes, before
        )
        for name, (sizes, before) in lengths.items()
    }


def _complete(
    profile: dict[str, Any], inputs: Mapping[str, list[int | str]], new: tuple[int, ...], past: tuple[int, ...]
) -> Profile:
    """`profile` with a size for the tokens that a mask is as long as, where the file has a name of its own for them."""
    known = set(profile)
    for name, dims in inputs.items():
        for axis, dim in enumerate(dims):
            unknown = [part for part in NAME.findall(str(dim)) if part not in known]
            if unknown and name == "attention_mask" and axis == len(dims) - 1 and unknown == [dim]:
                profile[str(dim)] = tuple(a + b for a, b in zip(new, past, strict=True))
            elif unknown:
                raise EngineError(
                    f"input {name} has a dimension {dim!r}, which is neither batch, tokens nor past: give the profiles"
                )
    return with_shapes(profile, inputs)


def _context(graph: OnnxGraph, limits: GenerationProfiles, past: int | str) -> int:
    """Tokens of the longest sequence."""
    if isinstance(past, int):
        if limits.context not in (None, past):
            raise EngineError(f"the file's cache holds {past} tokens, which its context is, not {limits.context}")
        return past
    known = _positions(graph.path)
    if limits.context is None and known is None:
        raise EngineError(
            "how long a sequence can get is not known: say it (--context 2048, GenerationProfiles(context=2048)), or"
            " leave genai_config.json beside the file"
        )
    if limits.context is not None and known is not None and limits.context > known:
        raise EngineError(
            f"a context of {limits.context} tokens is longer than the model's {known} positions (genai_config.json)"
        )
    return int(limits.context or known or 0)


def _positions(path: Path | None) -> int | None:
    """`model.context_length` of the genai_config.json beside the file; None where there is none."""
    beside = path.parent / "genai_config.json" if path is not None else None
    if beside is None or not beside.is_file():
        return None
    try:
        found = json.loads(beside.read_text())["model"]["context_length"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EngineError(f"'{beside}' has no model.context_length: {error}") from error
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise EngineError(f"'{beside}': model.context_length is {found!r}, no number of tokens")
    return found
