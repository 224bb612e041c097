"""Changes that all layers of a cache show at once, or none of them.

A layer holds its state as one immutable value. An operation proposes a new value to each layer, and the proposals
count from the moment it is finished: one assignment. Whatever ends an operation early, an exception or an interrupt at
any place, there is nothing to undo.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

__all__ = ["Operation", "StateLayer", "block_size", "check_rows", "nbytes_per_token", "row_numbers"]


class LayerState(Protocol):
    """What every state of a layer has."""

    @property
    def seen(self) -> int:
        """Tokens seen, padding included."""

    @property
    def nbytes_per_token(self) -> int:
        """Bytes of an exact key and value."""


State = TypeVar("State", bound=LayerState)


class Operation:
    """A change of several layers."""

    __slots__ = ("finished",)

    def __init__(self) -> None:
        self.finished = False


class StateLayer(CacheLayerMixin, Generic[State]):
    """A layer of a cache whose state is one immutable value.

    Parameters
    ----------
    empty : State
        The state before the first token.
    """

    is_compileable = False
    supports_early_init = False

    def __init__(self, empty: State) -> None:
        self._empty = empty
        self._state = empty
        self._proposed: tuple[Operation, State] | None = None
        self.record_past = False
        super().__init__()

    @property
    def state(self) -> State:
        """What the last finished operation left."""
        proposed = self._proposed
        return proposed[1] if proposed is not None and proposed[0].finished else self._state

    def propose(self, operation: Operation, state: State) -> None:
        """Set the state that counts once the operation is finished; an earlier proposal is dropped."""
        self._state = self.state
        self._proposed = (operation, state)

    def settle(self) -> None:
        """Free what the layer held before the last finished operation, and what others proposed."""
        self._state = self.state
        self._proposed = None

    def drop(self, operation: Operation) -> None:
        """Free what an operation proposed that will not be finished."""
        if self._proposed is not None and self._proposed[0] is operation and not operation.finished:
            self._proposed = None

    def set_state(self, state: State) -> None:
        """Replace the state, in an operation of this layer alone."""
        operation = Operation()
        self.propose(operation, state)
        operation.finished = True
        self.settle()

    @abstractmethod
    def cropped(self, tokens: int) -> State:
        """Return the state without the last tokens; 0 gives up taking back what was kept for it.

        Raises
        ------
        ValueError
            If they cannot be taken back.
        """

    @abstractmethod
    def selected(self, rows: list[int]) -> State:
        """Return the state of some rows of the batch, in this order; they may repeat."""

    @property
    @abstractmethod
    def rows(self) -> int:
        """Rows of the batch; 0 before the first token."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held."""

    @property
    def exact_nbytes(self) -> int:
        """Bytes of all keys and values seen."""
        return self.state.seen * self.state.nbytes_per_token

    def get_seq_length(self, *args: Any) -> int:
        """Tokens seen, padding included: positions follow it, not what is held."""
        return self.state.seen

    def to_remove(self, max_length: int) -> int:
        """Tokens that ``crop(max_length)`` removes: ``-n`` is n; older releases pass the length to keep."""
        return -max_length if max_length <= 0 else max(0, self.get_seq_length() - max_length)

    def crop(self, max_length: int) -> None:
        """Take tokens back in this layer; see `SubGenCache.crop`."""
        self.set_state(self.cropped(self.to_remove(max_length)))

    def reset(self) -> None:
        """Forget everything."""
        self.set_state(self._empty)

    @property
    def empty(self) -> State:
        """The state before the first token."""
        return self._empty

    def reorder_cache(self, beam_idx: Tensor | list[int]) -> None:
        """Pick rows of the batch, in this order."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor | list[int]) -> None:
        """Pick rows of the batch, in this order."""
        self.set_state(self.selected(row_numbers(indices, self.rows)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self.batch_select_indices([row for row in range(self.rows) for _ in range(repeats)])

    def activate_past_recording(self) -> None:
        """Keep the last tokens of any block: a decoder is going to take some back."""
        self.record_past = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Note dtype and device."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def offload(self) -> None:
        """Refuse: what is held stays on the device of its stream."""
        raise NotImplementedError("a SubGenCache is not offloaded: it is small enough to stay on the device")

    prefetch = offload


def block_size(query_length: Any) -> int:
    """Return the number of new tokens; releases of transformers before 5 pass their positions."""
    size: int = query_length if isinstance(query_length, int) else query_length.shape[0]
    return size


def nbytes_per_token(*arrays: Tensor) -> int:
    """Count the bytes that keys and values take for each token."""
    return sum(x[:, :, :1].nbytes for x in arrays)


def check_rows(held: int, rows: int) -> None:
    """Raise if a block has not as many rows as the cache holds."""
    if held != rows:
        raise ValueError(
            f"the cache holds a batch of {held} rows, got {rows}: start another cache, or reset() this one"
        )


def row_numbers(indices: Tensor | list[int], held: int) -> list[int]:
    """Return rows of a batch as numbers from 0; negative ones count from the end, booleans say which rows stay.

    Raises
    ------
    IndexError
        If a row is not in the batch.
    """
    if isinstance(indices, Tensor):
        indices = torch.nonzero(indices)[:, 0].tolist() if indices.dtype == torch.bool else indices.tolist()
    rows = [row + held if row < 0 else row for row in indices]
    if held and any(not 0 <= row < held for row in rows):
        raise IndexError(f"the cache holds a batch of {held} rows, got the indices {list(indices)}")
    return rows
