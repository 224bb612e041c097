"""Sketches of Dask arrays: a shard to each chunk of tokens, merged in a tree where the data is.

Data flow::

    keys, values, queries, chunked along the tokens
        chunk 0 -> sketch ─┐
        chunk 1 -> sketch ─┴ merge ─┐
        chunk 2 -> sketch ─┐        ├ merge -> the sketch of all
        chunk 3 -> sketch ─┴ merge ─┘

Only sketches travel between workers. Every task is a pure function of its chunk and its number: one that is run again,
because its worker died, gives the same bytes.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ._array import Array
from .shards import merge
from .sketch import AttentionSketch

if TYPE_CHECKING:
    from dask.array import Array as DaskArray
    from dask.delayed import Delayed

__all__ = ["sketch"]


def sketch(
    keys: DaskArray, values: DaskArray, queries: DaskArray | None = None, *, template: AttentionSketch
) -> Delayed:
    """Sketch tokens that lie in the chunks of Dask arrays, on whatever runs the graph.

    Parameters
    ----------
    keys : dask.array.Array, shape (..., n, head_dim)
        Chunked along the tokens, of any sizes. Along other axes chunks are joined.
    values : dask.array.Array, shape (..., n, value_dim)
    queries : dask.array.Array, shape (..., q_heads, n, head_dim), optional
        As in `subgen.AttentionSketch.update`. Values and queries are rechunked where they differ from the keys.
    template : AttentionSketch
        An empty sketch, whose present parameters all shards get. The shard at place i has its seed plus i.

    Returns
    -------
    dask.delayed.Delayed
        Its ``compute()`` gives a `subgen.AttentionSketch`. The dashboard shows tasks named ``sketch_chunk`` and
        ``merge_sketches``.

    Raises
    ------
    ImportError
        If Dask is not installed.
    TypeError
        If an argument is not a Dask array, or the template not a sketch.
    ValueError
        If the template is not empty, numbers of tokens differ, chunk sizes are unknown, or there are no tokens.

    Notes
    -----
    Merging pairs of neighbours needs a logarithmic number of rounds. See `subgen.merge` for how a merged sketch differs
    from one pass: with ``AttentionSketch.paper`` members lie within ``delta`` of their representative in one chunk, and
    within another ``delta`` for each round.

    Examples
    --------
    >>> import dask.array as da, numpy as np, subgen, subgen.dask
    >>> rng = np.random.default_rng(0)
    >>> keys, values = (da.from_array(x, chunks=(2, 500, 16)) for x in rng.normal(size=(2, 2, 2000, 16)))
    >>> template = subgen.AttentionSketch(max_clusters=64, window=32)
    >>> subgen.dask.sketch(keys, values, template=template).compute().n_seen
    2000
    """
    try:
        from dask.delayed import delayed
    except ImportError as error:
        raise ImportError("subgen.dask needs Dask: pip install 'subgen-attention[dask]'") from error
    if not isinstance(template, AttentionSketch):
        raise TypeError(f"template is an empty AttentionSketch, got {type(template).__name__}")
    if template.n_seen:
        raise ValueError(
            f"template has seen {template.n_seen} tokens, and every shard would begin with them: pass an empty sketch "
            f"and merge the result behind this one"
        )
    _check("keys", keys)
    tokens = keys.chunks[-2]
    if not sum(tokens):
        raise ValueError(f"keys have no tokens: shape {keys.shape}")
    # Keys first: errors compare the others with them.
    columns: list[list[Delayed | None]] = [_by_tokens(keys, tokens)]
    for name, x in (("values", values), ("queries", queries)):
        if x is None:
            columns.append([None] * len(columns[0]))
            continue
        _check(name, x)
        if x.shape[-2] != keys.shape[-2]:
            raise ValueError(
                f"{name} are of {x.shape[-2]} tokens and keys of {keys.shape[-2]}: shapes {x.shape}, {keys.shape}"
            )
        columns.append(_by_tokens(x, tokens))
    # As it is now: the graph is computed later, and the template may have seen tokens by then.
    template = copy.copy(template)
    filled, joined = delayed(sketch_chunk, pure=True), delayed(merge_sketches, pure=True)
    level: list[Delayed] = [filled(template, place, *blocks) for place, blocks in enumerate(zip(*columns, strict=True))]
    while len(level) > 1:
        pairs = [level[i : i + 2] for i in range(0, len(level), 2)]
        level = [joined(*pair) if len(pair) > 1 else pair[0] for pair in pairs]
    return level[0]


def sketch_chunk(
    template: AttentionSketch, place: int, keys: Array, values: Array, queries: Array | None
) -> AttentionSketch:
    """Sketch one chunk: a task of the graph."""
    shard = copy.copy(template)
    shard._method = replace(shard._method, seed=(shard._method.seed + place) % 2**64)
    if keys.shape[-2]:  # a filter may leave chunks empty
        shard.update(keys, values, queries=queries)
    return shard


def merge_sketches(first: AttentionSketch, second: AttentionSketch) -> AttentionSketch:
    """Merge the sketches of neighbours: a task of the graph."""
    return merge(first, second)


def _check(name: str, x: Any) -> None:
    import dask.array

    if not isinstance(x, dask.array.Array):
        raise TypeError(
            f"{name} are a dask.array.Array, got {type(x).__module__}.{type(x).__name__}: wrap them by "
            f"dask.array.from_array, or call AttentionSketch.update on arrays in memory"
        )
    if x.ndim < 2:
        raise ValueError(f"{name} have shape (..., n, head_dim), got {x.shape}")
    if any(math.isnan(size) for size in x.shape):
        raise ValueError(f"chunk sizes of {name} are unknown, shape {x.shape}: call their compute_chunk_sizes() first")


def _by_tokens(x: Any, tokens: tuple[int, ...]) -> list[Any]:
    """Return the blocks of tokens, whole along all other axes."""
    return list(x.rechunk({**dict.fromkeys(range(x.ndim), -1), x.ndim - 2: tokens}).to_delayed().reshape(-1))
