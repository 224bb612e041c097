"""Compare ways to hold a context in few pairs: compress a prefix, answer later queries, hold them against exact ones.

The first tokens of a capture are compressed to a share of their pairs. Later queries, which no method has seen,
each attend to what is left of the prefix and to the exact tokens between it and themselves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._array import chunks, pieces
from .._checks import check_integer, check_real, check_scale, check_seed
from .._tree import concat, nbytes
from ..default.algorithm import ClusterMeans, Storage
from ..default.budget import Budget, Bytes, Fixed
from ..default.state import State
from ..io.captures import Capture, check_capture
from ..softmax import merge_attention, weighted_attention
from .baselines import BASELINES, Answers, Compress, Prefix, exact
from .stream import relative_error

__all__ = ["METHODS", "Comparison", "compare", "default_sketch", "eight_bit_sketch"]

# Tokens in a call: the sketch sees the prefix as a stream. The result does not depend on it.
_BLOCK = 64


@dataclass(frozen=True)
class _Streamed:
    """A prefix that went through the default sketch."""

    method: ClusterMeans
    state: State

    @property
    def nbytes(self) -> int:
        return nbytes(self.state)

    def answer(self, rows: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        return self.method.attend(self.state, rows)


def default_sketch(prefix: Prefix, budget: int, rng: np.random.Generator) -> _Streamed:
    """Stream a prefix through the default sketch of `subgen.AttentionSketch`: block by block, in fixed memory.

    Parameters
    ----------
    prefix : Prefix
    budget : int
        Pairs for each stream, sinks and window included.
    rng : numpy.random.Generator

    Returns
    -------
    Answers

    Raises
    ------
    ValueError
        If the budget leaves no cluster beside sinks and window, or the window is below 2.
    """
    clusters = budget - prefix.sinks - prefix.window
    if clusters < 1 and budget < prefix.keys.shape[1]:
        raise ValueError(
            f"a budget of {budget} pairs leaves no cluster beside {prefix.sinks} sinks and a window of {prefix.window}"
        )
    return _stream(prefix, Fixed(max(clusters, 1)), "input", rng)


def eight_bit_sketch(prefix: Prefix, budget: int, rng: np.random.Generator) -> _Streamed:
    """Stream a prefix through the default sketch with int8 clusters, in no more bytes than the pairs would take.

    Parameters
    ----------
    prefix, budget, rng
        As in `default_sketch`.

    Returns
    -------
    Answers

    Raises
    ------
    ValueError
        As in `default_sketch`.
    """
    pair = prefix.keys.itemsize * (prefix.keys.shape[-1] + prefix.values.shape[-1])
    return _stream(prefix, Bytes(prefix.streams * budget * pair), "int8", rng)


def _stream(prefix: Prefix, budget: Budget, storage: Storage, rng: np.random.Generator) -> _Streamed:
    method = ClusterMeans(
        budget,
        window=check_integer("window", prefix.window, minimum=2),
        sink=prefix.sinks,
        scale=prefix.scale,
        storage=storage,
        seed=int(rng.integers(2**32)),
    )
    heads = np.arange(prefix.streams)
    queries = prefix.queries.astype(np.float32).reshape(prefix.streams, -1, *prefix.queries.shape[1:])
    state = method.init(prefix.keys, prefix.values)
    for part in chunks(prefix.keys.shape[1], _BLOCK):
        keys, values = prefix.keys[:, part], prefix.values[:, part]
        state = method.update(state, keys, values, queries[:, :, part], heads)
    return _Streamed(method, state)


METHODS: Mapping[str, Compress] = {
    "subgen": default_sketch,
    "subgen-int8": eight_bit_sketch,
    **{name: baseline.compress for name, baseline in BASELINES.items()},
}
"""The methods of `compare`, by name: the default sketch, the same with int8 clusters, and its baselines.

