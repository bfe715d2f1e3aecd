"""Inductor's caches on disk: the same passes find what was compiled, others do not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import clear_caches

from qcompile.dynamo import inductor
from tests.qcompile.dynamo.support import DYNAMIC, Mlp, assert_same, compiled, reference

X = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    clear_caches()
    yield
    clear_caches()


def lookups(model: torch.nn.Module, **options: Any) -> tuple[int, int]:
    """(hits, misses) of the cache on disk when a new process compiles `model`, as far as one process can tell."""
    torch._dynamo.reset()
    clear_caches()
    counters.clear()
    with torch.no_grad():
        result = compiled(model, target="inductor", **options)(X)
        assert_same(result, reference(model, X, recipe=options.get("recipe", "")) if "recipe" in options else result)
    found = counters["inductor"]
    return found["fxgraph_cache_hit"], found["fxgraph_cache_miss"]


@pytest.mark.slow
def test_same_passes_hit_and_other_passes_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Mlp()
    assert lookups(model) == (0, 1)
    assert lookups(model) == (1, 0)
    assert lookups(Mlp()) == (1, 0), "numbers of weights are no part of the code"
    monkeypatch.setattr(inductor, "fingerprint", lambda: b"other passes")
    assert lookups(model) == (0, 1)
    assert lookups(model) == (1, 0)
    monkeypatch.undo()


@pytest.mark.slow
def test_recipe_and_settings_are_part_of_the_key() -> None:
    model = Mlp()
    assert lookups(model) == (0, 1)
    assert lookups(model, recipe=DYNAMIC) == (0, 1)
    assert lookups(model, inductor={"epilogue_fusion": False}) == (0, 1)


def fingerprint_now() -> bytes:
    """The fingerprint as a new process computes it."""
    inductor.get_hash_for_files.cache_clear()
    found: bytes = inductor.fingerprint.__wrapped__()
    return found


def test_fingerprint_is_that_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A changed line or a new file in any pass or operator changes it; nothing else does."""
    package = tmp_path / "passes"
    (package / "fuse").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "fuse" / "one.py").write_text("RATE = 1\n")
    monkeypatch.setattr(inductor.passes, "__file__", str(package / "__init__.py"))
    first = fingerprint_now()
    (package / "notes.txt").write_text("nothing that runs")
    assert fingerprint_now() == first
    (package / "fuse" / "one.py").write_text("RATE = 2\n")
    second = fingerprint_now()
    (package / "fuse" / "two.py").write_text("RATE = 3\n")
    assert len({first, second, fingerprint_now()}) == 3


def test_fingerprint_is_what_inductor_asks_for() -> None:
    assert inductor._Fingerprint().uuid() == inductor.fingerprint()
