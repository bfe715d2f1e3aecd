"""Layers of a model that Dynamo left to Python, and what it said why."""

from __future__ import annotations

import logging
import re
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from qcompile.compat.dynamo import counters, keep_skip_reasons, skip_reasons
from qcompile.dynamo.models import joined, layers, tensors_of
from qcompile.dynamo.recurrent import REASON as RECURRENT
from qcompile.messages import some

logger = logging.getLogger("qcompile")

UNKNOWN = "no call reached it, or Dynamo left it alone"
_KINDS = ("unimplemented", "graph_break")
_LIMIT = "recompile limit"
_FRAME = re.compile(r"(?P<name>\S+) \((?P<file>.*):(?P<line>\d+)\): (?P<why>.*)", re.DOTALL)
# of frames that Dynamo skips, those that it never looks into are no news: hooks, containers, files of torch
_TRIED = ("an error was suppressed", "Dynamo decided to skip", "compilation failed", "tracing is non-recursively")


class Fallbacks:
    """What Dynamo said, from now on until `stop`, of code that it could not capture.

    Attributes:
        reasons: the kinds of graph breaks.
        frames: (file, first line) of each function that it left alone -> its name, and why.
    """

    __slots__ = ("_before", "_start", "frames", "reasons")

    def __init__(self) -> None:
        self._before = {kind: dict(counters[kind]) for kind in _KINDS}
        self._start: int | None = None
        self.reasons: list[str] = []
        self.frames: dict[tuple[str, int], tuple[str, str]] = {}
        if (kept := skip_reasons()) is None:
            keep_skip_reasons([])
        else:
            self._start = len(kept)  # torch, or a call around this one, keeps them already

    def stop(self) -> None:
        """Read what was said."""
        for kind in _KINDS:
            before = self._before[kind]
            new = [message for message, count in counters[kind].items() if count > before.get(message, 0)]
            self.reasons += [message.partition("\n")[0] for message in new if RECURRENT not in message]
        for said in (skip_reasons() or [])[self._start or 0 :]:
            found = _FRAME.match(said)
            if found and found["why"].startswith(_TRIED):
                self.frames[found["file"], int(found["line"])] = found["name"], found["why"]
        if self._start is None:
            keep_skip_reasons(None)

    def why(self, layer: nn.Module, around: Iterable[nn.Module]) -> str | None:
        """Why Dynamo left `layer` alone, if it said so of anything since."""
        said = ", ".join(dict.fromkeys(self.reasons))
        for module in (layer, *around):
            code = getattr(type(module).forward, "__code__", None)
            if code is not None and (place := (code.co_filename, code.co_firstlineno)) in self.frames:
                name, why = self.frames[place]
                return f"Dynamo left {type(module).__name__}.{name} alone, {place[0]}:{place[1]}: {said or why}"
        if isinstance(layer, nn.RNNBase):
            return RECURRENT
        if self.reasons or self.frames:
            return f"Dynamo left it alone: {said or next(iter(self.frames.values()))[1]}"
        return None


@dataclass
class _Seen:
    """What calls of a model have shown: paths of layers that graphs ran, and of those left alone, with the reason."""

    ran: set[str] = field(default_factory=set)
    left: dict[str, str] = field(default_factory=dict)


_SEEN: weakref.WeakKeyDictionary[nn.Module, _Seen] = weakref.WeakKeyDictionary()
# class of a module -> path of a layer in it -> reason: Dynamo tries a function once, whatever module it is called with
_KNOWN: weakref.WeakKeyDictionary[type[nn.Module], dict[str, str]] = weakref.WeakKeyDictionary()


def left_alone(modules: Mapping[str, nn.Module], read: Sequence[Tensor], fallbacks: Fallbacks) -> dict[str, str]:
    """Path -> reason, of each layer that could be quantized and that a call left to Python; new ones are logged.

    Args:
        modules: what was called, by its name.
        read: the weights that graphs of the back end read.
    """
    ids = set(map(id, read))
    missing: dict[str, str] = {}
    for root, module in modules.items():
        seen = _SEEN.setdefault(module, _Seen())
        total, new = 0, {}
        for path, layer, around in layers({"": module}):
            total += 1
            if any(id(tensor) in ids for tensor in tensors_of(layer)):
                if path not in seen.ran:
                    seen.left.pop(path, None)
                seen.ran.add(path)
            elif why := _why(path, layer, around, fallbacks, bool(read)):
                missing[joined(root, path)] = why
                if path not in seen.left:
                    new[path] = seen.left[path] = why
        if new:
            logger.warning(
                "%d of %d layers of %s ran outside of the graphs that qcompile compiled, in the precision of the model:"
                " %s (%s); qcompile.explain lists them",
                len(new),
                total,
                type(module).__name__,
                some(list(new)),
                next(iter(new.values())),
            )
    return missing


def _why(path: str, layer: nn.Module, around: Sequence[nn.Module], fallbacks: Fallbacks, any_ran: bool) -> str | None:
    """Why a layer is in no graph of a call; None if nothing says that the call reached it."""
    places = list(_places(path, around))
    if why := fallbacks.why(layer, around):
        if _LIMIT not in why:
            for module, below in places:
                _KNOWN.setdefault(type(module), {})[below] = why
        return why
    known = (_KNOWN.get(type(module), {}).get(below) for module, below in places)
    return next(filter(None, known), None if any_ran else UNKNOWN)


def _places(path: str, around: Sequence[nn.Module]) -> Iterator[tuple[nn.Module, str]]:
    names = path.split(".")
    for index, module in enumerate(around):
        yield module, ".".join(names[index:])


def layers_left(modules: Mapping[str, nn.Module], read: Iterable[Tensor]) -> dict[str, str] | None:
    """Path -> reason, of each layer that no graph reads, or that a call left alone; None if nothing was compiled.

    Args:
        modules: models that were compiled, by name.
        read: the weights that graphs of the back end read.
    """
    ids = set(map(id, read))
    if not ids and not any(_SEEN.get(module, _Seen()).left for module in modules.values()):
        return None
    found: dict[str, str] = {}
    for root, module in modules.items():
        known = _SEEN.get(module, _Seen()).left
        for path, layer, _ in layers({"": module}):
            if path in known or not any(id(tensor) in ids for tensor in tensors_of(layer)):
                found[joined(root, path)] = known.get(path, UNKNOWN)
    return found


def models_seen() -> dict[str, nn.Module]:
    """All models that were called and are still there, by the names of their classes."""
    found: dict[str, nn.Module] = {}
    for module in list(_SEEN):
        name = type(module).__name__
        found[name if name not in found else f"{name}_{len(found)}"] = module
    return found if len(found) != 1 else {"": next(iter(found.values()))}
