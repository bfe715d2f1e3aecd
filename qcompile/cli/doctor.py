"""`qcompile doctor`: what is installed here, and what it allows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.text import Text

from qcompile.cli.console import out
from qcompile.report.tables import add, plain, table


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
        print(found.to_json())
    else:
        show_findings(out(), found.data())
    return 1 if found.problems else 0


def show_findings(console: Console, found: Mapping[str, Any]) -> None:
    """What `doctor` found, as `Findings.to_json` writes it."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    console.print(plain(versions, "bold"))
    packages = table("Packages", "name", "declared", "tested", "installed", "for", "")
    for package in found["packages"]:
        here = package["installed"]
        state = Text("broken", style="bold red") if package["problem"] else "good" if here else ""
        add(packages, package["name"], package["declared"], package["tested"], here or "-", package["extra"], state)
    console.print(packages)
    for extra in dict.fromkeys(p["extra"] for p in found["packages"] if p["extra"] and not p["installed"]):
        console.print(plain(f"not installed: pip install 'qcompile[{extra}]'"), soft_wrap=True)
    builders = table("Builders of engines", "name", "version", "for")
    for builder in found["builders"]:
        targets = ", ".join(builder["targets"]) or builder["problem"]
        add(builders, builder["name"], builder["version"] or "-", targets)
    console.print(builders)
    console.print(plain(f"ONNX Runtime: {', '.join(found['providers']) or 'none'}"), soft_wrap=True)
    console.print(plain(f"Devices: {', '.join(found['devices'])}\n"), soft_wrap=True)
    insides = table("Names that nobody promises, and that are used here", "library", "names", "")
    for inside in found["insides"]:
        broken = len(inside["problems"])
        state = Text(f"{broken} broken", style="bold red") if broken else "good"
        add(insides, inside["library"], str(inside["names"]), state)
    console.print(insides)
    routes = table("Recipes", "name", "runs in ONNX Runtime", "engines for")
    for route in found["routes"]:
        add(routes, route["recipe"], "yes" if route["onnxruntime"] else "no", ", ".join(route["engines"]) or "none")
    console.print(routes)
    for problem in found["problems"]:
        console.print(Text.assemble(("problem: ", "bold red"), plain(problem)), soft_wrap=True)
