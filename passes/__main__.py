"""What there is among the passes, and what they do to a program.

    python -m passes                              stage, name and summary of each pass
    python -m passes NormalizeLinear              all that one of them says: before, after, requires, declines
    python -m passes show m.pt2                   which passes fire on a program, and what they decline
    python -m passes show m.pt2 --until FuseAttentionQdq       its graph behind that pass
    python -m passes show m.pt2 --diff PlaceAttentionScale     what that pass changed

m.pt2 is what torch.export.save wrote: a model in floating point, which is quantized for show as if by qcompile.quantize
(--format; scales of activations are 1, as the form of the graph needs no data), or one that is quantized. It is read
by torch.export.load, which trusts the file: give it only what you, or somebody you trust, have made.
The graphs of a run as it is, with its recipe and its data: QCOMPILE_TRACE=DIR, see passes/observe.py.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from passes.errors import QCompileError

if TYPE_CHECKING:
    from passes.show import Step

TARGETS = ("tensorrt", "portable", "inductor")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code."""
    given = sys.argv[1:] if argv is None else list(argv)
    try:
        return _show(given[1:]) if given[:1] == ["show"] else _catalogue(given)
    except (QCompileError, OSError) as error:
        print(f"python -m passes: {error}", file=sys.stderr)
        return 1


def _catalogue(given: list[str]) -> int:
    parser = _parser("python -m passes", __doc__)
    parser.add_argument("name", nargs="?", help="a pass; or show, see python -m passes show --help")
    parser.add_argument("--markdown", metavar="DIR", type=Path, help="write the catalogue there, a page a stage")
    parser.add_argument("--check", metavar="DIR", type=Path, help="exit code 1 if the pages there are out of date")
    asked = parser.parse_args(given)
    from passes.catalogue import catalogue, find, pages, table

    if asked.check is not None:
        old = [n for n, text in pages().items() if not (p := asked.check / n).exists() or p.read_text("utf-8") != text]
        for name in old:
            print(f"{asked.check / name} is out of date: python -m passes --markdown {asked.check}", file=sys.stderr)
        return 1 if old else 0
    if asked.markdown is not None:
        asked.markdown.mkdir(parents=True, exist_ok=True)
        for name, text in pages().items():
            (asked.markdown / name).write_text(text, encoding="utf-8")
        return 0
    if asked.name is None:
        print(table())
        return 0
    entry = find(asked.name)
    if entry is None:
        raise QCompileError(_no_pass(asked.name, [entry.name for entry in catalogue()]))
    print(f"{entry.name} ({entry.stage}, passes/{entry.file})\n\n{entry.doc}")
    return 0


def _show(given: list[str]) -> int:
    parser = _parser("python -m passes show", __doc__)
    parser.add_argument("model", metavar="MODEL.pt2", help="a program of torch.export.save, from somebody you trust")
    parser.add_argument("--until", metavar="PASS", help="the graph behind this pass; behind its last run of several")
    parser.add_argument("--diff", metavar="PASS", help="what this pass changed, as a unified diff")
    parser.add_argument("--target", choices=TARGETS, default="tensorrt", help="whose passes follow (tensorrt)")
    parser.add_argument("--format", default="fp8", help="for a model in floating point: fp8 (as if not given), int8")
    asked = parser.parse_args(given)
    import torch

    from passes.show import steps
    from passes.text import graph_diff

    if not Path(asked.model).is_file():
        raise QCompileError(f"there is no file {asked.model}")
    found = list(steps(torch.export.load(asked.model), asked.target, asked.format))
    wanted = asked.diff or asked.until
    if wanted is None:
        for step in found:
            if step.fired or step.log.declined:
                print(f"{step.stage:12} {step.name:27} fired {step.fired}")
            for decline in step.log.declined:
                print(f"{'':12}   declined {decline.module or 'the root'} ({decline.nodes[0]}): {decline.reason}")
        return 0
    known = dict.fromkeys(step.name for step in found)
    started = [name for name in known if name.startswith(wanted)]
    if wanted not in known and len(started) != 1:
        raise QCompileError(_no_pass(wanted, list(known)))
    wanted = wanted if wanted in known else started[0]
    runs = [step for step in found if step.name == wanted]
    if asked.until:
        print(runs[-1].after)
        return 0
    for step in runs:
        print(graph_diff(step.before, step.after, (f"before {wanted}", f"after {wanted}")) or _unchanged(step))
    return 0


def _unchanged(step: Step) -> str:
    reasons = "; ".join(f"{d.module or 'the root'}: {d.reason}" for d in step.log.declined)
    return f"it changed nothing; {'declined ' + reasons if reasons else 'it found nothing to rewrite'}"


def _no_pass(name: str, known: list[str]) -> str:
    from passes.catalogue import find

    if find(name) is not None:
        return f"{name} is not on the way of this program to this target: those that are: {', '.join(known)}"
    close = difflib.get_close_matches(name, known, 3) or [n for n in dict.fromkeys(known) if name.lower() in n.lower()]
    return f"there is no pass {name} here; {'did you mean ' + ', '.join(close) if close else 'see python -m passes'}"


def _parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=name, description=doc, formatter_class=formatter)


if __name__ == "__main__":
    sys.exit(main())
