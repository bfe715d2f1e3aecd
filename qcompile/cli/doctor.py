"""`qcompile doctor`: what is installed here, and what it allows."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.text import Text

from qcompile.cli.console import out
from qcompile.tables import add, table

if TYPE_CHECKING:
    from qcompile.doctor import Findings


def doctor(*, json_: Annotated[bool, Parameter(name="--json", negative="", show_default=False)] = False) -> int:
    """Say which packages, runtimes, builders and devices are here, and which recipes run or build with them.

    Exit code 1 if a package that is declared is missing, outside of its declared range, or cannot be imported, or if
    one lacks a private name that is used here. What an extra brings may be missing. Nothing is built or run.

    ```
    qcompile doctor
    qcompile doctor --json
    ```

    Parameters
    ----------
    json_:
        Print it as JSON.
    """
    from qcompile.doctor import examine

    found = examine()
    if json_:
        print(json.dumps(found.to_json(), indent=2))
    else:
        _show(out(), found)
    return 1 if found.problems else 0


def _show(console: Console, found: Findings) -> None:
    console.print(Text(", ".join(f"{name} {version}" for name, version in found.versions.items()), style="bold"))
    packages = table("Packages", "name", "declared", "tested", "installed", "for", "")
    for package in found.packages:
        state = Text("broken", style="bold red") if package.problem else "good" if package.installed else ""
        installed = package.installed or "-"
        add(packages, package.name, package.declared, package.tested, installed, package.extra, state)
    console.print(packages)
    for extra in dict.fromkeys(package.extra for package in found.packages if package.extra and not package.installed):
        console.print(Text(f"not installed: pip install 'qcompile[{extra}]'"), soft_wrap=True)
    builders = table("Builders of engines", "name", "version", "for")
    for builder in found.builders:
        add(builders, builder.name, builder.version or "-", ", ".join(builder.targets) or builder.problem)
    console.print(builders)
    console.print(Text(f"ONNX Runtime: {', '.join(found.providers) or 'none'}"), soft_wrap=True)
    console.print(Text(f"Devices: {', '.join(found.devices)}\n"), soft_wrap=True)
    insides = table("Names that nobody promises, and that are used here", "library", "names", "")
    for inside in found.insides:
        state = Text(f"{len(inside.problems)} broken", style="bold red") if inside.problems else "good"
        add(insides, inside.library, str(inside.names), state)
    console.print(insides)
    routes = table("Recipes", "name", "runs in ONNX Runtime", "engines for")
    for route in found.routes:
        runs = "yes" if route.onnxruntime else "no"
        add(routes, route.recipe, runs, ", ".join(route.engines) or "none")
    console.print(routes)
    for problem in found.problems:
        console.print(Text.assemble(("problem: ", "bold red"), problem), soft_wrap=True)
