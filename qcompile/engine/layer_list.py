"""Parses the builder's layer list: the `Layers:` block at the end of a VERBOSE log, one line per layer.

A line of a form that is not known here becomes a layer of type `other` that holds its text: it is no reason to lose an
engine that was built, and the report has a notice of it.
"""

from __future__ import annotations

import re
from itertools import groupby

from qcompile.engine.layers import OTHER, Layer, Tensor
from qcompile.errors import EngineError

# Names come from the user's graph and may hold any punctuation, so each field is found by the label that follows it.
_TENSORS = r"\[((?: \{ .*? \})?)\]"
_LAYER = re.compile(
    r"Name: (?P<name>.*), LayerType: (?P<type>[^,\n]*), "
    rf"Inputs: {_TENSORS}, (?:Constants: {_TENSORS}, )?Outputs: {_TENSORS}, "
    r"(?P<settings>.*?)Metadata: (?P<metadata>.*)",
    re.DOTALL,
)
_TACTIC = re.compile(r"(?:^|, )TacticName: ([^,]*), ")
_TENSOR = re.compile(
    r"\{ Name: (?P<name>.*?),(?: Location: \w+,)? Dimensions: \[(?P<shape>(?:-?[0-9]{1,18}(?:, ?-?[0-9]{1,18})*)?)\], "
    r"(?:.*?, )?Datatype: (?P<type>[^,}]+?)(?:, .*)? \}",
    re.DOTALL,
)
_END = re.compile(r"\n\n(?:I/O Tensors|Bindings|Engine Metadata):\n")  # of one builder or another
_NODE = re.compile(r"\[ONNX Layer: (.*)\]", re.DOTALL)
_GROUP = re.compile(r"_myl(\d{1,9})_\d+$")
_PROFILE = re.compile(r" \[profile (\d{1,9})\]")


def parse_layers(text: str, profiles: int = 1) -> list[Layer]:
    """Read a `Layers:` block.

    Args:
        text: the block, from `Layers:` on; what follows the list (I/O tensors, metadata) is ignored.
        profiles: number of optimization profiles; the builder lists all kernels once for each of them.

    Returns:
        One layer for each entry; those that cannot be read are of type `other`, with the text of the entry as name.

    Raises:
        EngineError: there is no layer list.
    """
    _, found, body = text.partition("Layers:\n")
    if not found:
        raise EngineError("the builder printed no layer list, so nothing is known about the engine's kernels")
    entries = _entries(_END.split(body, maxsplit=1)[0])
    layers = [_layer(entry) for entry in entries]
    numbers = _profiles(layers, entries, profiles) if profiles > 1 else [0] * len(layers)
    return [
        layer.model_copy(update={"profile": number}) if number else layer
        for layer, number in zip(layers, numbers, strict=True)
    ]


def _entries(body: str) -> list[str]:
    """The entries of the list. A name may hold line breaks, so a line that starts no entry goes on with the last."""
    entries: list[str] = []
    for line in body.split("\n"):
        if line.startswith("Name: ") or not entries:
            entries.append(line)
        else:
            entries[-1] += f"\n{line}"
    return [entry.rstrip("\n") for entry in entries if entry.strip()]


def _layer(entry: str) -> Layer:
    match = _LAYER.fullmatch(entry)
    operands = [_tensors(text or "") for text in match.group(3, 4, 5)] if match else []
    readable = [tensors for tensors in operands if tensors is not None]
    if match is None or len(readable) < len(operands):
        return Layer(name=entry, type=OTHER, inputs=(), constants=(), outputs=(), tactic="", onnx_nodes=())
    inputs, constants, outputs = readable
    tactic = _TACTIC.search(match["settings"])
    return Layer(
        name=match["name"],
        type=match["type"],
        inputs=inputs,
        constants=constants,
        outputs=outputs,
        tactic=tactic[1] if tactic else "",
        onnx_nodes=_onnx_nodes(match["metadata"]),
    )


def _tensors(text: str) -> tuple[Tensor, ...] | None:
    """The operands in ` { ... }, { ... }`; None if one of them cannot be read."""
    parts = re.split(r"(?<= \}), (?=\{ Name: )", text.strip(" ")) if text else []
    # where the label stands twice, one operand has swallowed the next
    found = [m for part in parts if part.count(" Dimensions: [") == 1 and (m := _TENSOR.fullmatch(part))]
    if len(found) < len(parts):
        return None
    return tuple(
        Tensor(name=m["name"], datatype=m["type"].strip(), shape=tuple(map(int, re.findall(r"-?\d+", m["shape"]))))
        for m in found
    )


def _onnx_nodes(metadata: str) -> tuple[str, ...]:
    """`[ONNX Layer: a]<US>[ONNX Layer: b]` -> (a, b); the entries are held apart by the ASCII unit separator."""
    entries = re.split(r"\x1f|(?<=\])(?=\[ONNX Layer: )", metadata.strip())
    return tuple(match[1] if (match := _NODE.fullmatch(entry)) else entry for entry in entries if entry)


def _profiles(layers: list[Layer], entries: list[str], profiles: int) -> list[int]:
    """The profile of each layer.

    The list goes profile after profile, in groups `_mylN_` that are compiled as one, and tensors of the second profile
    on are marked ` [profile 1]`. Were a profile left without a layer, the marks would be a user's names: the groups are
    then dealt out evenly.
    """
    groups = [int(match[1]) if (match := _GROUP.search(layer.name)) else None for layer in layers]
    numbers: list[int] = []
    current = 0
    for _, run in groupby(zip(groups, entries, strict=True), key=lambda pair: pair[0]):
        texts = [entry for _, entry in run]
        marks = {int(number) for text in texts for number in _PROFILE.findall(text)}
        current = max([current, *(mark for mark in marks if mark < profiles)])
        numbers += [current] * len(texts)
    if len(set(numbers)) == profiles:
        return numbers
    ranks = {number: rank for rank, number in enumerate(sorted({g for g in groups if g is not None}))}
    return [0 if group is None else ranks[group] * profiles // len(ranks) for group in groups]
