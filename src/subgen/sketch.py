"""`AttentionSketch`: checks its arguments and holds the current state; everything else is pure functions."""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar, cast, overload

from ._array import Array, Counts, array_namespace, library_name, pieces, positions, saturating_cast
from ._checks import check_alike, check_block, check_flag, check_groups, check_integer, check_length, check_scale
from ._inputs import namespace_of, outside_modes
from ._tree import concat, nbytes, tree_map
from .default.algorithm import ClusterMeans, Storage
from .default.budget import Power
from .default.state import BufferOwner, State
from .io import save as files
from .layout import Layout
from .paper.algorithm import Algorithm1
from .paper.state import PaperState
from .softmax import fold_groups, scaled, unfold_groups

__all__ = ["AttentionSketch", "load"]

ArrayT = TypeVar("ArrayT")
Method: TypeAlias = ClusterMeans | Algorithm1

_KINDS: dict[str, type[Method]] = {"means": ClusterMeans, "paper": Algorithm1}

Update = TypeVar("Update", bound=Callable[..., None])


def _queries_by_name(update: Update) -> Update:
    """Accept the queries as a third positional argument for one more release, with a warning."""

    @functools.wraps(update)
    def wrapped(self: AttentionSketch, keys: Array, values: Array, *positional: Array, **named: Array) -> None:
        if len(positional) == 1 and not named:
            warnings.warn(
                "update(keys, values, queries) by position is deprecated, as step and attention take queries first: "
                "write update(keys, values, queries=queries)",
                DeprecationWarning,
                stacklevel=2,
            )
            return update(self, keys, values, queries=positional[0])
        return update(self, keys, values, *positional, **named)

    return cast("Update", wrapped)


class Checked(NamedTuple):
    """A block that passed the checks.

    Attributes
    ----------
    layout : Layout
        Of the stream, or what it would be if the block came first.
    keys, values : array
        Converted: native-endian, strided, detached.
    queries : array or None
    """

    layout: Layout
    keys: Array
    values: Array
    queries: Any


