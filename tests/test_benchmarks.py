"""Every benchmark runs; their figures are asv's business."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "asv_benchmarks"
PREFIXES = ("time_", "track_", "peakmem_", "mem_")


@pytest.fixture
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])


@pytest.mark.usefixtures("on_path")
@pytest.mark.parametrize("module", sorted(p.stem for p in (FOLDER / "benchmarks").glob("[!_]*.py")))
def test_every_benchmark_runs_at_its_smallest(module: str) -> None:
    benchmarks = importlib.import_module(f"benchmarks.{module}")
    ran = 0
    for suite in vars(benchmarks).values():
        if not (isinstance(suite, type) and suite.__module__ == benchmarks.__name__):
            continue
        params = getattr(suite, "params", [])
        axes = params if params and isinstance(params[0], (list, tuple)) else ([params] if params else [])
        arguments = [axis[0] for axis in axes]
        for name in vars(suite):
            if name.startswith(PREFIXES):
                instance = suite()
                if hasattr(instance, "setup"):
                    instance.setup(*arguments)
                getattr(instance, name)(*arguments)
                ran += 1
    assert ran
