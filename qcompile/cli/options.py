"""Reads the options that hold more than a word: profiles and expectations."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from qcompile.errors import QCompileError

Shape = tuple[int, ...]
Profile = dict[str, tuple[Shape, Shape, Shape]]


class UsageError(QCompileError):
    """An option that cannot be read, or does not go with another one."""


def parse_profiles(texts: Sequence[str]) -> Profile | None:
    """`input=min,opt,max` with shapes such as `8x512`, one for each input; None when there are none."""
    profile: Profile = {}
    for text in texts:
        name, _, shapes = text.partition("=")
        sizes = [_shape(shape) for shape in shapes.split(",")]
        known = [shape for shape in sizes if shape is not None]
        if not name or len(sizes) != 3 or len(known) != 3:
            raise UsageError(
                f"--profile {text}: write it as input=min,opt,max with shapes like 4x128, such as"
                " input_ids=1x32,4x128,8x512"
            )
        if name in profile:
            raise UsageError(f"--profile {text}: the input {name} is given twice")
        profile[name] = (known[0], known[1], known[2])
    return profile or None


def _shape(text: str) -> Shape | None:
    return tuple(int(size) for size in text.split("x")) if re.fullmatch(r"\d+(x\d+)*", text.strip()) else None


def require_profile(inputs: Mapping[str, Sequence[int | str]], profile: Profile | None) -> None:
    """Dynamic inputs need a profile: say so in the words of the command line, with an example to copy.

    Args:
        inputs: input -> its dimensions, a name for each dynamic one.
    """
    missing = [name for name, dims in inputs.items() if name not in (profile or {}) and not _static(dims)]
    if missing:
        example = " ".join(f"--profile {name}={_example(inputs[name])}" for name in missing)
        raise UsageError(
            f"{', '.join(missing)} {'has' if len(missing) == 1 else 'have'} dynamic dimensions, for which the engine"
            f" needs the least, the usual and the largest shape, such as\n  {example}"
        )


def _static(dims: Sequence[int | str]) -> bool:
    return all(isinstance(dim, int) for dim in dims)


def _example(dims: Sequence[int | str]) -> str:
    likely = {0: (1, 8, 32)}
    sizes = [3 * (d,) if isinstance(d, int) else likely.get(i, (32, 128, 512)) for i, d in enumerate(dims)]
    return ",".join("x".join(str(size[k]) for size in sizes) for k in range(3))


def parse_expect(texts: Sequence[str]) -> dict[str, int] | None:
    """`attention_fp8=12` and the like; None when there are none. Which keys there are, the engine's report knows."""
    expect: dict[str, int] = {}
    for text in texts:
        key, _, value = text.partition("=")
        if not key or not value.isdecimal():
            raise UsageError(f"--expect {text}: write it as key=count, such as attention_fp8=12 or kernels=149")
        expect[key] = int(value)
    return expect or None