Budgets count pairs; ``subgen-int8`` instead holds what fits into the bytes of as many pairs."""


@dataclass(frozen=True, repr=False)
class Comparison:
    """What a comparison showed; prints as a table.

    Attributes
    ----------
    methods : tuple of str
    budgets : tuple of float
        Shares of the pairs of the prefix.
    pairs : tuple of int
        The same budgets in pairs.
    error : float array, shape (methods, budgets)
        Mean over query streams and queries of ``||output - exact|| / ||exact||``.
    stream_error : float array, shape (methods, budgets, q_streams)
        The same mean for each query stream.
    held_nbytes : int array, shape (methods, budgets)
        Bytes held, all streams: pairs in the dtype of the capture, and weights where there are any.
    full_nbytes : int
        Bytes of every pair of the prefix.
    seconds : float array, shape (methods, budgets)
        To compress the prefix and answer the queries.
    prefix, sinks, window : int
        Tokens compressed; the first and last of them that were kept.
    positions : int array, shape (m,)
        Tokens whose queries were answered.
    """

    methods: tuple[str, ...]
    budgets: tuple[float, ...]
    pairs: tuple[int, ...]
    error: NDArray[np.float64]
    stream_error: NDArray[np.float64]
    held_nbytes: NDArray[np.int64]
    full_nbytes: int
    seconds: NDArray[np.float64]
    prefix: int
    sinks: int
    window: int
    positions: NDArray[np.int64]

    @property
    def worst_error(self) -> NDArray[np.float64]:
        """Error of the worst query stream: shape (methods, budgets)."""
        worst: NDArray[np.float64] = self.stream_error.max(axis=-1)
        return worst

    def to_dict(self) -> dict[str, list[Any]]:
        """Return the results as columns, a row for each method and budget.

        Returns
        -------
        dict of str to list
            ``method``, ``budget``, ``pairs``, ``error``, ``worst_error``, ``bytes`` (as a share of all pairs) and
            ``seconds``: numbers and strings alone, for JSON or ``pandas.DataFrame``.
        """
        columns = {
            "error": self.error,
            "worst_error": self.worst_error,
            "bytes": self.held_nbytes / self.full_nbytes,
            "seconds": self.seconds,
        }
        return {
            "method": [name for name in self.methods for _ in self.budgets],
            "budget": list(self.budgets) * len(self.methods),
            "pairs": list(self.pairs) * len(self.methods),
            **{name: column.ravel().tolist() for name, column in columns.items()},
        }

    def plot(self, path: str | Path) -> None:
        """Write a picture of the errors; see `subgen.evaluation.plot.plot_comparison`.

        Parameters
        ----------
        path : str or Path
            Ends in ``.png`` or ``.svg``.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        FileError
            If the file cannot be written.
        """
        from .plot import plot_comparison  # it reads this class

        plot_comparison(self, path)

    def __repr__(self) -> str:
        width = max(len(name) for name in ("method", *self.methods))
        head = [f"{share:.0%}: error, worst head, bytes" for share in self.budgets]
        lines = [f"{'method':<{width}}  " + "  ".join(head)]
        for i, name in enumerate(self.methods):
            cells = [
                f"{error:.4f} {worst:.4f} {held / self.full_nbytes:.1%}".rjust(len(word))
                for error, worst, held, word in zip(
                    self.error[i], self.worst_error[i], self.held_nbytes[i], head, strict=True
                )
            ]
            lines.append(f"{name:<{width}}  " + "  ".join(cells))
        lines.append(f"{self.prefix} tokens compressed, {len(self.positions)} later queries of each stream")
        return "\n".join(lines)


def compare(
    capture: Capture,
    budgets: Sequence[float] = (0.1, 0.25),
    *,
    prefix: int | None = None,
    stride: int = 20,
    scale: float | None = None,
    sinks: int = 4,
    window: int | None = None,
    methods: Iterable[str] | Mapping[str, Compress] | None = None,
    seed: int = 0,
    on_done: Callable[[str, float], object] | None = None,
) -> Comparison:
    """Compress the prefix of a capture by several methods at equal budgets, and measure their answers.

    Parameters
    ----------
    capture : Capture
    budgets : sequence of float
        Shares of the pairs of the prefix, above 0 and at most 1; sinks and window included.
    prefix : int, optional
        Tokens to compress; ``None`` means 375 of each 512: 1500 of 2048. Queries of the tokens after it are
        answered, up to 4/15 of the prefix further: 1500 to 1899.
    stride : int
        Every how many of those tokens a query is answered.
    scale : float, optional
        Softmax scale; ``None`` means ``head_dim ** -0.5``.
    sinks : int
        First tokens that are always kept.
    window : int, optional
        Last tokens of the prefix that are always kept; ``None`` means 32, or a quarter of the smallest budget.
    methods : iterable of str, or mapping, optional
        Names of methods, or methods by name: ``(prefix, budget, rng) -> Answers``, see
        `subgen.evaluation.baselines`. ``None`` means all.
    seed : int
        Every method and budget starts from it: a result does not depend on what else is compared.
    on_done : callable, optional
        Called with the name and the budget after each; for a progress bar.

    Returns
    -------
    Comparison

    Raises
    ------
    TypeError, ValueError
        If the capture is not a Capture, a method is unknown, the prefix leaves no token to answer, a budget cannot hold
        sinks and window, or an argument is out of bounds.

    Examples
    --------
    >>> import subgen.io.captures
    >>> sample = subgen.io.captures.sample()
    >>> result = compare(sample, budgets=[0.25], prefix=300, methods=["streaming-llm", "oracle"])
    >>> result.pairs, result.error.shape
    ((75,), (2, 1))
    >>> bool(result.error[1, 0] < result.error[0, 0] < 1)
    True
    """
    capture = check_capture(capture)
    chosen = _chosen(methods)
    budgets = tuple(check_real("a budget", budget, minimum=0.0, strict=True, maximum=1.0) for budget in budgets)
    if not budgets:
        raise ValueError("budgets is empty: give at least one share of the pairs, for example [0.1]")
    total = capture.k.shape[1]
    n = check_integer("prefix", max(1, total * 375 // 512) if prefix is None else prefix)
    if n >= total:
        raise ValueError(f"a prefix of {n} tokens leaves none of the {total} to answer; make it shorter")
    pairs = tuple(max(1, round(budget * n)) for budget in budgets)
    given = Prefix(
        queries=capture.q[:, :n],
        keys=capture.k[:, :n],
        values=capture.v[:, :n],
        scale=check_scale(scale, capture.k.shape[-1]),
        sinks=sinks,
        window=min(32, min(pairs) // 4) if window is None else window,
    )
    seed = check_seed(seed)
    positions = np.arange(n, min(total, n + max(1, n * 4 // 15)), check_integer("stride", stride))
    rows = _rows(capture, positions, given)
    later = _later(capture, positions, rows, n)
    truth, _ = merge_attention(_answer(exact(given), rows, n), later)

    shape = (len(chosen), len(pairs))
    stream_error = np.zeros((*shape, capture.q.shape[0]))
    held, seconds = np.zeros(shape, dtype=np.int64), np.zeros(shape)
    for i, (name, compress) in enumerate(chosen.items()):
        for j, budget in enumerate(pairs):
            begin = time.perf_counter()
            answers = compress(given, budget, np.random.default_rng(seed))
            output, _ = merge_attention(_answer(answers, rows, n), later)
            seconds[i, j] = time.perf_counter() - begin
            stream_error[i, j] = relative_error(output, truth).reshape(-1, len(positions)).mean(axis=-1)
            held[i, j] = answers.nbytes
            if on_done is not None:
                on_done(name, budgets[j])
    return Comparison(
        methods=tuple(chosen),
        budgets=budgets,
        pairs=pairs,
        error=stream_error.mean(axis=-1),
        stream_error=stream_error,
        held_nbytes=held,
        full_nbytes=given.keys.nbytes + given.values.nbytes,
        seconds=seconds,
        prefix=n,
        sinks=given.sinks,
        window=given.window,
        positions=positions,
    )


def _chosen(methods: Iterable[str] | Mapping[str, Compress] | None) -> Mapping[str, Compress]:
    """Look the methods up by name; a mapping brings its own."""
    if methods is None:
        return METHODS
    if isinstance(methods, Mapping):
        chosen = dict(methods)
    else:
        names = [methods] if isinstance(methods, str) else list(methods)
        unknown = [name for name in names if name not in METHODS]
        if unknown:
            raise ValueError(f"unknown methods {unknown}; choose from {sorted(METHODS)}, or pass a mapping with yours")
        chosen = {name: METHODS[name] for name in names}
    if not chosen:
        raise ValueError(f"no method to compare; choose from {sorted(METHODS)}")
    return chosen


def _rows(capture: Capture, positions: NDArray[np.int64], given: Prefix) -> NDArray[np.float32]:
    """Scaled queries, query heads of a stream joined: ``(streams, group * m, head_dim)``."""
    rows = capture.q[:, positions].astype(np.float32) * np.float32(given.scale)
    return rows.reshape(given.streams, -1, rows.shape[-1])


def _answer(answers: Answers, rows: NDArray[Any], n: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Answer queries from a prefix of n tokens, a few at a time: a method may hold the logits of all its tokens."""
    parts = pieces(rows.shape[1], rows.shape[0] * n, rows)
    outputs, logsumexp = concat([answers.answer(rows[:, part]) for part in parts], axis=1)
    return outputs, logsumexp


def _later(
    capture: Capture, positions: NDArray[np.int64], rows: NDArray[np.float32], n: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Answer each query exactly from the tokens after the prefix, up to its own."""
    tokens = np.arange(n, positions[-1] + 1)
    keys, values = capture.k[:, tokens], capture.v[:, tokens]
    own = np.tile(positions, rows.shape[1] // len(positions))
    answers = []
    for part in pieces(rows.shape[1], rows.shape[0] * len(tokens), rows):
        bias = np.where(tokens[None, :] > own[part, None], -np.inf, 0.0).astype(rows.dtype)
        answers.append(weighted_attention(rows[:, part], keys, values, bias[None]))
    outputs, logsumexp = concat(answers, axis=1)
    return outputs, logsumexp
