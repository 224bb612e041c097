"""What the default sketch and the paper's algorithm have in common: what `subgen.AttentionSketch` calls."""

from __future__ import annotations

from typing import Any, Protocol

from ._array import Array
from .backends import Operations

__all__ = ["Method"]


class Method(Protocol):
    """A way to sketch: parameters, and pure functions of a state."""

    @property
    def scale(self) -> float | None:
        """Factor of the logits; ``None`` means ``head_dim ** -0.5``."""

    def init(self, keys: Array, values: Array) -> Any:
        """Return the empty state for streams like ``(streams, n, head_dim)`` and ``(streams, n, value_dim)``."""

    def n_clusters(self, state: Any) -> Array:
        """Count the live clusters: int64, shape (streams,)."""

    def update(
        self, state: Any, keys: Array, values: Array, queries: Array | None, heads: Array, ops: Operations
    ) -> Any:
        """Absorb tokens.

        Parameters
        ----------
        state
        keys, values : array, shape (streams, n, head_dim) and (streams, n, value_dim)
        queries : array, shape (streams, group, n, head_dim), or None
            As they came, of the query heads that share a stream.
        heads : int64 array, shape (streams,)
            Index of each stream along the axis before the tokens; what is drawn depends on it.
        ops : Operations

        Returns
        -------
        state
        """

    def step(
        self, state: Any, queries: Array, keys: Array, values: Array, heads: Array, ops: Operations
    ) -> tuple[Any, Array]:
        """Absorb tokens and answer each of them: as `update` and `attend` would, token by token.

        Parameters
        ----------
        state, keys, values, heads, ops
            As in `update`.
        queries : array, shape (streams, group, n, head_dim)
            As they came, of the query heads that share a stream; query i is answered after token i.

        Returns
        -------
        state
        outputs : array, shape (streams, group, n, value_dim)
            In the dtype of the input, or in that to compute in.
        """

    def attend(self, state: Any, rows: Array, ops: Operations) -> tuple[Array, Array]:
        """Answer queries from the state.

        Parameters
        ----------
        state
        rows : array, shape (streams, m, head_dim)
            Scaled.
        ops : Operations

        Returns
        -------
        outputs : array, shape (streams, m, value_dim)
        logsumexp : array, shape (streams, m)
            The logarithm of the denominator.
        """
