"""What every baseline is given, a prefix and a budget, and what it gives back, an object that answers queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..._array import pieces
from ..._checks import check_block, check_groups, check_integer, check_numpy, check_real
from ...softmax import weighted_attention

__all__ = ["Answers", "Floats", "Prefix", "Summary", "attention_received", "check_budget", "exact", "keep", "with_ends"]

Floats: TypeAlias = NDArray[Any]


@dataclass(frozen=True)
class Prefix:
    """The tokens to compress, with the queries that came with them; nothing of the future.

    Attributes
    ----------
    queries : array, shape (q_streams, n, head_dim)
        Of the same tokens; ``q_streams`` is a multiple of ``streams``, and query stream ``h`` reads stream
        ``h // (q_streams // streams)``.
    keys : array, shape (streams, n, head_dim)
    values : array, shape (streams, n, value_dim)
        Any floating dtype, one for all three: bytes are counted in it.
    scale : float
        Softmax scale.
    sinks, window : int
        First and most recent tokens that every method with a budget of pairs keeps unchanged.

    Raises
    ------
    TypeError, ValueError
        If shapes or dtypes do not fit, a number is NaN or infinite, or the sinks and window exceed the tokens.
    """

    queries: Floats
    keys: Floats
    values: Floats
    scale: float
    sinks: int = 4
    window: int = 32

    def __post_init__(self) -> None:
        check_numpy("a prefix", keys=self.keys, values=self.values, queries=self.queries)
        keys, values = check_block(self.keys, self.values)
        queries = check_groups(self.queries, keys)
        for name, x in (("queries", queries), ("keys", keys), ("values", values)):
            object.__setattr__(self, name, x)
        if self.keys.ndim != 3 or self.queries.shape[1] != self.n:
            raise ValueError(
                f"a prefix has queries (q_streams, n, head_dim) and keys (streams, n, head_dim) of the same n tokens: "
                f"got {self.queries.shape} and {self.keys.shape}; join the leading axes, and cut all three alike"
            )
        check_real("scale", self.scale, minimum=0.0, strict=True)
        check_integer("sinks", self.sinks, minimum=0)
        check_integer("window", self.window, minimum=0)
        if self.sinks + self.window > self.n:
            raise ValueError(
                f"sinks ({self.sinks}) and window ({self.window}) exceed the {self.n} tokens of the prefix; lower them"
            )

    @property
    def streams(self) -> int:
        """Streams of keys."""
        return int(self.keys.shape[0])

    @property
    def n(self) -> int:
        """Tokens."""
        return int(self.keys.shape[1])

    @property
    def middle(self) -> slice:
        """The tokens that may be given up: all but the sinks and the window."""
        return slice(self.sinks, self.n - self.window)

    def last_queries(self, count: int) -> NDArray[np.float32]:
        """Return the scaled queries of the last ``count`` tokens: float32 ``(streams, group, count, head_dim)``."""
        last = self.queries[:, self.n - count :].astype(np.float32) * np.float32(self.scale)
        return last.reshape(self.streams, -1, *last.shape[1:])


class Answers(Protocol):
    """A compressed prefix: answers queries and states its size."""

    @property
    def nbytes(self) -> int:
        """Bytes held, all streams."""
        ...

    def answer(self, rows: Floats) -> tuple[Floats, Floats]:
        """Answer scaled queries from the prefix alone.

        Parameters
        ----------
        rows : array, shape (streams, m, head_dim)
            Queries times the scale, float32 or float64; query heads that share a stream are rows of it.

        Returns
        -------
        outputs : array, shape (streams, m, value_dim)
        logsumexp : array, shape (streams, m)
            For `subgen.softmax.merge_attention` with the exact answer of later tokens.
        """
        ...


@dataclass(frozen=True)
class Summary:
    """Weighted pairs, answered by weighted attention.

    Attributes
    ----------
    keys, values : array, shape (streams, b, head_dim) and (streams, b, value_dim)
        In the dtype of the prefix.
    log_weights : float32 array, shape (streams, b)
    """

    keys: Floats
    values: Floats
    log_weights: NDArray[np.float32]

    @property
    def nbytes(self) -> int:
        """Bytes of the pairs, and of the weights unless all of them are 1."""
        weights = self.log_weights.nbytes if self.log_weights.any() else 0
        return self.keys.nbytes + self.values.nbytes + weights

    def answer(self, rows: Floats) -> tuple[Floats, Floats]:
        """Answer as in `subgen.evaluation.baselines.prefix.Answers.answer`."""
        outputs, logsumexp = weighted_attention(
            rows, self.keys, self.values, self.log_weights[:, None, :].astype(rows.dtype)
        )
        return outputs, logsumexp


def exact(prefix: Prefix) -> Summary:
    """Keep every pair: the yardstick."""
    return Summary(prefix.keys, prefix.values, np.zeros((prefix.streams, prefix.n), dtype=np.float32))


def keep(prefix: Prefix, tokens: NDArray[np.int64], log_weights: Floats | None = None) -> Summary:
    """Keep the pairs of some tokens: ``(streams, b)`` positions, with weight 1 if none are given."""
    weights = np.zeros(tokens.shape) if log_weights is None else log_weights
    return Summary(
        np.take_along_axis(prefix.keys, tokens[..., None], axis=1),
        np.take_along_axis(prefix.values, tokens[..., None], axis=1),
        weights.astype(np.float32),
    )


def with_ends(prefix: Prefix, middle: NDArray[np.int64]) -> NDArray[np.int64]:
    """Put the positions of the sinks before, and of the window behind, those of the middle: ``(streams, b)``."""
    ends = [np.arange(prefix.sinks), np.arange(prefix.n - prefix.window, prefix.n)]
    first, last = (np.broadcast_to(end, (prefix.streams, len(end))) for end in ends)
    return np.concatenate([first, middle, last], axis=1)


def check_budget(prefix: Prefix, budget: int) -> int:
    """Return the pairs of the budget that are left for the middle, after the sinks and the window.

    Raises
    ------
    TypeError, ValueError
        If the budget is not an integer from ``sinks + window`` (and at least 1) to n.
    """
    budget = check_integer("budget", budget, maximum=prefix.n)
    n_kept = budget - prefix.sinks - prefix.window
    if n_kept < 0:
        raise ValueError(
            f"a budget of {budget} pairs cannot hold {prefix.sinks} sinks and a window of {prefix.window}; "
            f"raise it to at least {prefix.sinks + prefix.window}, or make the window smaller"
        )
    return n_kept


def attention_received(prefix: Prefix, queries: int) -> NDArray[np.float64]:
    """Sum the attention that each token received from the last queries of the prefix, causally.

    Parameters
    ----------
    prefix : Prefix
    queries : int
        How many of the last tokens' queries to count.

    Returns
    -------
    float64 array, shape (streams, n)
        Summed over the queries and over the query heads of a stream.
    """
    rows = prefix.last_queries(queries)
    streams, group, count, head_dim = rows.shape
    keys = prefix.keys.astype(np.float32)
    received = np.zeros((streams, prefix.n))
    for part in pieces(count, streams * group * prefix.n, keys):
        some = rows[:, :, part].reshape(streams, -1, head_dim)
        logits = (some @ keys.swapaxes(1, 2)).reshape(streams, group, -1, prefix.n)
        position = prefix.n - count + np.arange(part.start, part.stop)
        logits[:, :, np.arange(prefix.n) > position[:, None]] = -np.inf
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        received += (weights / weights.sum(axis=-1, keepdims=True)).sum(axis=(1, 2))
    return received