class AttentionSketch:
    """Attention over a stream of tokens from a summary that grows with its clusters, not with its length.

    The default is **cluster means**. The first ``sink`` tokens and the last ``window`` are kept exactly. All others are
    clusters, each held as its mean key and mean value; when there are more than the budget, the closest pairs merge.
    Closeness is measured in logits of recent queries and in values, and dissimilar keys merge last. Algorithm 1 of the
    paper is `AttentionSketch.paper`.

    The array library, dtype, device and shapes come from the first `update` (or `step`); a batch holds any number of
    independent streams, and a stream's answers depend neither on its neighbours in the batch nor on how the tokens
    were cut into calls.

    Parameters
    ----------
    max_clusters : int or Power, optional
        Clusters held for each stream; memory is fixed once they are reached. With ``sink`` and ``window`` it makes
        the number of entries a query is answered from. At least 1. A `subgen.Power` lets the number grow with the
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
        Softmax scale; ``None`` means ``head_dim ** -0.5``.
    storage : {"input", "int8"}
        How the means of clusters are stored: in the dtype of the input, or in int8 with one scale for each vector,
        which fits nearly twice the clusters of 16-bit input into the same bytes. Sinks and window stay exact.
    residual_samples : int
        Tokens sampled for the corrected estimator of ``attend(return_error=True)``; 0 keeps none.
    check_finite : bool
        Whether `update`, `step` and `attend` check for NaN and infinity. The check synchronises with the device.
    seed : int
        In ``[0, 2**64)``; for the rounding of means to 16 bits and int8, and for the residual sample. Equal seeds give
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
    >>> sketch.update(keys, values, queries=queries)
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
        self._start(
            ClusterMeans.from_arguments(
                max_clusters,
                delta=delta,
                max_bytes=max_bytes,
                compression_ratio=compression_ratio,
                window=window,
                sink=sink,
                scale=scale,
                storage=storage,
                residual_samples=residual_samples,
                seed=seed,
            ),
            check_flag("check_finite", check_finite),
        )

    def _start(self, method: Method, check_finite: bool) -> None:
        self._method = method
        self._finite = check_finite
        self._layout: Layout | None = None
        self._state: State | PaperState | None = None

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
        """Make a sketch that runs Algorithm 1 of the paper, exactly.

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
            Softmax scale: 1, as in the paper; ``None`` means ``head_dim ** -0.5``.
        check_finite : bool
            Whether `update`, `step` and `attend` check for NaN and infinity.
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
        method = Algorithm1.from_arguments(
            delta=delta, samples_per_cluster=samples_per_cluster, value_samples=value_samples, scale=scale, seed=seed
        )
        sketch = cls.__new__(cls)
        sketch._start(method, check_flag("check_finite", check_finite))
        return sketch

    def __repr__(self) -> str:
        return f"<AttentionSketch {self._method} n_seen={self.n_seen} nbytes={self.nbytes}>"

    @property
    def n_seen(self) -> int:
        """Tokens seen so far, in each stream."""
        return 0 if self._state is None else self._state.n_seen

    @property
    def n_clusters(self) -> Counts:
        """Live clusters: int64 array of the shape of the leading axes; the int 0 before the first update."""
        if self._state is None or self._layout is None:
            return cast("Counts", 0)
        counts = self._method.n_clusters(self._state)  # type: ignore[arg-type]
        return cast("Counts", array_namespace(counts).reshape(counts, self._layout.leading))

    @property
    def nbytes(self) -> int:
        """Bytes of every array held, padding and bookkeeping included."""
        return 0 if self._state is None else nbytes(self._state)

    @property
    def state(self) -> State | PaperState | None:
        """The current state, read-only; ``None`` before the first update."""
        return self._state

    @property
    def method(self) -> Method:
        """The parameters, and the functions that go with them."""
        return self._method

    @property
    def check_finite(self) -> bool:
        """Whether NaN and infinity are checked for."""
        return self._finite

    @property
    def layout(self) -> Layout | None:
        """Shapes, library, dtype and device of the stream; ``None`` before the first update."""
        return self._layout

    def resume(self, layout: Layout, state: Any) -> None:
        """Continue from a state of the same method.

        Raises
        ------
        RuntimeError
            If tokens were seen already.
        """
        if self._state is not None:
            raise RuntimeError("this sketch has seen tokens already; resume with a new one")
        self._layout, self._state = layout, state

    def continued(self, layout: Layout | None, state: Any) -> AttentionSketch:
        """Return a new sketch of the same parameters that continues from a state; this one is unchanged.

        Parameters
        ----------
        layout : Layout or None
        state : State or PaperState or None
            Of this kind of sketch; no other sketch may write to it.

        Returns
        -------
        AttentionSketch
        """
        other = copy.copy(self)
        other._layout, other._state = layout, state
        return other

    def save(self, path: str | Path) -> None:
        """Write the sketch to a file, to continue later with `subgen.load`: exactly, on any library.

        The file appears whole or not at all: after a crash it is the old one, or the new.

        Parameters
        ----------
        path : str or Path
            Ending in ``.safetensors``.

        Raises
        ------
        subgen.io.captures.FileError
            If the ending is another, the file cannot be written, or safetensors is not installed.
        TypeError
            If the path is not a str or a path.

        Notes
        -----
        A new file gets the mode that the umask gives it, and one that is replaced keeps its own. If the path is a link,
        the file that it leads to is replaced.
        """
        files.save(path, self._kind, self._method.to_arguments(), self._finite, self._layout, self._state)

    @property
    def _kind(self) -> str:
        return next(kind for kind, method in _KINDS.items() if isinstance(self._method, method))

    @_queries_by_name
    @outside_modes
    def update(self, keys: ArrayT, values: ArrayT, *, queries: ArrayT | None = None) -> None:
        """Take in a block of tokens.

        Parameters
        ----------
        keys : array, shape (..., kv_heads, n, head_dim)
        values : array, shape (..., kv_heads, n, value_dim)
            Any ``n`` of at least 1; the shapes, library, dtype and device of the first block hold for all. Big-endian
            arrays are taken in the native byte order, and tensors that require grad without their graph.
        queries : array, shape (..., q_heads, n, head_dim), optional
            The queries of these tokens, by keyword. The sketch uses them to choose which keys to merge; without them
            every direction of the keys counts alike. Algorithm 1 does not use them.

        Raises
        ------
        TypeError, ValueError
            As in `attention`, or if the block does not continue the stream. The sketch is then unchanged.
        """
        self._take(keys, values, queries, self._method.update)

    @outside_modes
    def prefill(self, keys: ArrayT, values: ArrayT, *, queries: ArrayT | None = None) -> None:
        """Take in a whole prompt at once, in a fraction of the time of `update`.

        Parameters
        ----------
        keys, values, queries
            As in `update`, of all tokens of the prompt.

        Raises
        ------
        RuntimeError
            If tokens were seen already: continue with `update` or `step`.
        TypeError, ValueError
            As in `update`. The sketch is then unchanged.

        Notes
        -----
        The result is a function of the whole prompt. `update` gives another, which does not depend on how the prompt is
        cut: it absorbs half a window at a time. Here one metric serves the whole prompt, so that distances are kept
        from merge to merge, and tokens that the last queries attend to merge last (`subgen.default.prompt`). Both leave
        as many clusters and exact tokens. On a device, blocks of a quarter as many tokens as there are clusters are
        absorbed. With ``delta``, for Algorithm 1, and where nothing has to merge this is `update`.

        Examples
        --------
        >>> import numpy as np, subgen
        >>> keys, values = np.random.default_rng(0).normal(size=(2, 4, 1000, 16))
        >>> sketch = subgen.AttentionSketch(100, window=16)
        >>> sketch.prefill(keys, values)
        >>> sketch.step(keys[:, :1], keys[:, :1], values[:, :1]).shape
        (4, 1, 16)
        """
        if self._state is not None:
            raise RuntimeError(
                f"prefill takes the whole prompt, and this sketch has seen {self.n_seen} tokens: use update or step, "
                f"or a new sketch"
            )
        self._take(keys, values, queries, self._method.prefill)

    def _take(self, keys: Any, values: Any, queries: Any, update: Callable[..., Any]) -> None:
        layout, k, v, q = self.check(keys, values, queries)
        k, v = layout.flat(k), layout.flat(v)
        state: Any = self._method.init(k, v) if self._state is None else self._state
        q = None if q is None else _by_stream(q, layout)
        state = update(state, k, v, q, layout.heads)
        self._layout, self._state = layout, state

    @overload
    def attend(self, queries: ArrayT) -> ArrayT: ...

    @overload
    def attend(self, queries: ArrayT, *, return_logsumexp: Literal[True]) -> tuple[ArrayT, ArrayT]: ...

    @overload
    def attend(self, queries: ArrayT, *, return_error: Literal[True]) -> tuple[ArrayT, ArrayT]: ...

    @overload
    def attend(
        self, queries: ArrayT, *, return_error: bool = False, return_logsumexp: bool = False
    ) -> ArrayT | tuple[ArrayT, ...]: ...

    @outside_modes
    def attend(
        self, queries: Any, *, return_error: bool = False, return_logsumexp: bool = False
    ) -> Any | tuple[Any, ...]:
        """Answer queries from everything seen so far.

        Parameters
        ----------
        queries : array, shape (..., q_heads, m, head_dim)
            ``q_heads`` is a multiple of ``kv_heads``.
        return_error : bool
            Whether to answer by the corrected estimator and return its standard error: what the means miss is
            estimated without bias from ``residual_samples`` tokens. It is less accurate than as many more clusters.
        return_logsumexp : bool
            Whether to return the logarithm of the denominator too. With it the answer can be merged with the answer
            over other tokens, see `subgen.softmax.merge_attention`.

        Returns
        -------
        outputs : array, shape (..., q_heads, m, value_dim)
            In the dtype of the input. Where the estimate exceeds that dtype it is the largest number of it.
        error : array, shape (..., q_heads, m, value_dim)
            Standard error of each number, in float32 at least; if ``return_error``. It is that of the sample alone:
            too small where attention goes to tokens that the sample misses.
        logsumexp : array, shape (..., q_heads, m)
            In float32 at least; if ``return_logsumexp``.

        Raises
        ------
        RuntimeError
            If nothing was seen yet.
        TypeError, ValueError
            As in `attention`, or if ``return_error`` and the sketch was made without ``residual_samples``.
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
            answer = self._answer(queries, self._layout, return_error, return_logsumexp)
        else:
            layout = self._layout
            some = [self._answer(queries[..., part, :], layout, return_error, return_logsumexp) for part in parts]
            answer = [concat(of_parts, axis=queries.ndim - 2) for of_parts in zip(*some, strict=True)]
        return answer[0] if len(answer) == 1 else tuple(answer)

    def _answer(self, queries: Array, layout: Layout, return_error: bool, return_logsumexp: bool) -> list[Array]:
        """Answer queries that are checked; the outputs first, then the error and the logsumexp where wanted."""
        rows, method, state = (
            fold_groups(self._scaled(queries), layout.kv_heads),
            self._method,
            cast("Any", self._state),
        )
        if return_error:
            output, error, logsumexp = method.attend_with_error(state, rows)  # type: ignore[union-attr]
        else:
            output, logsumexp = method.attend(state, rows)
        answer = [saturating_cast(unfold_groups(output, queries.shape), queries)]
        if return_error:
            answer.append(unfold_groups(error, queries.shape))
        if return_logsumexp:
            answer.append(array_namespace(logsumexp).reshape(logsumexp, queries.shape[:-1]))
        return answer

    @outside_modes
    def step(self, queries: ArrayT, keys: ArrayT, values: ArrayT) -> ArrayT:
        """Take in a block and answer the query of each of its tokens: ``update`` and ``attend``, token by token.

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
            As in `update`, or if there are not as many queries as tokens. The sketch is then unchanged.
        """
        layout, k, v, q = self.check(keys, values, queries)
        k, v = layout.flat(k), layout.flat(v)
        state: Any = self._method.init(k, v) if self._state is None else self._state
        state, output = self._method.step(state, _by_stream(q, layout), k, v, layout.heads)
        answer: ArrayT = saturating_cast(unfold_groups(output, q.shape), q)
        self._layout, self._state = layout, state
        return answer

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
            This sketch is unchanged.

        Raises
        ------
        RuntimeError
            If nothing was seen yet.
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
            # A new array: a slice would keep the whole first block alive.
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
    taken = tree_map(lambda x: array_namespace(x).take(x, index, axis=0), state)
    if isinstance(taken, State):  # the arrays are new
        taken = replace(taken, exact=replace(taken.exact, owner=BufferOwner(taken.exact.n)))
    return taken


def load(path: str | Path, like: Array | None = None) -> AttentionSketch:
    """Load a sketch written by `subgen.AttentionSketch.save`, to continue from there.

    Nothing in the file is executed. On the same library the sketch continues bit for bit as the saved one would have.
    On another, later discrete decisions are those of that library's arithmetic.

    Parameters
    ----------
    path : str or Path
    like : array, optional
        An array of the library, device and dtype to continue with; ``None`` means NumPy and the dtype that was saved.

    Returns
    -------
    AttentionSketch

    Raises
    ------
    subgen.io.captures.FileError
        If the file is missing, cannot be read, is cut short, altered, foreign or of a newer version, or holds
        bfloat16, which NumPy has no dtype for, and no ``like`` was given.
    TypeError
        If ``like`` is not an array of a dtype that sketches compute with.
    MemoryError
        If memory does not suffice.

    Examples
    --------
    >>> import numpy as np, subgen, tempfile, pathlib
    >>> keys = np.random.default_rng(0).normal(size=(2, 500, 8))
    >>> sketch = subgen.AttentionSketch(32, window=16)
    >>> sketch.update(keys[:, :300], keys[:, :300])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sketch.save(pathlib.Path(folder) / "sketch.safetensors")
    ...     resumed = subgen.load(pathlib.Path(folder) / "sketch.safetensors")
    >>> for each in (sketch, resumed):
    ...     each.update(keys[:, 300:], keys[:, 300:])
    >>> bool(np.all(sketch.attend(keys) == resumed.attend(keys)))
    True
    """
    method, finite, layout, state = files.load(path, like, _KINDS)
    sketch = AttentionSketch.__new__(AttentionSketch)
    sketch._start(method, finite)
    sketch._layout, sketch._state = layout, state
    return sketch
