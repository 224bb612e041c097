"""Append tokens in place."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from subgen.default.append import quantize_by_parts
from subgen.default.state import Exact, Quantized, State, reserve

from .rounding import quantize_to_nearest

__all__ = ["append", "quantize_queries"]


def append(state: State, keys: NDArray[Any], values: NDArray[Any], queries: Quantized | None) -> State:
    """Append tokens behind the exact ones; see `subgen.default.append.append`."""
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


def quantize_queries(queries: NDArray[Any], scale: float, n_seen: int, dtype: Any) -> Quantized:
    """Select, scale and round a query of each token; see `subgen.default.append.quantize_queries`."""
    return quantize_by_parts(queries, scale, n_seen, lambda rows: quantize_to_nearest(rows, dtype))
