"""Kernels with a mistake each: `python -m cuda_emulation.mutants` prints which were noticed.

Every barrier is left out in turn, and statements that are easily got wrong are replaced. Each mistake runs in a
process, since a kernel without a barrier may write anywhere or never end.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from subgen_cupy import absorb, append, attend, leaders, merging
from subgen_cupy.launch import Module

from subgen._tree import leaves
from subgen.default.absorb import AbsorbOptions, Tokens
from subgen.default.quantization import draw_dithers
from subgen.default.state import BufferOwner, Clusters, Exact, Quantized, State

from . import EmulatedDevice, barriers

__all__ = ["main"]

SEEDS = range(1, 9)
# A kernel that never ends is stopped after so many seconds, or so many times what a kernel without a mistake takes.
_SECONDS, _TIMES = 20.0, 3.0
_PEERS = 2


def _attend(device: EmulatedDevice) -> list[Any]:
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, n, 64)).astype(np.float32) for n in (4, 80, 80))
    counts, variance = rng.integers(1, 4, size=(2, 40)), rng.random((2, 40, 4)).astype(np.float32)
    clusters = Clusters(k[:, :40], v[:, :40], counts, variance, variance)
    return list(attend.attention(device, q * 0.1, k[:, 40:], v[:, 40:], clusters))


def _append(device: EmulatedDevice) -> list[Any]:
    """Tokens at places that arguments and memory give; numbers overflow if they are not scaled; queries of a block."""
    rng = np.random.default_rng(0)
    results = []
    for n_exact, counted in [(1, False), (2, False), (5, True), (1, True)]:
        keys, values = rng.normal(size=(2, 2, 50, 64)).astype(np.float16)
        counts, variance = rng.integers(1, 4, size=(2, 40)), rng.random((2, 40, 4)).astype(np.float16)
        clusters = Clusters(keys[:, :40].copy(), values[:, :40].copy(), counts, variance, variance)
        codes = Quantized(np.zeros((2, 10, 64), np.int8), np.zeros((2, 10), np.float32))
        exact = Exact(keys[:, 40:].copy(), values[:, 40:].copy(), codes, n_exact, BufferOwner(n_exact))
        counters = None
        if counted:
            counters = np.zeros(2, np.int64)
            append.count_tokens(device, counters, n_exact, n_exact + 41)
        token = [rng.normal(size=(2, n, 64)).astype(np.float16) for n in (3, 1, 1)]
        token[2][0, 0, 0] = 65504.0
        token[0][0, 0], token[1][0] = 50.0, 50.0
        state = State(clusters, exact, None, n_exact + 41)
        outputs = append.decode_token(device, state, *token, 0.1, counters)
        results += [exact.keys, exact.values, codes.codes, codes.scales, outputs]
    queries = append.quantize(device, rng.normal(size=(6, 5, 40)).astype(np.float16), 3, 0.3, 1)
    return [*results, queries.codes, queries.scales]


def _lead(device: EmulatedDevice) -> list[Any]:
    rng = np.random.default_rng(0)
    keys, centres = (rng.integers(-4, 5, size=(2, n, 40)).astype(np.float32) for n in (70, 70))
    return list(leaders.leaders(device, keys, centres, np.array([3, 70]), 20.0))


def _merge(device: EmulatedDevice) -> list[Any]:
    rng = np.random.default_rng(0)
    keys, values = rng.normal(size=(2, 3, 90, 40)).astype(np.float32)
    values = values[..., :24]  # an odd number of chunks in all
    counts, importance = rng.integers(1, 5, size=(3, 90)), rng.random((3, 90)).astype(np.float32)
    variance = rng.random((3, 90, 4)).astype(np.float32)
    clusters = Clusters(keys, values, counts, variance, importance)
    scale = np.ones(3, np.float32)
    metric = np.tile(np.diag(np.arange(1, 41, dtype=np.float32)), (3, 1, 1)) + 0.5
    merged, assignment = merging.shrink(device, clusters, metric, scale, 50, 50)
    costs = merging.ward_costs(device, clusters, metric, scale)
    return [costs, merged.keys, merged.values, merged.counts, merged.key_variance, merged.importance, assignment]


def _merge_cached(device: EmulatedDevice) -> list[Any]:
    """Streams: enough are new; nothing has to merge; all have the same neighbour; a few less than enough are new."""
    rng = np.random.default_rng(0)
    keys, values = rng.normal(size=(2, 4, 90, 8)).astype(np.float32)
    counts, importance = rng.integers(1, 5, size=(4, 90)), rng.random((4, 90)).astype(np.float32)
    counts[0, :9] = counts[0, 58:84] = counts[1, 60:] = counts[1, 7:40:3] = counts[3, 60:] = 0
    cached = np.tile((np.arange(90, dtype=np.int32) + 7) % 60, (4, 1))
    cached[0, 30:], cached[0, 40:45] = np.arange(23, 83), -1
    cached[:2, 60:], cached[2], cached[2, 3], cached[3, :15] = -1, 3, 7, -1
    cached = np.where((counts > 0) & (np.take_along_axis(counts, cached, axis=1) > 0), cached, -1)
    clusters = Clusters(keys, values, counts, np.zeros((4, 90, 4), np.float32), importance, nearest=cached)
    merged, assignment = merging.shrink(device, clusters, None, np.ones(4, np.float32), 50, 55)
    return [merged.keys, merged.counts, merged.nearest, assignment]


def _merge_all(device: EmulatedDevice) -> list[Any]:
    """Also costs of more than one tile of pairs."""
    rng = np.random.default_rng(1)
    keys, counts = rng.normal(size=(1, 140, 8)).astype(np.float32), np.ones((1, 140), np.int64)
    clusters = Clusters(keys, keys, counts, np.zeros((1, 140, 4), np.float32), np.ones((1, 140), np.float32))
    costs = merging.ward_costs(device, clusters, None, np.ones(1, np.float32))
    return [costs, *_merge(device), *_merge_cached(device)]


def _match(device: EmulatedDevice) -> list[Any]:
    """Also streams of several tiles: some are nearest to many; all have neighbours; many costs are equal, or all."""
    rng = np.random.default_rng(0)
    keys, values = rng.normal(size=(2, 3, 150, 8)).astype(np.float32)
    keys[0, ::9] *= 0.1
    keys[2], values[2] = rng.integers(-1, 2, size=(150, 8)) * (np.arange(8) < 1), 0.0
    counts, importance = np.ones((3, 150), np.int64), (0.1 + rng.random((3, 150))).astype(np.float32)
    importance[2] = 1.0
    nearest = np.full((3, 150), -1, np.int32)
    nearest[1] = (np.arange(150) + 7) % 150
    clusters = Clusters(keys, values, counts, np.zeros((3, 150, 4), np.float32), importance, nearest=nearest)
    merged, assignment = merging.shrink(device, clusters, None, np.ones(3, np.float32), 90, 90)
    # Costs that are all equal, in any order of importance; one cluster can merge with no other.
    costs = np.ones((1, 128, 128), np.float32)
    index = np.arange(120)
    costs[:, index, index[::-1]] = 0.0
    costs[:, index, index] = costs[:, 7] = costs[:, :, 7] = np.inf
    known = np.ones((1, 120), np.int64), rng.random((1, 120)).astype(np.float32), np.full((1, 120), -1, np.int32)
    matched = merging.match(device, costs, *known, 100, 120, np.zeros((1, 120), np.int64), True)
    # As many others, of four costs.
    few = np.triu(rng.integers(1, 5, size=(128, 128)), 1).astype(np.float32)
    few = (few + few.T)[None]
    few[:, np.arange(128), np.arange(128)] = np.inf
    chosen = merging.match(device, few, *known, 70, 120, np.zeros((1, 120), np.int64), True)
    return [*_merge_cached(device), merged.counts, merged.nearest, assignment, *matched, *chosen]


def _match_together(device: EmulatedDevice) -> list[Any]:
    """Two blocks a stream."""
    merging._PEERS, merging._FEW_CLUSTERS = _PEERS, 1
    return _match(replace(device, clusters=True))


def _absorb(device: EmulatedDevice) -> list[Any]:
    """Also a refresh; of three streams one has queries, one has none, and one has none and keys of zero."""
    rng = np.random.default_rng(0)
    keys, values = rng.normal(size=(2, 3, 160, 40)).astype(np.float32)
    keys[2, 50:] = 0.0
    counts, variance = rng.integers(1, 5, size=(3, 50)), rng.random((3, 50, 4)).astype(np.float32)
    clusters = Clusters(keys[:, :50], values[:, :50], counts, variance, rng.random((3, 50)).astype(np.float32))
    clusters = replace(clusters, nearest=rng.integers(-1, 50, size=(3, 50)).astype(np.int32))
    scales = rng.random((3, 160)).astype(np.float32) * (rng.random((3, 160)) < 0.7)
    scales[1:, 10:] = 0.0
    codes = rng.integers(-127, 128, size=(3, 160, 40)).astype(np.int8)
    exact = Exact(keys, values, Quantized(codes, scales.astype(np.float32)), 160, BufferOwner(160))
    options = AbsorbOptions(10, 30, 1.0, None, None, draw_dithers(0, [9])[0])
    results: list[Any] = []
    for refresh in (False, True):
        refreshed = replace(options, refresh=refresh)
        pool, unit = absorb.gather(device, clusters, keys[:, 80:], values[:, 80:], refreshed)
        results += [*_arrays(pool), unit]
    zeroed = replace(exact, keys=keys * np.float32([1, 1, 0])[:, None, None])
    results.append(absorb.query_moment(device, zeroed, 10, None))
    new = absorb.new_arrays(device, clusters, exact, False)
    absorb.store(device, new, clusters, exact, options)
    return [*results, *_arrays(new[0]), *_arrays(new[1])]


def _absorb_blocks(device: EmulatedDevice) -> list[Any]:
    """Steps of a long block, with queries and without, in 16 bits and with int8 means: numbers are in memory."""
    rng = np.random.default_rng(0)
    results: list[Any] = []
    for quantized, with_queries in [(False, True), (True, False)]:
        keys, values = rng.normal(size=(2, 2, 12 + 10 + 20, 8)).astype(np.float16)
        mean = (keys[:, :12], values[:, :12])
        if quantized:
            codes = rng.integers(-127, 128, size=(2, 2, 12, 8)).astype(np.int8)
            mean = tuple(Quantized(x, rng.random((2, 12)).astype(np.float16)) for x in codes)
        arrays = rng.random((2, 12, 4)).astype(np.float16), rng.random((2, 12)).astype(np.float16)
        nearest = np.full((2, 12), -1, np.int32)
        clusters = Clusters(*mean, rng.integers(1, 5, size=(2, 12)), *arrays, nearest=nearest)
        codes, scales = rng.integers(-127, 128, size=(2, 30, 8)).astype(np.int8), rng.random((2, 30), np.float32)
        queries = Quantized(codes[:, :10], scales[:, :10])
        exact = Exact(keys[:, 12:22].copy(), values[:, 12:22].copy(), queries, 10, BufferOwner(10))
        coming = Quantized(codes[:, 10:], scales[:, 10:]) if with_queries else None
        tokens = Tokens(keys[:, 22:], values[:, 22:], coming)
        options = AbsorbOptions(2, 4, 1.0, 12, None, draw_dithers(0, [9])[0])
        dithers = draw_dithers(0, range(5))
        steps = [replace(options, weight=1.0 / (i + 1), dithers=dithers[i], refresh=i == 3) for i in range(5)]
        state = absorb.replay_blocks(device, State(clusters, exact, None, 50), tokens, steps)
        results += _arrays(state)
    return results


def _arrays(tree: Any) -> list[Any]:
    return [x for _, x in leaves(tree)]


def cases() -> Iterator[tuple[Module, Callable[[EmulatedDevice], list[Any]]]]:
    """Yield each module with barriers or wrong statements, and a function that runs all of its kernels."""
    yield absorb.absorb_module("float32"), _absorb
    yield attend.attention_module("float32", "float32", 64, 64, 4, 4), _attend
    yield append.append_module("float16", "float16"), _append
    yield leaders.leaders_module("float32"), _lead
    yield merging.MERGING, _merge
    yield merging.matching_module(1, 4), _match
    yield merging.matching_module(_PEERS, 4), _match_together


def _absorb_all(device: EmulatedDevice) -> list[Any]:
    return [*_absorb(device), *_absorb_blocks(device)]


#: By file, a function that runs its kernels, and statements with wrong ones to replace them.
WRONG: dict[str, tuple[Callable[[EmulatedDevice], list[Any]], list[tuple[str, str]]]] = {
    "absorb.cu": (_absorb_all, [
        ("nearest[place] = compare_all ? -1 : cluster_nearest[cluster];", "nearest[place] = -1;"),
        ("nearest[place] = compare_all ? -1 : cluster_nearest[cluster];", "nearest[place] = cluster_nearest[cluster];"),
        ("nearest[place] = -1;", "nearest[place] = 0;"),
        ("steps[*step * STEP + REFRESH] != 0.0", "refresh"),
        # Which tokens have a query, and the metric of a stream without any.
        ("scales[token] > 0.0f ? 1.0f : 0.0f", "1.0f"),
        ("codes += (stream * places + sink) * head_dim", "codes += stream * places * head_dim"),
        ("scales += stream * places + sink", "scales += stream * places"),
        ("if (n_queries == 0.0f)", "if (false)"),
        ("trace = (float)factor * (trace > 0.0f ? trace : 1.0f)", "trace = (float)factor * trace"),
        ("trace = (float)factor * (trace > 0.0f ? trace : 1.0f)", "trace = trace > 0.0f ? trace : 1.0f"),
        ("keys += stream * key_step;", ";"),
        ("r == c ? trace : 0.0f", "trace"),
        # Which token is copied where.
        ("token < sink ? token : token + n_evicted", "token + n_evicted"),
        ("(from_block && block_codes)", "from_block"),
        ("!behind || (from_block", "(from_block"),
        ("first = *step * n_evicted", "first = 0"),
        ("!has_query ? 0.0f : behind", "behind"),
        ("new_counts[cluster] = counts[cluster]", "new_counts[cluster] = 1"),
        ("new_nearest[cluster] = nearest[cluster]", "new_nearest[cluster] = -1"),
        ("dither_keys = now[DITHER_KEYS]", ""),
        ("dither_values = now[DITHER_VALUES]", ""),
        ("dither_variance = now[DITHER_VARIANCE]", ""),
        ("dither_importance = now[DITHER_IMPORTANCE]", ""),
        ("weight = steps[*step * STEP + WEIGHT]", ""),
        ("*next_step = *step + 1", "*next_step = *step"),
    ]),
    "attend.cu": (_append, [
        ("(int)counters[0] + 1", "(int)counters[0]"),
        ("counters && !merged", "counters"),
        ("counters && !merged", "false"),
        ("upcast(source[i]) * scale * LOG2E", "upcast(source[i]) * LOG2E"),
        ("upcast(source[b * BAND + i]) * scale", "upcast(source[b * BAND + i])"),
        ("saturating_cast(output, outputs", "cast(1.01f * output, outputs"),
    ]),
    "append.cu": (_append, [
        ("n_seen % group", "0"),
        ("stream * capacity + n_exact", "stream * capacity"),
        ("stream * capacity + n_exact", "n_exact"),
        ("codes + to * head_dim, scales + to)", "codes + to * head_dim, scales + stream)"),
        ("upcast(query[d]) * scale; }, head_dim", "upcast(query[d]); }, head_dim"),
        ("upcast(query[d]) * scale; }, dim", "upcast(query[d]); }, dim"),
        ("(first + place) % group", "place % group"),
        ("n_exact = counters[0]", "n_exact = counters[1]"),
        ("n_seen = counters[1]", "n_seen = counters[0]"),
    ]),
    "merge.cu": (_merge_all, [
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
    "match.cu": (_match, [
        ("compare_all ? 0x7fffffffu : 0xffffffffu", "0x7fffffffu"),
        ("compare_all ? 0x7fffffffu : 0xffffffffu", "0xffffffffu"),
        ("(found >> 16) < 2 * surplus - 1", "(found >> 16) < surplus"),
        # Proposals and blockers.
        ("position > own && cost < bits", "cost < bits"),
        ("(unsigned)position < (unsigned)own && cost", "cost"),
        ("bits + (blocker < nearest)", "bits"),
        ("bits + (blocker < nearest)", "NO_NEIGHBOUR"),
        ("cost < bits + (column < index)", "cost < bits"),
        ("cost < bits + (column < index) && (", "("),
        ("order, -1, line", "order, order[i], line"),
        ("position >= 0 && cost < bits + (", "cost < bits + ("),
        ("Place mine = NONE", "Place mine = 0"),
        ("? PENDING : round) |", "? round : round) |"),
        ("proposal != BLOCKED && order[proposal & INDEX] < 0", "false"),
        ("blocker != NONE && order[blocker] >= 0", "blocker != NONE"),
        ("first_round || must_search(i, order, proposals, blockers)", "first_round"),
        # The pairs of least cost, if there are more than must merge.
        ("pair_cost[q] < pair_cost[p] ||\n", ""),
        ("min((int)list[q], proposals[list[q]] & INDEX) < min(i, j)", "list[q] < i"),
        ("& (int)mask);", ");"),
        ("proposals[j] = (Place)i;", ";"),
        # Cached neighbours of the result.
        ("bits < NO_NEIGHBOUR ? (int)index : NONE", "(int)index"),
        ("!merges ? cached[i] : ", ""),
        ("neighbour < 0 ? -1 : place_of(neighbour)", "neighbour"),
    ]),
    f"match.cu by {_PEERS}": (_match_together, [
        # A peer that is a round ahead; what is written to all peers, and what to the first.
        ("round ^= ROUND;", ";"),
        ("proposal & PENDING ? lane == peer : lane < PEERS", "lane == peer"),
        ("write_to_peer(nearest + i, 0,", "write_to_peer(nearest + i, peer,"),
    ]),
}  # fmt: skip


def noticed(run: Callable[[EmulatedDevice], list[Any]], expected: list[Any], seconds: float, **mistake: Any) -> bool:
    """Whether a kernel with a mistake has another result, or none, in some order of its threads."""
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


def case_name(module: Module) -> str:
    """Name a case: its file, and the blocks of a stream if there are several."""
    peers = dict(module.constants).get("PEERS", 1)
    return module.file if peers == 1 else f"{module.file} by {peers}"


def main(names: list[str]) -> None:
    """Print, as JSON, for each of these cases the mistakes and whether each was noticed."""
    report = {}
    for module, run in cases():
        name = case_name(module)
        if name not in names:
            continue
        expected, begin = run(EmulatedDevice(seed=0)), time.process_time()
        for seed in SEEDS:
            again = run(EmulatedDevice(seed=seed))
            assert all(np.array_equal(a, b) for a, b in zip(again, expected, strict=True)), (module.file, seed)
        seconds = max(_SECONDS, _TIMES * (time.process_time() - begin))
        source = module.source()
        lines = source.splitlines()
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
    main(sys.argv[1:])
