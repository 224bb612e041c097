"""`AttentionSketch`: checks its arguments and holds the current state; everything else is pure functions."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

from ._array import Array, array_namespace, concat, library_name, narrow, nbytes, positions
from ._checks import (
    check_alike,
    check_block,
    check_choice,
    check_flag,
    check_groups,
    check_integer,
    check_length,
    check_real,
    check_scale,
    check_seed,
)
from ._inputs import namespace_of, outside_modes
from ._memory import pieces
from .backends import operations_for
from .budget import Power, check_budget
from .means import ClusterMeans, MeansState, Storage
from .method import Method
from .paper import Paper
from .state import PaperState
from .tail import Tail
from .weighted import fold_groups, scaled, unfold_groups

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["AttentionSketch", "Checked", "Layout"]

# Places that arrays are made for.
_MOST = 2**31 - 1


@dataclass(frozen=True)
class Layout:
    """What the first update fixed: shapes, library, dtype and device of the stream."""

    leading: tuple[int, ...]
    head_dim: int
    value_dim: int
    example: Array  # an empty array: carries library, dtype and device

    @property
    def kv_heads(self) -> int:
        """Streams along the axis before the tokens."""
        return self.leading[-1] if self.leading else 1

    @property
    def streams(self) -> int:
        """Streams along all leading axes."""
        return math.prod(self.leading)

    def flat(self, x: Array) -> Array:
        """``(..., n, dim)`` to ``(streams, n, dim)``."""
        xp = array_namespace(x)
        return xp.reshape(x, (self.streams, *x.shape[-2:]))

    @cached_property
    def heads(self) -> Array:
        """Index of each stream along the axis before the tokens: rows of a batch share their draws."""
        return positions(self.streams, self.example) % self.kv_heads


class Checked(NamedTuple):
    """A block that passed the checks.

    Attributes
    ----------
    layout : Layout
        Of the stream, or what it would be if the block came first.
    keys, values : array
        As they are computed with: native-endian, strided, detached.
    queries : array or None
    """

    layout: Layout
    keys: Array
    values: Array
    queries: Any


class AttentionSketch:
    """Attention over a stream of tokens from a summary that grows with its clusters, not with its length.

    The first ``sink`` tokens and the last ``window`` are kept exactly. All others are clusters, each held as its mean
    key and mean value; when there are more than the budget, the closest pairs merge. Closeness is measured in
    logits of recent queries and in values, and unusual keys merge last. For the algorithm of the paper, see
    `AttentionSketch.paper`.

    The array library, dtype, device and shapes come from the first `update` (or `step`); a batch holds any number of
    independent streams, and a stream's answers depend neither on its neighbours in the batch nor on how the tokens
    were cut into calls.

    Parameters
    ----------
    max_clusters : int or Power, optional
        Clusters held for each stream; memory is fixed once they are reached. With ``sink`` and ``window`` it makes
        the number of pairs a query is answered from. At least 1. A `subgen.Power` lets the number grow with the
        stream, as ``subgen.Power(8, 0.5)``. 1024, if nothing else bounds the sketch; one of ``max_clusters``,
        ``max_bytes`` and ``compression_ratio`` may be given.
    delta : float, optional
        Threshold mode: the radius of a cluster, in the units of the keys. A token joins the cluster of the nearest
        leader within ``delta``, or opens a new one, as in the paper; the number of clusters grows with the data, and
        is at most m for (m, delta)-clusterable keys. With a budget too, closest pairs merge beyond it.
    max_bytes : int, optional
        Bytes of the whole sketch, all streams together: as many clusters as fit.
    compression_ratio : float, optional
        Share of the bytes of an exact cache to *remove*, 0 to 1: 0.75 keeps a quarter, at any length of the stream,
        once that is more than the sinks and twice the window.
    window : int
        Most recent tokens kept exactly: when there are this many and another comes, the older half joins the
        clusters. At least 2.
    sink : int
        First tokens kept exactly. At least 0.
    scale : float, optional
        Factor of the logits; ``None`` means ``head_dim ** -0.5``.
    storage : {"input", "int8"}
        What the means of clusters are held in: the dtype of the input, or 8 bits with one scale for each vector:
        nearly twice the clusters of 16-bit input in the same bytes. Sinks and window stay exact.
    residual_samples : int
        Tokens sampled for the corrected estimator of ``attend(return_error=True)``; 0 keeps none.
    check_finite : bool
        Whether `update`, `step` and `attend` look for NaN and infinity. Looking waits for the device.
    seed : int
        In ``[0, 2**64)``; for the rounding of means to 16 and 8 bits, and for the residual sample. Equal seeds give
        equal sketches.

    Raises
    ------
    TypeError, ValueError
        If an argument is not a number within its bounds, or two budgets are given.

    Examples
    --------
    >>> import numpy as np, subgen
    >>> rng = np.random.default_rng(0)
    >>> keys, values, queries = rng.normal(size=(3, 4, 2000, 16))
    >>> sketch = subgen.AttentionSketch(max_clusters=64, window=32)
    >>> sketch.update(keys, values, queries)
    >>> sketch.attend(queries[:, -3:]).shape
    (4, 3, 16)
    >>> sketch.n_seen, sketch.n_clusters.tolist()
    (2000, [64, 64, 64, 64])
    """

    def __init__(
        self,
        max_clusters: int | Power | None = None,
        *,
        delta: float | None = None,
        max_bytes: int | None = None,
        compression_ratio: float | None = None,
        window: int = 128,
        sink: int = 4,
        scale: float | None = None,
        storage: Storage = "input",
        residual_samples: int = 0,
        check_finite: bool = True,
        seed: int = 0,
    ) -> None:
        delta = None if delta is None else check_real("delta", delta, minimum=0.0)
        check_choice("storage", storage, ("input", "int8"))
        self._start(
            ClusterMeans(
                budget=check_budget(max_clusters, max_bytes, compression_ratio, delta),
                delta=delta,
                window=check_integer("window", window, minimum=2, maximum=_MOST),
                sink=check_integer("sink", sink, minimum=0, maximum=_MOST),
                scale=None if scale is None else check_scale(scale, 1),
                storage=storage,
                residual_samples=check_integer("residual_samples", residual_samples, minimum=0, maximum=_MOST),
                seed=check_seed(seed),
            ),
            check_flag("check_finite", check_finite),
        )

    def _start(self, method: Method, check_finite: bool) -> None:
        self._method = method
        self._finite = check_finite
        self._layout: Layout | None = None
        self._state: MeansState | PaperState | None = None

    @classmethod
    def paper(
        cls,
        *,
        delta: float,
        samples_per_cluster: int,
        value_samples: int,
        scale: float | None = 1.0,
        check_finite: bool = True,
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
        check_finite : bool
            Whether `update`, `step` and `attend` look for NaN and infinity.
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
        """
        sketch = cls.__new__(cls)
        sketch._start(
            Paper(
                delta=check_real("delta", delta, minimum=0.0),
                t=check_integer("samples_per_cluster", samples_per_cluster, maximum=_MOST),
                s=check_integer("value_samples", value_samples, maximum=_MOST),
                scale=None if scale is None else check_scale(scale, 1),
                seed=check_seed(seed),
            ),
            check_flag("check_finite", check_finite),
        )
        return sketch

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
    def state(self) -> MeansState | PaperState | None:
        """The current state, read-only; ``None`` before the first update."""
        return self._state

    @property
    def method(self) -> Method:
        """The parameters, and the functions that go with them."""
        return self._method

    @property
    def check_finite(self) -> bool:
        """Whether NaN and infinity are looked for."""
        return self._finite

    @property
    def layout(self) -> Layout | None:
        """Shapes, library, dtype and device of the stream; ``None`` before the first update."""
        return self._layout

    def resume(self, layout: Layout, state: Any) -> None:
        """Go on from a state of the same method, as `subgen.load` does.

        Raises
        ------
        RuntimeError
            If tokens were seen already.
        """
        if self._state is not None:
            raise RuntimeError("this sketch has seen tokens already; resume with a new one")
        self._layout, self._state = layout, state

    def continued(self, layout: Layout | None, state: Any) -> AttentionSketch:
        """Return a new sketch of the same parameters that goes on from a state; this one is as it was.

        Parameters
        ----------
        layout : Layout or None
        state : MeansState or PaperState or None
            Of this kind of sketch, and nobody else's to write to.

        Returns
        -------
        AttentionSketch
        """
        other = copy.copy(self)
        other._layout, other._state = layout, state
        return other

    def save(self, path: str | Path) -> None:
        """Write the sketch to a file, to go on later with `subgen.load`: exactly, on any library.

        The file appears whole or not at all: after a crash it is the old one, or the new.

        Parameters
        ----------
        path : str or Path
            Ending in ``.safetensors``.

        Raises
        ------
        subgen.files.FileError
            If the ending is another, the file cannot be written, or safetensors is not installed.
        TypeError
            If the path is not a str or a path.

        Notes
        -----
        A new file gets the mode that the umask gives it, and one that is replaced keeps its own. If the path is a link,
        the file that it leads to is replaced.
        """
        from .persist import save

        save(self, path)

    @outside_modes
    def update(self, keys: Array, values: Array, queries: Array | None = None) -> None:
        """Absorb a block of tokens.

        Parameters
        ----------
        keys : array, shape (..., kv_heads, n, head_dim)
        values : array, shape (..., kv_heads, n, value_dim)
            Any ``n`` of at least 1; the shapes, library, dtype and device of the first block hold for all. Big-endian
            arrays are taken in the native byte order, and tensors that require grad without their graph.
        queries : array, shape (..., q_heads, n, head_dim), optional
            The queries of these tokens: they teach which differences of keys matter. Without them keys are compared as
            they are. The paper's algorithm does not use them.

        Raises
        ------
        TypeError, ValueError
            As in `attention`, or if the block does not continue the stream. The sketch is then as it was.
        OverflowError
            If the stream would be longer than ``2**62 - 1`` tokens. The sketch is then unchanged.

        Notes
        -----
        Memory: at most 8 temporary arrays of 2^22 numbers (2^26 on a GPU) and a few copies of the sketch, however long
        the block. When clusters have to merge, the costs of the pairs of one stream take ``4 n^2`` bytes for each
        thread, with n the clusters and half a window (docs/howto/numpy.md).
        """
        layout, keys, values, queries = self.check(keys, values, queries)
        ops = operations_for(keys)
        k, v = layout.flat(keys), layout.flat(values)
        state = self._method.init(k, v) if self._state is None else self._state
        q = None if queries is None else _by_stream(queries, layout)
        state = self._method.update(state, k, v, q, layout.heads, ops)
        self._layout, self._state = layout, state

    @overload
    def attend(self, queries: Array) -> Array: ...

    @overload
    def attend(self, queries: Array, *, return_logsumexp: Literal[True]) -> tuple[Array, Array]: ...

    @overload
    def attend(self, queries: Array, *, return_error: Literal[True]) -> tuple[Array, Array]: ...

    @overload
    def attend(
        self, queries: Array, *, return_error: bool = False, return_logsumexp: bool = False
    ) -> Array | tuple[Array, ...]: ...

    @outside_modes
    def attend(
        self, queries: Array, *, return_error: bool = False, return_logsumexp: bool = False
    ) -> Array | tuple[Array, ...]:
        """Answer queries from everything seen so far.

        Parameters
        ----------
        queries : array, shape (..., q_heads, m, head_dim)
            ``q_heads`` is a multiple of ``kv_heads``.
        return_error : bool
            Whether to answer by the corrected estimator and return its standard error: what the means miss is
            estimated without bias from ``residual_samples`` tokens. Less accurate than as many more clusters, but it
            tells how accurate.
        return_logsumexp : bool
            Whether to return the logarithm of the denominator too. With it the answer can be merged with that over
            other tokens, see `subgen.weighted.merge_attention`.

        Returns
        -------
        outputs : array, shape (..., q_heads, m, value_dim)
            In the dtype of the input. Where the estimate exceeds that dtype it is the largest number of it.
        error : array, shape (..., q_heads, m, value_dim)
            Standard error of each number, in float32 at least; if ``return_error``. It is that of the sample alone:
            too small where attention goes to tokens that the sample has none of.
        logsumexp : array, shape (..., q_heads, m)
            In float32 at least; if ``return_logsumexp``.

        Raises
        ------
        RuntimeError
            If nothing was seen yet.
        TypeError, ValueError
            As in `attention`, or if ``return_error`` and the sketch was made without ``residual_samples``.

        Notes
        -----
        Memory: at most 8 temporary arrays of 2^22 numbers (2^26 on a GPU), and the result once more, however many
        queries and clusters there are. 16-bit and int8 clusters may be cast once (docs/howto/numpy.md).
        """
        if self._state is None or self._layout is None:
            raise RuntimeError("the sketch is empty: call update (or step) with keys and values before attend")
        method = self._method
        if return_error and not (isinstance(method, ClusterMeans) and method.residual_samples):
            raise ValueError(
                "return_error needs the residual sample of the default sketch: make it with residual_samples above 0, "
                "for example AttentionSketch(residual_samples=256)"
            )
        queries = self._check_queries(queries, self._layout)
        numbers = math.prod(queries.shape[:-2]) * max(self._layout.head_dim, self._layout.value_dim)
        parts = pieces(queries.shape[-2], numbers, queries)
        if len(parts) == 1:
            answer = self._answer(queries, return_error, return_logsumexp)
        else:
            some = [self._answer(queries[..., part, :], return_error, return_logsumexp) for part in parts]
            answer = [concat(of_parts, axis=queries.ndim - 2) for of_parts in zip(*some, strict=True)]
        return answer[0] if len(answer) == 1 else tuple(answer)

    def _answer(self, queries: Array, return_error: bool, return_logsumexp: bool) -> list[Array]:
        """Answer queries that are checked; the outputs first, then what else is wanted."""
        rows = fold_groups(self._scaled(queries), self._layout.kv_heads)  # type: ignore[union-attr]
        method, ops = self._method, operations_for(queries)
        if return_error:
            output, error, logsumexp = method.attend_with_error(self._state, rows, ops)  # type: ignore[attr-defined]
        else:
            output, logsumexp = method.attend(self._state, rows, ops)
        answer = [narrow(unfold_groups(output, queries.shape), queries)]
        if return_error:
            answer.append(unfold_groups(error, queries.shape))
        if return_logsumexp:
            answer.append(array_namespace(logsumexp).reshape(logsumexp, queries.shape[:-1]))
        return answer

    @outside_modes
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

        Notes
        -----
        Memory: that of `update`, and the result once more; a few queries are answered at a time.
        """
        layout, keys, values, queries = self.check(keys, values, queries)
        ops = operations_for(keys)
        k, v = layout.flat(keys), layout.flat(values)
        state = self._method.init(k, v) if self._state is None else self._state
        state, output = self._method.step(state, _by_stream(queries, layout), k, v, layout.heads, ops)
        output = narrow(unfold_groups(output, queries.shape), queries)
        self._layout, self._state = layout, state
        return output

    def take(self, indices: Array | Sequence[int]) -> AttentionSketch:
        """Return a new sketch with these entries of the first leading axis, in this order: rows of a batch.

        Beam search and dropping finished rows need it. Entries may repeat; from then on the copies are streams of
        their own.

        Parameters
        ----------
        indices : sequence of int, or integer array of the sketch's library, shape (entries,)
            At least one; of a sequence every entry is checked, an array is trusted to be within the axis.

        Returns
        -------
        AttentionSketch
            This sketch is as it was.

        Raises
        ------
        RuntimeError
            If nothing was seen yet: there is nothing to take from, start another sketch.
        TypeError, ValueError
            If the stream has no axis before that of the heads, or the indices are not one axis of integers in range.

        Examples
        --------
        >>> import numpy as np, subgen
        >>> keys = values = np.random.default_rng(0).normal(size=(2, 4, 100, 16))    # (batch, kv_heads, n, head_dim)
        >>> sketch = subgen.AttentionSketch(max_clusters=16, window=32)
        >>> sketch.update(keys, values)
        >>> sketch.take([1, 1, 0]).n_clusters.shape
        (3, 4)
        """
        layout = self._layout
        if self._state is None or layout is None:
            raise RuntimeError("the sketch is empty: take needs a stream; call update first, or start another sketch")
        if len(layout.leading) < 2:
            raise ValueError(
                f"take picks rows of a batch, and the stream's leading axes are {layout.leading}: it needs one before "
                f"that of the heads, keys of shape (batch, kv_heads, n, head_dim)"
            )
        index = _indices(indices, layout)
        xp = array_namespace(index)
        inner = layout.streams // layout.leading[0]
        streams = xp.reshape(index[:, None] * inner + positions(inner, layout.example)[None, :], (-1,))
        taken = replace(layout, leading=(index.shape[0], *layout.leading[1:]))
        return self.continued(taken, _take_streams(self._state, streams))

    def _scaled(self, queries: Array) -> Array:
        return scaled(queries, check_scale(self._method.scale, queries.shape[-1]))

    def check(self, keys: Any, values: Any, queries: Any) -> Checked:
        """Check a block as `update` and `step` do, against itself and against the stream; changes nothing.

        Parameters
        ----------
        keys, values, queries
            As in `update`.

        Returns
        -------
        Checked

        Raises
        ------
        TypeError, ValueError
            As in `update`.
        """
        keys, values = check_block(keys, values, finite=self._finite)
        layout = self._layout
        if layout is None:
            # Made anew: a slice would keep the whole first block alive.
            example = array_namespace(keys).zeros((0, keys.shape[-1]), dtype=keys.dtype, device=keys.device)
            layout = Layout(tuple(keys.shape[:-2]), keys.shape[-1], values.shape[-1], example)
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
            check_length(self.n_seen, keys.shape[-2])
        if queries is not None:
            queries = check_groups(queries, keys, finite=self._finite)
            if queries.shape[-2] != keys.shape[-2]:
                raise ValueError(
                    f"every token has one query: got {queries.shape[-2]} queries for {keys.shape[-2]} keys; "
                    f"use attend for queries without tokens"
                )
        return Checked(layout, keys, values, queries)

    def _check_queries(self, queries: Any, layout: Layout) -> Array:
        shape = (*layout.leading, self.n_seen, layout.head_dim)
        return check_groups(queries, layout.example, "the stream's keys", shape, finite=self._finite)


def _by_stream(queries: Array, layout: Layout) -> Array:
    """Queries by stream and head of the group: ``(streams, group, n, head_dim)``."""
    return array_namespace(queries).reshape(queries, (layout.streams, -1, *queries.shape[-2:]))


def _indices(indices: Any, layout: Layout) -> Array:
    """Indices into the first leading axis as an int64 array, shape (entries,)."""
    xp, rows = array_namespace(layout.example), layout.leading[0]
    if not hasattr(indices, "shape"):
        if isinstance(indices, str) or not isinstance(indices, Iterable):
            raise TypeError(f"indices must be a sequence of integers, such as [0, 2], got {indices!r}")
        numbers = [check_integer("an index", i, minimum=0, maximum=rows - 1) for i in indices]
        indices = xp.asarray(numbers, dtype=xp.int64, device=layout.example.device)
    elif namespace_of("indices", indices) is not xp:
        raise TypeError(
            f"indices must be a sequence or an array of {library_name(xp)}, as the sketch is of: got "
            f"{type(indices).__module__}.{type(indices).__qualname__}; pass indices.tolist()"
        )
    elif not xp.isdtype(indices.dtype, "integral"):
        raise TypeError(f"indices must be integers, got an array of {indices.dtype}")
    if indices.ndim != 1 or indices.shape[0] == 0:
        raise ValueError(f"indices must have one axis and at least one entry, got shape {tuple(indices.shape)}")
    return xp.astype(indices, xp.int64, copy=False)


def _take_streams(state: Any, index: Array) -> Any:
    """Gather the first axis, that of the streams, of every array of a state."""
    taken: dict[str, Any] = {}
    for field in fields(state):
        value = getattr(state, field.name)
        if is_dataclass(value):
            taken[field.name] = _take_streams(value, index)
        elif hasattr(value, "shape"):
            taken[field.name] = array_namespace(value).take(value, index, axis=0)
        elif isinstance(value, Tail):
            taken[field.name] = Tail(state.n_exact)  # the arrays are new
    return replace(state, **taken)
