"""`merge`: the sketch of one stream after another, from the sketches of the two."""

from __future__ import annotations

from dataclasses import fields
from functools import reduce
from itertools import accumulate
from typing import Any

from ._checks import check_alike, check_length
from ._inputs import autocast_off, outside_modes
from .default import shards as default
from .default.algorithm import ClusterMeans
from .default.state import State
from .layout import Layout
from .paper import shards as paper
from .paper.algorithm import Algorithm1
from .paper.state import PaperState
from .sketch import AttentionSketch

__all__ = ["merge"]


@outside_modes
def merge(*sketches: AttentionSketch) -> AttentionSketch:
    """Return the sketch of one stream after another: of a context that was sketched in shards.

    The result is a sketch like any other, of the parameters of the first: it goes on, is saved, or is merged again. The
    given sketches are unchanged. More than two are merged from left to right.

    **The default.** Sinks are those of the first, the window is that of the second; all between becomes clusters, which
    merge by closest pairs down to the budget for the joined length. A stream that is all exact, with no cluster yet, is
    appended token by token: the result is that of one pass bit for bit if no token came with queries, or with one query
    head for each key-value head. (The heads of a group take turns from each stream's beginning.) Otherwise results
    differ from one pass, and from each other by the order of merging; errors are alike (docs/howto/merge.md).

    **The paper's algorithm.** Clusters whose representative lies within ``delta`` of one before join it whole, others
    open: at most m on (m, delta)-clusterable keys, and members lie within ``2 delta`` of their representative if shards
    are merged from left to right. Samples are distributed as in one pass, whatever the order of merging.

    **Seeds.** The result goes on with the seed of the first. Give every shard its own, for example its rank. With equal
    seeds each slot still holds every token with the right probability, and the slots of one cluster, of the values and
    of ``residual_samples`` are independent of each other; all that may then be correlated are slots of one number in
    *different* clusters of the paper's algorithm. Its estimates stay unbiased and the theorem's bounds are the same,
    since they average over the numbers of slots, and these are independent.

    Parameters
    ----------
    *sketches : AttentionSketch
        At least two, in the order of their tokens; alike in everything but ``seed`` and ``check_finite``, and in
        leading axes, dimensions, library, dtype and device. Empty ones are skipped.

    Returns
    -------
    AttentionSketch

    Raises
    ------
    TypeError
        If one is not a sketch, there are fewer than two, or arrays are of another library, dtype or device.
    ValueError
        If they differ in method, parameters or shapes.
    OverflowError
        If they have seen more than ``2**62 - 1`` tokens together, more than a sketch counts.

    Examples
    --------
    >>> import numpy as np, subgen
    >>> rng = np.random.default_rng(0)
    >>> keys, values, queries = rng.normal(size=(3, 2, 3000, 16))
    >>> shards = [subgen.AttentionSketch(64, window=32, seed=rank) for rank in range(3)]
    >>> for rank, shard in enumerate(shards):
    ...     part = slice(1000 * rank, 1000 * rank + 1000)
    ...     shard.update(keys[:, part], values[:, part], queries=queries[:, part])
    >>> merged = subgen.merge(*shards)
    >>> merged.n_seen, merged.n_clusters.tolist(), merged.nbytes == shards[0].nbytes
    (3000, [64, 64], True)
    """
    for place, sketch in enumerate(sketches, start=1):
        if not isinstance(sketch, AttentionSketch):
            raise TypeError(
                f"merge takes sketches, got {type(sketch).__name__} as argument {place}; pass AttentionSketch objects, "
                f"merge(*sketches) for a list of them"
            )
    if len(sketches) < 2:
        raise TypeError(f"merge takes at least two sketches, got {len(sketches)}; a single one is what it is")
    first = sketches[0]
    # All are checked before any is merged.
    filled = next((sketch.layout for sketch in sketches if sketch.layout is not None), None)
    for place, sketch in enumerate(sketches[1:], start=2):
        _check_method(first.method, sketch.method, place)
        if filled is not None and sketch.layout is not None:
            _check_layout(filled, sketch.layout, place)
    for place, length in enumerate(accumulate(sketch.n_seen for sketch in sketches[:-1]), start=1):
        check_length(length, sketches[place].n_seen)
    with autocast_off(None if filled is None else filled.example):
        return reduce(_merge, sketches)


def _check_method(expected: Any, method: Any, place: int) -> None:
    names = {ClusterMeans: "the default sketch", Algorithm1: "the paper's algorithm"}
    if type(method) is not type(expected):
        raise ValueError(
            f"only sketches of one kind merge: argument 1 is {names[type(expected)]}, argument {place} "
            f"{names[type(method)]}; sketch every shard alike"
        )
    for field in fields(expected):
        mine, other = getattr(expected, field.name), getattr(method, field.name)
        if field.name != "seed" and mine != other:
            name = {"t": "samples_per_cluster", "s": "value_samples"}.get(field.name, field.name)
            raise ValueError(
                f"sketches that merge have the same parameters but for the seed: {name} is {mine} in argument 1 and "
                f"{other} in argument {place}; sketch every shard alike"
            )


def _check_layout(expected: Layout, layout: Layout, place: int) -> None:
    shapes = [(*x.leading, "n", dim) for x in (expected, layout) for dim in (x.head_dim, x.value_dim)]
    if shapes[:2] != shapes[2:]:
        raise ValueError(
            f"sketches that merge are of the same streams: the first have keys {shapes[0]} and values {shapes[1]}, "
            f"argument {place} has keys {shapes[2]} and values {shapes[3]}; merge shards of one context"
        )
    check_alike(f"argument {place}", layout.example, "the first", expected.example)


def _merge(first: AttentionSketch, second: AttentionSketch) -> AttentionSketch:
    layout, a, b = first.layout, first.state, second.state
    if b is None:
        return first.continued(layout, a)
    if layout is None or a is None:
        return first.continued(second.layout, b)
    method = first.method
    state: State | PaperState
    if isinstance(method, Algorithm1) and isinstance(a, PaperState) and isinstance(b, PaperState):
        state = paper.merge_states(method, a, b, layout.heads)
    elif isinstance(method, ClusterMeans) and isinstance(a, State) and isinstance(b, State):
        state = default.merge_states(method, a, b, layout.heads)
    else:
        raise TypeError(f"cannot merge sketches by {type(method).__name__}")
    return first.continued(layout, state)
