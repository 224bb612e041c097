"""Append tokens to the exact ones, each with one of its queries in int8."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from .._array import Array, array_namespace, pieces, positions
from .._tree import concat, tree_map
from ..backends import operation
from ..softmax import scaled
from .quantization import quantize
from .state import BufferOwner, Exact, Quantized, State, reserve

__all__ = ["append", "append_in_place", "no_queries", "quantize_by_parts", "quantize_queries"]


@operation
def append(state: State, keys: Array, values: Array, queries: Quantized | None) -> State:
    """Append tokens behind the exact ones.

    Parameters
    ----------
    state : State
        With free space for them.
    keys, values : array, shape (streams, n, dim)
        In the dtype of the state.
    queries : Quantized, shape (streams, n, head_dim), or None
        One query of each token; ``None`` stores zeros.

    Returns
    -------
    State
        A backend may write in place, once `subgen.default.state.reserve` has claimed the space.
    """
    xp, exact, n = array_namespace(keys), state.exact, keys.shape[1]

    def written(x: Array, block: Array) -> Array:
        return xp.concat([x[:, : exact.n, ...], block, x[:, exact.n + n :, ...]], axis=1)

    if queries is None:
        queries = no_queries(keys, exact.queries)
    after = replace(
        exact,
        keys=written(exact.keys, keys),
        values=written(exact.values, values),
        queries=tree_map(written, exact.queries, queries),
        n=exact.n + n,
        owner=BufferOwner(exact.n + n),
    )
    return replace(state, exact=after, n_seen=state.n_seen + n)


def append_in_place(state: State, keys: Array, values: Array, queries: Quantized | None) -> State:
    """Do what `append` does, for arrays that can be written to: a copy only where another state owns the space."""
    n = keys.shape[1]
    state = reserve(state, n)
    exact = state.exact
    part = slice(exact.n, exact.n + n)
    exact.keys[:, part], exact.values[:, part] = keys, values
    codes, scales = (0, 0) if queries is None else (queries.codes, queries.scales)
    exact.queries.codes[:, part], exact.queries.scales[:, part] = codes, scales
    # By position: `dataclasses.replace` takes longer than the token.
    after = Exact(exact.keys, exact.values, exact.queries, exact.n + n, exact.owner)
    return State(state.clusters, after, state.residual, state.n_seen + n)


def no_queries(keys: Array, like: Quantized) -> Quantized:
    """Return the int8 queries of tokens that come without one: zeros, in the dtypes of others."""
    xp = array_namespace(keys)
    return Quantized(
        xp.zeros(keys.shape, dtype=like.codes.dtype, device=keys.device),
        xp.zeros(keys.shape[:2], dtype=like.scales.dtype, device=keys.device),
    )


@operation
def quantize_queries(queries: Array, scale: float, n_seen: int, dtype: object) -> Quantized:
    """Select one query of each token, scale it and round it to int8; the query heads of a group take turns.

    Parameters
    ----------
    queries : array, shape (streams, group, n, head_dim)
        As they came.
    scale : float
        Softmax scale.
    n_seen : int
        Tokens before the first of these: token ``t`` of the stream keeps the query of head ``t % group``.
    dtype : floating dtype
        Of the scales of the codes.

    Returns
    -------
    Quantized, shape (streams, n, head_dim)
    """
    return quantize_by_parts(queries, scale, n_seen, lambda rows: quantize(rows, dtype))


def quantize_by_parts(queries: Array, scale: float, n_seen: int, rounded: Callable[[Array], Quantized]) -> Quantized:
    """Select and scale a query of each token and round it by a function, which takes ``(streams, n, head_dim)``.

    Some tokens at a time: that bounds the memory of the scaled queries.
    """
    streams, _, n, head_dim = queries.shape
    parts = pieces(n, streams * head_dim, queries)
    some = [rounded(scaled(_one_head(queries[:, :, part, :], n_seen + part.start), scale)) for part in parts]
    return concat(some, axis=1)


def _one_head(queries: Array, first: int) -> Array:
    """Take one head of the group for each token: ``(streams, group, n, head_dim)`` to ``(streams, n, head_dim)``."""
    xp = array_namespace(queries)
    _, group, n, _ = queries.shape
    if group == 1 or n == 1:  # a single token is a slice, without a gather
        return queries[:, first % group, :, :]
    head = (positions(n, queries) + first) % group
    return xp.take_along_axis(queries, head[None, None, :, None], axis=1)[:, 0, :, :]
