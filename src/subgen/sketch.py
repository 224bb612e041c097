"""`AttentionSketch`: checks its arguments and holds the current state; everything else is pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ._array import Array, array_namespace, compute_dtype, nbytes, positions
from ._checks import (
    check_alike,
    check_block,
    check_groups,
    check_integer,
    check_real,
    check_scale,
    check_seed,
)
from .backends import operations_for
from .paper import Paper
from .state import PaperState
from .weighted import fold_groups, unfold_groups

__all__ = ["AttentionSketch"]


@dataclass(frozen=True)
class _Layout:
    """What the first update fixed: shapes, library, dtype and device of the stream."""

    leading: tuple[int, ...]
    head_dim: int
    value_dim: int
    example: Array  # an empty array: carries library, dtype and device

    @property
    def kv_heads(self) -> int:
        return self.leading[-1] if self.leading else 1

    @property
    def streams(self) -> int:
        return math.prod(self.leading)

    def flat(self, x: Array) -> Array:
        """``(..., n, dim)`` to ``(streams, n, dim)``."""
        xp = array_namespace(x)
        return xp.reshape(x, (self.streams, *x.shape[-2:]))

    def heads(self) -> Array:
        """Index of each stream along the axis before the tokens: rows of a batch share their draws."""
        return positions(self.streams, self.example) % self.kv_heads


class AttentionSketch:
    """Attention over a stream of tokens from a summary that grows with its clusters, not with its length.

    Made by `AttentionSketch.paper`. The array library, dtype, device and shapes come from the first `update`
    (or `step`); a batch holds any number of independent streams, and a stream's answers depend neither on its
    neighbours in the batch nor on how the tokens were cut into calls.

    Examples
    --------
    >>> import numpy as np, subgen
    >>> rng = np.random.default_rng(0)
    >>> centres = rng.normal(size=(8, 16))
    >>> keys = centres[rng.integers(0, 8, 1000)] + 0.01 * rng.normal(size=(1000, 16))
    >>> values = rng.normal(size=(1000, 16))
    >>> sketch = subgen.AttentionSketch.paper(delta=0.5, samples_per_cluster=8, value_samples=256)
    >>> sketch.update(keys, values)
    >>> sketch.n_seen, int(sketch.n_clusters)
    (1000, 8)
    >>> sketch.attend(keys[:3]).shape
    (3, 16)
    >>> sketch.nbytes < keys.nbytes + values.nbytes
    True
    """

    def __init__(self, method: Paper) -> None:
        self._method = method
        self._layout: _Layout | None = None
        self._state: PaperState | None = None

    @classmethod
    def paper(
        cls,
        *,
        delta: float,
        samples_per_cluster: int,
        value_samples: int,
        scale: float | None = 1.0,
        seed: int = 0,
    ) -> AttentionSketch:
        """Algorithm 1 of SubGen, exactly.

        With queries of norm at most r and (m, delta)-clusterable keys, ``t = Omega(eps^-2 e^(2 delta r) log n)``
        and ``s = Omega(eps^-2 head_dim)`` give ``||z/tau - Attn|| <= eps ||softmax(Kq)||_2 ||V||_op`` with
        probability 0.99, in ``O(head_dim (m t + s))`` memory and time per token (eq. 3).

        Parameters
        ----------
        delta : float
            Radius of a cluster, in the units of the keys: a key joins its nearest cluster if its distance to the
            representative is at most this. At least 0.
        samples_per_cluster : int
            The paper's t: keys sampled uniformly, with replacement, from each cluster. At least 1.
        value_samples : int
            The paper's s: pairs sampled, with replacement, in proportion to ``||v||^2``. At least 1.
        scale : float, optional
            Factor of the logits: 1, as in the paper; ``None`` means ``head_dim ** -0.5``.
        seed : int
            In ``[0, 2**64)``. Equal seeds give equal samples, on every library.

        Returns
        -------
        AttentionSketch

        Raises
        ------
        TypeError, ValueError
            If an argument is not a number within its bounds.

        References
        ----------
        Zandieh, Han, Mirrokni, Karbasi, "SubGen: Token Generation in Sublinear Time and Memory",
        arXiv 2402.06082 (2024), Algorithm 1.
        """
        return cls(
            Paper(
                delta=check_real("delta", delta, minimum=0.0),
                t=check_integer("samples_per_cluster", samples_per_cluster),
                s=check_integer("value_samples", value_samples),
                scale=None if scale is None else check_scale(scale, 1),
                seed=check_seed(seed),
            )
        )

    def __repr__(self) -> str:
        return f"<AttentionSketch {self._method} n_seen={self.n_seen} nbytes={self.nbytes}>"

    @property
    def n_seen(self) -> int:
        """Tokens seen so far, in each stream."""
        return 0 if self._state is None else self._state.n_seen

    @property
    def n_clusters(self) -> Array:
        """Live clusters: int64 array of the shape of the leading axes; the int 0 before the first update."""
        if self._state is None or self._layout is None:
            return 0
        counts = self._method.n_clusters(self._state)
        return array_namespace(counts).reshape(counts, self._layout.leading)

    @property
    def nbytes(self) -> int:
        """Bytes of every array held, padding and bookkeeping included."""
        return 0 if self._state is None else nbytes(self._state)

    @property
    def state(self) -> PaperState | None:
        """The current state, read-only; ``None`` before the first update."""
        return self._state

    def update(self, keys: Array, values: Array, queries: Array | None = None) -> None:
        """Absorb a block of tokens.

        Parameters
        ----------
        keys : array, shape (..., kv_heads, n, head_dim)
        values : array, shape (..., kv_heads, n, value_dim)
            Any ``n`` of at least 1; the shapes, library, dtype and device of the first block hold for all.
        queries : array, shape (..., q_heads, n, head_dim), optional
            The queries of these tokens. Checked, and not used by the paper's algorithm.

        Raises
        ------
        TypeError, ValueError
            As in `attention`, or if the block does not continue the stream. The sketch is then as it was.
        """
        layout = self._check(keys, values, queries)
        ops = operations_for(keys)
        k, v = layout.flat(keys), layout.flat(values)
        state = self._method.init(k, v) if self._state is None else self._state
        state = self._method.update(state, k, v, layout.heads(), ops)
        self._layout, self._state = layout, state

    def attend(self, queries: Array) -> Array:
        """Answer queries from everything seen so far.

        Parameters
        ----------
        queries : array, shape (..., q_heads, m, head_dim)
            ``q_heads`` is a multiple of ``kv_heads``.

        Returns
        -------
        array, shape (..., q_heads, m, value_dim)
            In the dtype of the input. Where the estimate exceeds that dtype it is the largest number of it.

        Raises
        ------
        RuntimeError
            If nothing was seen yet.
        TypeError, ValueError
            As in `attention`.
        """
        if self._state is None or self._layout is None:
            raise RuntimeError("the sketch is empty: call update (or step) with keys and values before attend")
        self._check_queries(queries, self._layout)
        rows = fold_groups(self._scaled(queries), self._layout.kv_heads)
        output = self._method.attend(self._state, rows, operations_for(queries))
        return _narrow(unfold_groups(output, queries.shape), queries)

    def step(self, queries: Array, keys: Array, values: Array) -> Array:
        """Absorb a block and answer the query of each of its tokens: ``update`` and ``attend``, token by token.

        Parameters
        ----------
        queries : array, shape (..., q_heads, n, head_dim)
            Query ``i`` sees everything before the block and tokens ``0 .. i`` of it.
        keys : array, shape (..., kv_heads, n, head_dim)
        values : array, shape (..., kv_heads, n, value_dim)

        Returns
        -------
        array, shape (..., q_heads, n, value_dim)
            In the dtype of the input.

        Raises
        ------
        TypeError, ValueError
            As in `update`, or if there are not as many queries as tokens. The sketch is then as it was.
        """
        layout = self._check(keys, values, queries)
        ops = operations_for(keys)
        xp = array_namespace(keys)
        k, v = layout.flat(keys), layout.flat(values)
        rows = fold_groups(self._scaled(queries), layout.kv_heads)
        rows = xp.reshape(rows, (layout.streams, -1, *queries.shape[-2:]))
        state = self._method.init(k, v) if self._state is None else self._state
        state, output = self._method.step(state, rows, k, v, layout.heads(), ops)
        output = _narrow(unfold_groups(output, queries.shape), queries)
        self._layout, self._state = layout, state
        return output

    def _scaled(self, queries: Array) -> Array:
        xp = array_namespace(queries)
        scale = check_scale(self._method.scale, queries.shape[-1])
        return xp.astype(queries, compute_dtype(queries), copy=False) * scale

    def _check(self, keys: Any, values: Any, queries: Any) -> _Layout:
        """Check a block against itself and against the stream, and return the layout; changes nothing."""
        check_block(keys, values)
        layout = self._layout
        if layout is None:
            example = keys[..., :0, :]
            layout = _Layout(tuple(keys.shape[:-2]), keys.shape[-1], values.shape[-1], example)
        else:
            expected = (*layout.leading, keys.shape[-2], layout.head_dim)
            expected_values = (*expected[:-1], layout.value_dim)
            if tuple(keys.shape) != expected or tuple(values.shape) != expected_values:
                raise ValueError(
                    f"the stream has keys {(*layout.leading, 'n', layout.head_dim)} and values "
                    f"{(*layout.leading, 'n', layout.value_dim)}: got {tuple(keys.shape)} and "
                    f"{tuple(values.shape)}; pass blocks of these shapes, or start another sketch"
                )
            check_alike("keys", keys, "the stream so far", layout.example)
        if queries is not None:
            check_groups(queries, keys)
            if queries.shape[-2] != keys.shape[-2]:
                raise ValueError(
                    f"every token has one query: got {queries.shape[-2]} queries for {keys.shape[-2]} keys; "
                    f"use attend for queries without tokens"
                )
        return layout

    def _check_queries(self, queries: Any, layout: _Layout) -> None:
        shape = (*layout.leading, self.n_seen, layout.head_dim)
        check_groups(queries, layout.example, "the stream's keys", shape)


def _narrow(output: Array, like: Array) -> Array:
    """Cast to the dtype of the input, saturating: float16 ends at 65504."""
    xp = array_namespace(like)
    if output.dtype == like.dtype:
        return output
    largest = float(xp.finfo(like.dtype).max)
    return xp.astype(xp.clip(output, -largest, largest), like.dtype)
