"""Every benchmark runs; their figures are asv's business."""

from __future__ import annotations

import importlib
import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "asv_benchmarks"
PREFIXES = ("time_", "track_", "peakmem_", "mem_")


@pytest.fixture
def on_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    monkeypatch.setenv("SUBGEN_BENCH_SMOKE", "1")
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "benchmarks"]:
        del sys.modules[name]


def axes(suite: type) -> list[list[Any]]:
    """What a benchmark runs over: asv takes one list, or a list of lists."""
    params = getattr(suite, "params", [])
    if params and isinstance(params[0], list | tuple):
        return [list(axis) for axis in params]
    return [list(params)] if params else []


@pytest.mark.usefixtures("on_path")
@pytest.mark.parametrize("module", sorted(p.stem for p in (FOLDER / "benchmarks").glob("[!_]*.py")))
def test_every_benchmark_runs_at_its_smallest(module: str) -> None:
    benchmarks = importlib.import_module(f"benchmarks.{module}")
    ran = 0
    for suite in vars(benchmarks).values():
        if not (isinstance(suite, type) and suite.__module__ == benchmarks.__name__):
            continue
        cache = (suite().setup_cache(),) if hasattr(suite, "setup_cache") else ()
        # The first of every number, and every name: backends and modes have code of their own.
        few = [[x for i, x in enumerate(axis) if i == 0 or isinstance(x, str)] for axis in axes(suite)]
        assert len(getattr(suite, "param_names", ())) == len(few)
        for name in [name for name in vars(suite) if name.startswith(PREFIXES)]:
            done = 0
            for arguments in itertools.product(*few):
                instance = suite()
                try:
                    if hasattr(instance, "setup"):
                        instance.setup(*cache, *arguments)
                except NotImplementedError:  # asv's way to say that something is not installed
                    continue
                result = getattr(instance, name)(*cache, *arguments)
                assert not name.startswith("track_") or result == result
                done += 1
            assert done, f"{suite.__name__}.{name} ran with no parameters"
            ran += done
    assert ran


@pytest.mark.usefixtures("on_path")
def test_exponents_are_those_of_the_numbers() -> None:
    common = importlib.import_module("benchmarks._common")
    assert common.slope([10, 100, 1000], [3.0, 3.0, 3.0]) == pytest.approx(0.0, abs=1e-12)
    assert common.slope([10, 100, 1000], [2.0, 20.0, 200.0]) == pytest.approx(1.0)


@pytest.mark.usefixtures("on_path")
def test_peers_are_exact_attention() -> None:
    import numpy as np

    from subgen import attention

    peers, common = (importlib.import_module(f"benchmarks.{name}") for name in ("_peers", "_common"))
    data = common.block(n=50)
    expected = attention(data["q"][:, -1:], data["k"], data["v"])
    for name, decode in peers.exact_decoders(data["q"][:, -1:], data["k"], data["v"]).items():
        got = np.asarray(decode()).reshape(expected.shape)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_the_script_of_floors_runs() -> None:
    small = {"heads": "1", "dim": "16", "clusters": "32", "window": "8", "steps": "16", "contexts": "256"}
    small |= {"prompt": "64", "seconds": "0"}
    options = [word for name, value in small.items() for word in (f"--{name}", value)]
    done = subprocess.run(
        [sys.executable, str(FOLDER / "floors.py"), *options, "--flat", "128", "256"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "256 tokens" in done.stdout
