"""Damaged files: made by mutation, and judged in a process of their own, which may be slow, grow or die.

A file that somebody else made ends in the right result or in one clear error, within ten seconds and a gigabyte.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import random
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from qcompile.errors import QCompileError

SECONDS = 10
KILOBYTES = 1_000_000
LONGEST_MESSAGE = 4_000

NUMBERS = (0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**30, 0.5, 1e308)
OTHERS = (None, True, "", "x", "../x", "/", [], {}, [[]], {"a": {}}, "\x1b[31m", "9" * 5000)


def mutated_bytes(data: bytes, draw: random.Random) -> bytes:
    """`data` with one to four of its parts changed, lost, doubled or cut off."""
    result = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at, length = draw.randrange(len(result) + 1), draw.choice((1, 1, 2, 4, 8, 64))
        part = result[at : at + length]
        flipped = int.from_bytes(part, "little") ^ 1 << draw.randrange(8 * max(len(part), 1))
        choices = (draw.randbytes(length), draw.choice((b"\0", b"\x7f", b"\x80", b"\xff")) * length, b"", part + part)
        result[at : at + length] = draw.choice((*choices, flipped.to_bytes(length + 1, "little")[: max(len(part), 1)]))
        if draw.random() < 0.1:
            del result[draw.randrange(len(result) + 1) :]
    return bytes(result)


def mutated_tree(tree: Any, draw: random.Random) -> Any:
    """A copy of what JSON holds with one to three places changed, lost, doubled or of another type."""
    copied = json.loads(json.dumps(tree))
    for _ in range(draw.randint(1, 3)):
        places = list(_places(copied))
        if not places:
            return draw.choice((*NUMBERS, *OTHERS))
        holder, key = draw.choice(places)
        how = draw.randrange(5)
        if how == 0:
            del holder[key]
        elif how == 1 and isinstance(holder[key], str):
            holder[key] = draw.choice((holder[key] * 2, holder[key][:-1], holder[key].upper(), f"{holder[key]}\n"))
        elif how == 2 and isinstance(holder, dict):
            holder[draw.choice((f"{key}x", "", "9"))] = holder[key]
        else:
            holder[key] = copy.deepcopy(draw.choice((*NUMBERS, *OTHERS)))  # the next change may be to what is in it
    return copied


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    entries: Iterable[tuple[Any, Any]] = ()
    if isinstance(tree, dict):
        entries = tree.items()
    elif isinstance(tree, list):
        entries = enumerate(tree)
    for key, value in entries:
        yield tree, key
        yield from _places(value)


def judge(cases: Sequence[Path], check: Callable[[Path], None]) -> Counter[str]:
    """How often `check` was content with a case, and how often it refused one; a test fails on anything else.

    Args:
        cases: files or directories; a fork of this process looks at one after the other.
        check: raises a QCompileError for a case that it refuses, and AssertionError for a wrong result.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(target=_work, args=(cases, check, sender))
    worker.start()
    sender.close()
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    for case in cases:
        try:
            outcome = receiver.recv()
        except EOFError:
            wrong.append(f"{case}: the process ended")
            break
        outcomes[outcome if outcome in ("right", "refused") else "wrong"] += 1
        if outcome not in ("right", "refused"):
            wrong.append(f"{case}: {outcome}")
    worker.join()
    assert not wrong, "\n".join(wrong)
    return outcomes


def _work(cases: Sequence[Path], check: Callable[[Path], None], sender: Any) -> None:
    def too_long(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, too_long)
    for case in cases:
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        signal.alarm(3 * SECONDS)  # what blocks in C is seen when it ends
        outcome = _outcome(case, check)
        signal.alarm(0)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        if time.monotonic() - start > SECONDS:
            outcome = f"took {time.monotonic() - start:.0f} s"
        elif grown > KILOBYTES:
            outcome = f"took {grown} kB"
        sender.send(outcome)


def _outcome(case: Path, check: Callable[[Path], None]) -> str:
    try:
        check(case)
    except QCompileError as error:
        message = str(error)
        if len(message) > LONGEST_MESSAGE or not message.strip():
            return f"a message of {len(message)} characters"
        return "refused" if message.isprintable() or message.replace("\n", "").isprintable() else f"said {message!r}"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    return "right"
