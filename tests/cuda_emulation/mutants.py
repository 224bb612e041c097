"""Kernels with a mistake each: `python -m cuda_emulation.mutants` prints which were noticed.

Every barrier is left out in turn, and statements that are easily got wrong are replaced. A process for each, since a
kernel without a barrier may write anywhere or never end.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from subgen_cupy import _absorbing, _attention, _decoding, _leaders, _merging
from subgen_cupy._launch import Module

from subgen.merging import Means
from subgen.rounding import Codes

from . import EmulatedDevice, barriers

__all__ = ["main"]

SEEDS = range(1, 9)
# A kernel that never ends is stopped after this, or after so many times what those without a mistake take.
_SECONDS, _TIMES = 20.0, 3.0
_PEERS = 2


def _attend(device: EmulatedDevice) -> list[Any]:
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, n, 64)).astype(np.float32) for n in (4, 80, 80))
    counts, spread = rng.integers(1, 4, size=(2, 40)).astype(np.int64), rng.random((2, 40, 4)).astype(np.float32)
    return list(_attention.attend(device, q * 0.1, k, v, (counts, spread)))


@dataclass(frozen=True)
class Sketch:
    """What a token goes into; see `subgen.decoding.Held`."""

    keys: np.ndarray
    values: np.ndarray
    counts: np.ndarray
    spread: np.ndarray
    key_codes: Codes | None
    value_codes: Codes | None
    queries: Codes
    n_means: int
    n_exact: int
    n_seen: int


def _decode(device: EmulatedDevice) -> list[Any]:
    """Tokens in the place of a sink, behind the sinks, and where memory says; numbers that are not scaled overflow."""
    rng = np.random.default_rng(0)
    results = []
    for n_exact, counted in [(1, False), (2, False), (5, True), (1, True)]:
        keys, values = rng.normal(size=(2, 2, 50, 64)).astype(np.float16)
        counts, spread = rng.integers(1, 4, size=(2, 40)).astype(np.int64), rng.random((2, 40, 4)).astype(np.float16)
        codes = Codes(np.zeros((2, 8, 64), np.int8), np.zeros((2, 8), np.float32))
        held = Sketch(keys, values, counts, spread, None, None, codes, 40, n_exact, n_exact + 41)
        counters = None
        if counted:
            counters = np.zeros(2, np.int64)
            _decoding.count_tokens(device, counters, n_exact, n_exact + 41)
        token = [rng.normal(size=(2, n, 64)).astype(np.float16) for n in (3, 1, 1)]
        token[2][0, 0, 0] = 65504.0
        token[0][0, 0], token[1][0] = 50.0, 50.0
        decoded = _decoding.decode(device, held, *token, 0.1, counters)
        results += [decoded.keys, decoded.values, decoded.queries.codes, decoded.queries.scales, decoded.outputs]
    return results


def _lead(device: EmulatedDevice) -> list[Any]:
    rng = np.random.default_rng(0)
    keys, centres = (rng.integers(-4, 5, size=(2, n, 40)).astype(np.float32) for n in (70, 70))
    return list(_leaders.leaders(device, keys, centres, np.array([3, 70]), 20.0))


def _merge(device: EmulatedDevice) -> list[Any]:
    rng = np.random.default_rng(0)
    keys, values = rng.normal(size=(2, 3, 90, 40)).astype(np.float32)
    values = values[..., :24]  # an odd number of chunks in all
    counts, importance = rng.integers(1, 5, size=(3, 90)).astype(np.int64), rng.random((3, 90)).astype(np.float32)
    spread = rng.random((3, 90, 4)).astype(np.float32)
    means = Means(keys, values, counts, spread, importance)
    scale = np.ones(3, np.float32)
    metric = np.tile(np.diag(np.arange(1, 41, dtype=np.float32)), (3, 1, 1)) + 0.5
    merged, moved = _merging.shrink(device, means, metric, scale, 50, 50)
    costs = _merging.ward_costs(device, means, metric, scale)
    return [costs, merged.keys, merged.values, merged.counts, merged.spread, merged.importance, moved]


def _remember(device: EmulatedDevice) -> list[Any]:
    """Streams in which enough are new; nothing has to merge; all remember one; a few less than enough are new."""
    rng = np.random.default_rng(0)
    keys, values = rng.normal(size=(2, 4, 90, 8)).astype(np.float32)
    counts, importance = rng.integers(1, 5, size=(4, 90)).astype(np.int64), rng.random((4, 90)).astype(np.float32)
    counts[0, :9] = counts[0, 58:84] = counts[1, 60:] = counts[1, 7:40:3] = counts[3, 60:] = 0
    known = np.tile((np.arange(90, dtype=np.int32) + 7) % 60, (4, 1))
    known[0, 30:], known[0, 40:45] = np.arange(23, 83), -1
    known[:2, 60:], known[2], known[2, 3], known[3, :15] = -1, 3, 7, -1
    known = np.where((counts > 0) & (np.take_along_axis(counts, known, axis=1) > 0), known, -1)
    means = Means(keys, values, counts, np.zeros((4, 90, 4), np.float32), importance, nearest=known)
    merged, moved = _merging.shrink(device, means, None, np.ones(4, np.float32), 50, 55)
    return [merged.keys, merged.counts, merged.nearest, moved]


def _merge_all(device: EmulatedDevice) -> list[Any]:
    """Also costs of more than one tile of pairs."""
    rng = np.random.default_rng(1)
    keys, counts = rng.normal(size=(1, 140, 8)).astype(np.float32), np.ones((1, 140), np.int64)
    means = Means(keys, keys, counts, np.zeros((1, 140, 4), np.float32), np.ones((1, 140), np.float32))
    costs = _merging.ward_costs(device, means, None, np.ones(1, np.float32))
    return [costs, *_merge(device), *_remember(device)]


def _match(device: EmulatedDevice) -> list[Any]:
    """Also streams of several tiles: some are nearest to many; all remember others; many costs are equal, or all."""
    rng = np.random.default_rng(0)
    keys, values = rng.normal(size=(2, 3, 150, 8)).astype(np.float32)
    keys[0, ::9] *= 0.1
    keys[2], values[2] = rng.integers(-1, 2, size=(150, 8)) * (np.arange(8) < 1), 0.0
    counts, importance = np.ones((3, 150), np.int64), (0.1 + rng.random((3, 150))).astype(np.float32)
    importance[2] = 1.0
    nearest = np.full((3, 150), -1, np.int32)
    nearest[1] = (np.arange(150) + 7) % 150
    means = Means(keys, values, counts, np.zeros((3, 150, 4), np.float32), importance, nearest=nearest)
    merged, moved = _merging.shrink(device, means, None, np.ones(3, np.float32), 90, 90)
    # Costs that are all equal, whoever speaks for a pair; one cluster has nobody.
    costs = np.ones((1, 128, 128), np.float32)
    index = np.arange(120)
    costs[:, index, index[::-1]] = 0.0
    costs[:, index, index] = costs[:, 7] = costs[:, :, 7] = np.inf
    known = np.ones((1, 120), np.int64), rng.random((1, 120)).astype(np.float32), np.full((1, 120), -1, np.int32)
    matched = _merging.match(device, costs, *known, 100, 120, np.zeros((1, 120), np.int64), True)
    # As many others, of four costs.
    few = np.triu(rng.integers(1, 5, size=(128, 128)), 1).astype(np.float32)
    few = (few + few.T)[None]
    few[:, np.arange(128), np.arange(128)] = np.inf
    chosen = _merging.match(device, few, *known, 70, 120, np.zeros((1, 120), np.int64), True)
    return [*_remember(device), merged.counts, merged.nearest, moved, *matched, *chosen]


def _match_together(device: EmulatedDevice) -> list[Any]:
    """Two blocks a stream."""
    _merging._PEERS, _merging._FEW_CLUSTERS = _PEERS, 1
    return _match(replace(device, clusters=True))


def _absorb(device: EmulatedDevice) -> list[Any]:
    rng = np.random.default_rng(0)
    keys, values = rng.normal(size=(2, 2, 80, 40)).astype(np.float32)
    counts, spread = rng.integers(1, 5, size=(2, 50)).astype(np.int64), rng.random((2, 50, 4)).astype(np.float32)
    held = Means(keys[:, :50], values[:, :50], counts, spread, rng.random((2, 50)).astype(np.float32))
    held = replace(held, nearest=rng.integers(-1, 50, size=(2, 50)).astype(np.int32))
    pool, scale = _absorbing.collect(device, held, keys, values, 30, 1.0)
    codes = rng.integers(-127, 128, size=(2, 150, 40)).astype(np.int8)
    queries = Codes(codes, rng.random((2, 150)).astype(np.float32))
    moments = [_absorbing.query_moment(device, queries, 150), _absorbing.key_moment(device, keys, None)]
    return [pool.keys, pool.values, pool.counts, pool.spread, pool.importance, pool.nearest, scale, *moments]


def cases() -> Iterator[tuple[Module, Callable[[EmulatedDevice], list[Any]]]]:
    """Give each module that has barriers or mistakes, and something that runs all of its kernels."""
    yield _absorbing.absorbing_module("float32"), _absorb
    yield _attention.attention_module("float32", "float32", 64, 64, 4, 4), _attend
    yield _decoding.decoding_module("float16", "float16"), _decode
    yield _leaders.leaders_module("float32"), _lead
    yield _merging.MERGING, _merge
    yield _merging.matching_module(1, 4), _match
    yield _merging.matching_module(_PEERS, 4), _match_together


#: By file, something that runs its kernels, and statements with what they must not be.
WRONG: dict[str, tuple[Callable[[EmulatedDevice], list[Any]], list[tuple[str, str]]]] = {
    "absorbing.cu": (_absorb, [
        ("nearest[place] = anew ? -1 : held_nearest[cluster];", "nearest[place] = -1;"),
        ("nearest[place] = -1;", "nearest[place] = 0;"),
    ]),
    "attention.cu": (_decode, [
        ("(int)counters[0] + 1", "(int)counters[0]"),
        ("counters && !merged", "counters"),
        ("counters && !merged", "false"),
        ("widen(source[i]) * scale * LOG2E", "widen(source[i]) * LOG2E"),
        ("widen(source[b * BAND + i]) * scale", "widen(source[b * BAND + i])"),
        ("narrow_within(output, outputs", "narrow(1.01f * output, outputs"),
    ]),
    "decoding.cu": (_decode, [
        ("else if (n_exact >= sink)", "else"),
        ("n_seen % group", "0"),
        ("window + n_exact - sink", "window + n_exact"),
        ("widen(query[d]) * scale", "widen(query[d])"),
        ("sink + window) + clusters + n_exact", "sink + window) + clusters + sink"),
        ("n_exact = counters[0]", "n_exact = counters[1]"),
    ]),
    "merging.cu": (_merge_all, [
        # Which pairs are compared.
        ("own_nearest != j && nearest != i", "own_nearest != j"),
        ("own_nearest != j && nearest != i", "true"),
        ("own_nearest >= 0 && nearest >= 0", "own_nearest >= 0"),
        # The costs of a tile and of its mirror image.
        ("apart + (c / 2 - r) * 8 + c % 2 >= 0", "true"),
        ("apart + (c / 2 - r) * 8 + c % 2 == 0", "false"),
        ("*down = *cost;\n      } else", "} else"),
        ("if (c % 2 == 0) *reinterpret_cast<float2*>(across)", "if (r) *reinterpret_cast<float2*>(across)"),
    ]),
    "matching.cu": (_match, [
        ("every ? 0x7fffffffu : 0xffffffffu", "0x7fffffffu"),
        ("every ? 0x7fffffffu : 0xffffffffu", "0xffffffffu"),
        ("(found >> 16) < 2 * surplus - 1", "(found >> 16) < surplus"),
        # Who speaks for a pair, and who guards against it.
        ("place > own && cost < bits", "cost < bits"),
        ("(unsigned)place < (unsigned)own && cost", "cost"),
        ("bits + (guard < nearest)", "bits"),
        ("bits + (guard < nearest)", "NOBODY"),
        ("cost < bits + (column < index)", "cost < bits"),
        ("cost < bits + (column < index) && (", "("),
        ("order, -1, line", "order, order[i], line"),
        ("place >= 0 && cost < bits + (", "cost < bits + ("),
        ("Place mine = NONE", "Place mine = 0"),
        ("? NAMES : turn) |", "? turn : turn) |"),
        ("named != GUARDED && order[named & INDEX] < 0", "false"),
        ("guard != NONE && order[guard] >= 0", "guard != NONE"),
        ("start || must_look(i, order, names, guards)", "start"),
        # The cheapest, if there are more than must merge.
        ("cheap[q] < cheap[p] || ", ""),
        ("min((int)list[q], names[list[q]] & INDEX) < min(i, j)", "list[q] < i"),
        ("& (int)mask);", ");"),
        ("names[j] = (Place)i;", ";"),
        # What the result remembers.
        ("bits < NOBODY ? (int)index : NONE", "(int)index"),
        ("!chooses ? remembered[i] : ", ""),
        ("known < 0 ? -1 : place_of(known)", "known"),
    ]),
    f"matching.cu by {_PEERS}": (_match_together, [
        # A peer that is a turn ahead; what all must know, and what one alone.
        ("turn ^= TURN;", ";"),
        ("named & NAMES ? lane == peer : lane < PEERS", "lane == peer"),
        ("tell(nearest + i, 0,", "tell(nearest + i, peer,"),
    ]),
}  # fmt: skip


def noticed(run: Callable[[EmulatedDevice], list[Any]], expected: list[Any], seconds: float, **mistake: Any) -> bool:
    """Whether a kernel with a mistake gives another result, or none, in some order of its threads."""
    child = os.fork()
    if child == 0:
        os.close(2)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            for seed in SEEDS:
                got = run(EmulatedDevice(seed=seed, **mistake))
                # Equal to the last bit: sums are taken in one order, whatever the order of the threads.
                if not all(np.array_equal(a, b, equal_nan=True) for a, b in zip(got, expected, strict=True)):
                    os._exit(1)
        except BaseException:  # whatever a broken kernel leads to; and nothing of this process is cleaned up
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] != 0


def main() -> None:
    """Print, as JSON, for each file the mistakes and whether each was noticed."""
    report = {}
    for module, run in cases():
        expected, begin = run(EmulatedDevice(seed=0)), time.process_time()
        for seed in SEEDS:
            again = run(EmulatedDevice(seed=seed))
            assert all(np.array_equal(a, b) for a, b in zip(again, expected, strict=True)), (module.file, seed)
        seconds = max(_SECONDS, _TIMES * (time.process_time() - begin))
        source = module.source()
        lines = source.splitlines()
        peers = dict(module.constants).get("PEERS", 1)
        name = module.file if peers == 1 else f"{module.file} by {peers}"
        report[name] = {
            f"{line}: {lines[line - 1].strip()}": noticed(run, expected, seconds, removed=line)
            for line in barriers(module)
        }
        run, mistakes = WRONG.get(name, (run, []))
        expected = run(EmulatedDevice(seed=0))
        for right, wrong in mistakes:
            assert source.count(right) == 1, right
            report[name][f"{right} as {wrong}"] = noticed(run, expected, seconds, edit=(right, wrong))
    json.dump(report, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
