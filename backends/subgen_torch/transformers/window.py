"""A layer that slides over a window: kept exactly, as its memory is bounded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .call import Call
from .operation import StateLayer, block_size, check_rows, nbytes_per_token

__all__ = ["WindowLayer"]


@dataclass(frozen=True)
class _Held:
    """Keys and values of the last tokens; ``None`` before the first."""

    keys: Tensor | None = None
    values: Tensor | None = None
    seen: int = 0
    nbytes_per_token: int = 0

    @property
    def size(self) -> int:
        """Tokens held."""
        return 0 if self.keys is None else int(self.keys.shape[2])

    def last(self, size: int) -> _Held:
        """Return the last tokens, at most so many."""
        if self.keys is None or self.values is None or self.size <= size:
            return self
        first = self.size - size
        keys, values = self.keys[:, :, first:], self.values[:, :, first:]
        if first > size:  # a view keeps all tokens of a long prompt alive
            keys, values = keys.clone(), values.clone()
        return replace(self, keys=keys, values=values)


class WindowLayer(StateLayer[_Held]):
    """The exact keys and values of the last tokens: transformers' `DynamicSlidingWindowLayer`, in states.

    Parameters
    ----------
    window : int
        A token sees so many, itself included.
    rollback : int
        While a decoder takes tokens back, at least so many more are kept.
    """

    is_sliding = True
    is_croppable = True

    def __init__(self, window: int, rollback: int) -> None:
        super().__init__(_Held())
        self.sliding_window = window
        self.rollback = rollback

    @property
    def keys(self) -> Tensor | None:
        """Those held."""
        return self.state.keys

    @keys.setter
    def keys(self, value: None) -> None:
        """Do nothing: transformers' constructor sets it."""

    @property
    def values(self) -> Tensor | None:
        """Those held."""
        return self.state.values

    @values.setter
    def values(self, value: None) -> None:
        """Do nothing: transformers' constructor sets it."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append tokens to this layer alone; a cache calls `take`."""
        return self.take(key_states, value_states, Call.alone(self))

    def take(self, key_states: Tensor, value_states: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """Append tokens; return the keys and values that they see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held = self.state
        keys, values = key_states, value_states
        if held.keys is not None and held.values is not None:
            check_rows(self.rows, int(keys.shape[0]))
            keys, values = torch.cat([held.keys, keys], dim=-2), torch.cat([held.values, values], dim=-2)
        size = int(key_states.shape[2])
        full = _Held(keys, values, held.seen + size, nbytes_per_token(keys, values))
        more = 2 * self.rollback if self.record_past else 0
        call.propose(self, full.last(self.sliding_window - 1 + more))
        seen = full.last(self.sliding_window - 1 + size)
        return seen.keys, seen.values

    def cropped(self, tokens: int) -> _Held:
        """Return the state without the last tokens, and without what was kept to take back more; see `StateLayer`."""
        held, behind = self.state, self.sliding_window - 1
        most = held.seen if held.size == held.seen else max(0, held.size - behind)
        if tokens > most:
            raise ValueError(
                f"crop was to remove {tokens} of {held.seen} tokens, and a layer that slides over a window of "
                f"{self.sliding_window} can take back {most}: what left the window is gone. Call "
                f"activate_past_recording() before the tokens that may be taken back"
            )
        if tokens and held.keys is not None and held.values is not None:
            stop = held.size - tokens
            held = replace(held, keys=held.keys[:, :, :stop], values=held.values[:, :, :stop], seen=held.seen - tokens)
        return held.last(behind)

    def selected(self, rows: list[int]) -> _Held:
        """Return the state of some rows of the batch; see `StateLayer`."""
        held = self.state
        if held.keys is None or held.values is None:
            return held
        index = torch.tensor(rows, device=held.keys.device)
        return replace(held, keys=held.keys.index_select(0, index), values=held.values.index_select(0, index))

    @property
    def rows(self) -> int:
        """Rows of the batch; 0 before the first token."""
        keys = self.state.keys
        return 0 if keys is None else int(keys.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(x.nbytes for x in (self.state.keys, self.state.values) if x is not None)

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Length and offset of the mask."""
        seen, behind = self.state.seen, self.sliding_window - 1
        return min(seen, behind) + block_size(query_length), max(seen - behind, 0)

    def get_max_length(self) -> int:
        """The window."""
        return self.sliding_window

    get_max_cache_shape = get_max_length
