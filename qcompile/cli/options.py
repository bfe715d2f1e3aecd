"""Reads the options that hold more than a word: profiles and expectations."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcompile.engine.profile_dims import NAME, likely, with_shapes
from qcompile.engine.profiles import Profile
from qcompile.errors import QCompileError
from qcompile.remedy import Remedy, with_remedy

if TYPE_CHECKING:
    from qcompile.decoders import Cache

HOW_TO_CALIBRATE = (
    "give --calibration a folder of images, a .txt or .jsonl file, or tensors (.npz, .safetensors), or take a recipe"
    " with dynamic activations such as fp8_per_channel_per_token; random data are good for trying out only"
)
RANDOM_DATA = Remedy(options={"--calibration": ("random",)})


class UsageError(QCompileError):
    """An option that cannot be read, or does not go with another one."""


def check_given(tokens: Sequence[str]) -> None:
    """Refuse an option that is given nothing, such as a variable of the shell that is not set, and a lost directory."""
    try:
        Path.cwd()
    except FileNotFoundError:
        raise UsageError("the current directory is gone: change to one that is there") from None
    for before, token in zip(("", *tokens), tokens, strict=False):
        if not token or (token.startswith("--") and token.endswith("=")):
            name = token.removesuffix("=") or (before if before.startswith("-") else "an argument")
            raise UsageError(f"{name} is given nothing: leave it out, or give it a value")


def parse_profiles(texts: Sequence[str]) -> list[Profile]:
    """`dimension=min,opt,max` or, with shapes such as `8x512`, `input=min,opt,max`.

    What is given several times has another value in each profile; what is given once, the same in all.
    """
    given: dict[str, list[Any]] = {}
    for text in texts:
        name, _, sizes = text.partition("=")
        if not name or not re.fullmatch(r"\d+(x\d+)*(,\d+(x\d+)*){2}", sizes):
            raise UsageError(
                f"--profile {text}: write it as dimension=min,opt,max, such as sequence=32,128,512, or with shapes as"
                " input=min,opt,max, such as input_ids=1x32,4x128,8x512"
            )
        shapes = tuple(tuple(map(int, shape.split("x"))) for shape in sizes.split(","))
        given.setdefault(name, []).append(shapes if "x" in sizes else tuple(size for (size,) in shapes))
    count = max(map(len, given.values()), default=0)
    for name, several in given.items():
        if len(several) not in (1, count):
            raise UsageError(
                f"--profile {name} is given {len(several)} times, and another one {count} times: each once, for all"
                " profiles, or as often as there are profiles"
            )
    return [{name: several[i if several[1:] else 0] for name, several in given.items()} for i in range(count)]


def require_profile(inputs: Mapping[str, Sequence[int | str]], profiles: Sequence[Profile]) -> None:
    """Dynamic inputs need a profile: say so in the words of the command line, with an example to copy.

    Args:
        inputs: input -> its dimensions, a name for each dynamic one.
    """
    known = {*inputs, *(name for dims in inputs.values() for dim in dims for name in NAME.findall(str(dim)))}
    dynamic = {name: dims for name, dims in inputs.items() if not all(isinstance(dim, int) for dim in dims)}
    for profile in profiles or [{}]:
        if profile.keys() <= known and (missing := dynamic.keys() - with_shapes(profile, inputs).keys()):
            names = [name for name in dynamic if name in missing]
            example = tuple(f"{name}={_written(sizes)}" for name, sizes in likely(dynamic).items())
            problem = UsageError(
                f"{', '.join(names)} {'has' if len(names) == 1 else 'have'} dynamic dimensions, for which the engine"
                f" needs the least, the usual and the largest size, such as\n  --profile {' '.join(example)}"
            )
            raise with_remedy(problem, Remedy(options={"--profile": example}))


def _written(sizes: Sequence[Any]) -> str:
    return ",".join(str(size) if isinstance(size, int) else "x".join(map(str, size)) for size in sizes)


def check_cache(cache: str | None, others: Mapping[str, object]) -> None:
    """Refuse options that say what a cache says, or that are for one that there is not."""
    if cache is not None and (given := [name for name, value in others.items() if value]):
        raise UsageError(f"{', '.join(given)}: not with --cache, which has inputs and dynamic sizes of its own")


def cache_of(cache: str | None, length: int | None, logits: str) -> Cache | None:
    """What `quantize` takes. Raises UsageError in the words of the command line."""
    if cache is None:
        if given := [name for name, told in (("--cache-length", length), ("--logits", logits != "all")) if told]:
            raise UsageError(f"{', '.join(given)}: for a decoder with a cache: give --cache, too")
        return None
    if cache == "static" and length is None:
        raise UsageError("--cache static has a length: give --cache-length, such as 2048")
    if cache == "dynamic" and length is not None:
        raise UsageError("--cache-length is for --cache static: a dynamic cache is as long as what was appended")

    from qcompile.decoders import Cache

    return Cache(cache, length, logits)  # type: ignore[arg-type]


def parse_expect(texts: Sequence[str]) -> dict[str, int] | None:
    """`attention_fp8=12` and the like; None when there are none. Which keys there are, the engine's report knows."""
    expect: dict[str, int] = {}
    for text in texts:
        key, _, value = text.partition("=")
        if not key or not value.isdecimal():
            raise UsageError(f"--expect {text}: write it as key=count, such as attention_fp8=12 or kernels=149")
        expect[key] = int(value)
    return expect or None
