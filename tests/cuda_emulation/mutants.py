"""Leaves the barriers of the kernels out, one at a time: `python -m cuda_emulation.mutants` prints what was noticed.

A process for each, since a kernel without a barrier may write anywhere or never end.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from subgen_cupy import _absorbing, _attention, _leaders, _merging
from subgen_cupy._launch import Module

from subgen.merging import Means
from subgen.rounding import Codes

from . import EmulatedDevice, EmulationError, barriers

__all__ = ["main"]

SEEDS = range(1, 9)
_SECONDS = 20


def _attend(device: EmulatedDevice) -> list[Any]:
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, n, 64)).astype(np.float32) for n in (4, 80, 80))
    counts, spread = rng.integers(1, 4, size=(2, 40)).astype(np.int32), rng.random((2, 40, 4)).astype(np.float32)
    return list(_attention.attend(device, q * 0.1, k, v, (counts, spread)))


def _lead(device: EmulatedDevice) -> list[Any]:
    rng = np.random.default_rng(0)
    keys, centres = (rng.integers(-4, 5, size=(2, n, 40)).astype(np.float32) for n in (70, 70))
    return list(_leaders.leaders(device, keys, centres, np.array([3, 70]), 20.0))


def _merge(device: EmulatedDevice) -> list[Any]:
    rng = np.random.default_rng(0)
    keys, values = rng.normal(size=(2, 3, 90, 40)).astype(np.float32)
    counts, importance = rng.integers(1, 5, size=(3, 90)).astype(np.int32), rng.random((3, 90)).astype(np.float32)
    spread = rng.random((3, 90, 4)).astype(np.float32)
    means = Means(keys, values, counts, spread, importance)
    scale = np.ones(3, np.float32)
    metric = np.tile(np.diag(np.arange(1, 41, dtype=np.float32)), (3, 1, 1)) + 0.5
    merged, moved = _merging.shrink(device, means, metric, scale, 50, 50)
    costs, nearest = _merging.ward_costs(device, means, metric, scale)
    return [costs, nearest, merged.keys, merged.values, merged.counts, merged.spread, merged.importance, moved]


def _absorb(device: EmulatedDevice) -> list[Any]:
    rng = np.random.default_rng(0)
    keys, values = rng.normal(size=(2, 2, 80, 40)).astype(np.float32)
    counts, spread = rng.integers(1, 5, size=(2, 50)).astype(np.int32), rng.random((2, 50, 4)).astype(np.float32)
    held = Means(keys[:, :50], values[:, :50], counts, spread, rng.random((2, 50)).astype(np.float32))
    pool, scale = _absorbing.collect(device, held, keys, values, 30, 1.0)
    codes = rng.integers(-127, 128, size=(2, 150, 40)).astype(np.int8)
    queries = Codes(codes, rng.random((2, 150)).astype(np.float32))
    moments = [_absorbing.query_moment(device, queries, 150), _absorbing.key_moment(device, keys, None)]
    return [pool.keys, pool.values, pool.counts, pool.spread, pool.importance, scale, *moments]


def cases() -> Iterator[tuple[Module, Callable[[EmulatedDevice], list[Any]]]]:
    """Give each module that has barriers, and something that runs all of its kernels."""
    yield _absorbing.absorbing_module("float32", "float32"), _absorb
    yield _attention.attention_module("float32", "float32", 64, 64, 4, 4), _attend
    yield _leaders.leaders_module("float32"), _lead
    yield _merging.MERGING, _merge


def noticed(run: Callable[[EmulatedDevice], list[Any]], expected: list[Any], line: int) -> bool:
    """Whether a kernel without the barrier at a line gives another result, or none, in some order of its threads."""
    child = os.fork()
    if child == 0:
        os.close(2)
        signal.alarm(_SECONDS)
        try:
            for seed in SEEDS:
                got = run(EmulatedDevice(seed=seed, removed=line))
                # Equal to the last bit: sums are taken in one order, whatever the order of the threads.
                if not all(np.array_equal(a, b, equal_nan=True) for a, b in zip(got, expected, strict=True)):
                    os._exit(1)
        except EmulationError:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] != 0


def main() -> None:
    """Print, as JSON, for each file the lines of its barriers and whether leaving one out was noticed."""
    report = {}
    for module, run in cases():
        expected = run(EmulatedDevice(seed=0))
        for seed in SEEDS:
            again = run(EmulatedDevice(seed=seed))
            assert all(np.array_equal(a, b) for a, b in zip(again, expected, strict=True)), (module.file, seed)
        lines = module.source().splitlines()
        report[module.file] = {
            f"{line}: {lines[line - 1].strip()}": noticed(run, expected, line) for line in barriers(module)
        }
    json.dump(report, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
