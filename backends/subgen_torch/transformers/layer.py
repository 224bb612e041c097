"""One layer of the cache: holds sketches instead of keys and values, and answers attention itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from subgen._inputs import autocast_off

from .budget import Budget
from .call import Call
from .dtypes import Dtypes
from .functions import SketchLength
from .operation import StateLayer, block_size, check_rows, nbytes_per_token
from .padding import read_mask
from .ragged import Block, RaggedBatch
from .rollback import Rollback

__all__ = ["SubGenLayer"]


@dataclass(frozen=True)
class _State:
    """What a layer holds.

    Attributes
    ----------
    batch : RaggedBatch
        Never changed: a copy absorbs.
    seen : int
        Tokens, padding included.
    rollback : Rollback or None
        The last tokens, where they can be taken back.
    scale : float or None
        Softmax scale; ``None`` before the first token, as are the dtypes.
    dtypes : Dtypes or None
    nbytes_per_token : int
        Of exact keys and values.
    """

    batch: RaggedBatch
    seen: int = 0
    rollback: Rollback | None = None
    scale: float | None = None
    dtypes: Dtypes | None = None
    nbytes_per_token: int = 0


class SubGenLayer(StateLayer[_State]):
    """Sketches of one layer's keys and values.

    `take` only hands the new keys over: the cache does not see the queries and the padding. The attention function
    finds the hand-over on the keys, and calls it.

    Parameters
    ----------
    budget : Budget
    prefill : {"exact", "streaming"}
    rollback : int
        Tokens of a block that can be taken back.
    """

    is_sliding = False

    def __init__(self, budget: Budget, prefill: str, rollback: int) -> None:
        super().__init__(_State(RaggedBatch(budget)))
        self.prefill = prefill
        self.rollback = rollback

    @property
    def batch(self) -> RaggedBatch:
        """The sketches."""
        return self.state.batch

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hand tokens over in this layer alone; a cache calls `take`."""
        return self.take(key_states, value_states, Call.alone(self))

    def take(self, key_states: Tensor, value_states: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """Hand the layer over on the new keys: nothing is absorbed before they are attended to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys = key_states.view(key_states.shape)
        keys._subgen_layer = call.hand_over(self)
        return keys, value_states

    def answered(
        self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, _State]:
        """Answer the tokens handed over; return the answers and the state that has absorbed them.

        Parameters
        ----------
        queries : Tensor, shape (rows, q_heads, n, head_dim)
        keys, values : Tensor, shape (rows, kv_heads, n, ...)
        mask : bool Tensor, shape (rows, tokens so far), or None
            Which tokens are real.
        scale : float
            Softmax scale.

        Returns
        -------
        Tensor, shape (rows, q_heads, n, value_dim)
            In the dtype that exact attention would give.
        _State

        Raises
        ------
        TypeError, ValueError
            If the rows or the mask are not those of this stream, or the scale or the dtype changed.
        """
        held = self.state
        size = int(keys.shape[2])
        valid, past = read_mask(mask, held.seen, size)
        self._check(held, int(keys.shape[0]), past, scale)
        dtypes = Dtypes.of(queries, keys, values, held.dtypes)
        with autocast_off(keys):
            block = Block(*dtypes.cast(queries, keys, values), valid=valid)
            answer, batch, rollback = self._absorbed(held, block, scale)
        state = _State(batch, held.seen + size, rollback, scale, dtypes, nbytes_per_token(keys, values))
        return dtypes.answered(answer), state

    def _absorbed(self, held: _State, block: Block, scale: float) -> tuple[Tensor, RaggedBatch, Rollback | None]:
        size, batch, rollback = block.size, held.batch.copy(), held.rollback
        batch.open(block, scale)
        exact = self.prefill == "exact" and held.seen == 0 and size > 1
        answer = batch.exact(block, scale) if exact else None
        # Only blocks of more than one token are ever drafts, unless the decoder announces that it will take back.
        keep = min(size, self.rollback) if size > 1 or self.record_past else 0
        pieces = []
        if size > keep:
            rollback = None
            pieces.append(_absorb(batch, block.columns(slice(0, size - keep)), exact))
        if keep:
            last = block.columns(slice(size - keep, size))
            if rollback is None or not self.record_past:
                rollback = Rollback(batch.copy(), self.rollback)
            rollback = rollback.append(last, batch)
            pieces.append(_absorb(batch, last, exact))
        if answer is None:
            answer = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)
        return answer, batch, rollback

    def _check(self, held: _State, rows: int, past: tuple[int, ...] | None, scale: float) -> None:
        counts = held.batch.counts
        if counts:
            check_rows(len(counts), rows)
        if past is not None and counts and past != counts:
            raise ValueError(
                f"attention_mask says that {list(past)} of the {held.seen} tokens before this block are real, but the "
                f"cache absorbed {list(counts)}: what was absorbed cannot be masked later, nor can masked tokens come "
                f"back. Pass the mask of the earlier calls, extended"
            )
        if past is None and any(count != held.seen for count in counts):
            raise ValueError(
                f"earlier calls had padding (the rows hold {list(counts)} of {held.seen} tokens) and this one has no "
                f"attention_mask: pass one over the whole sequence"
            )
        if held.scale is not None and scale != held.scale:
            raise ValueError(f"the softmax scale was {held.scale} and is now {scale}: it must not change")

    @property
    def is_croppable(self) -> bool:
        """Whether tokens can be taken back: from 5.24 on, transformers drafts tokens only for caches that say so."""
        return self.rollback > 0

    def cropped(self, tokens: int) -> _State:
        """Return the state without the last tokens; see `StateLayer`.

        Raises
        ------
        ValueError
            If more tokens are to be removed than can be taken back.
        """
        held = self.state
        if tokens == 0:
            return held if held.rollback is None else replace(held, rollback=None)
        most = 0 if held.rollback is None else held.rollback.size
        if held.rollback is None or held.scale is None or tokens > most:
            if not self.rollback:
                raise ValueError(
                    f"this cache takes no tokens back, and crop was to remove {tokens} of {held.seen}: make it with "
                    f"SubGenCache(..., rollback=64), which speculative decoding needs"
                )
            raise ValueError(
                f"crop was to remove {tokens} of {held.seen} tokens, and the last {most} can be taken back: the rest "
                f"is in the summary. Only the last block of a call can be, up to rollback={self.rollback} tokens of it"
            )
        with autocast_off(held.rollback.blocks[0].keys):
            batch, rollback = held.rollback.take_back(tokens, held.scale)
        return replace(held, batch=batch, rollback=rollback, seen=held.seen - tokens)

    def selected(self, rows: list[int]) -> _State:
        """Return the state of some rows of the batch; see `StateLayer`."""
        held = self.state
        if rows == list(range(self.rows)):
            return held
        rollback = None if held.rollback is None else held.rollback.select(rows)
        return replace(held, batch=held.batch.select(rows), rollback=rollback)

    @property
    def rows(self) -> int:
        """Rows of the batch; 0 before the first token."""
        return len(self.state.batch.counts)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        held = self.state
        return held.batch.nbytes + (0 if held.rollback is None else held.rollback.nbytes)

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Length and offset of the mask."""
        return SketchLength(self.state.seen + block_size(query_length)), 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    get_max_cache_shape = get_max_length


def _absorb(batch: RaggedBatch, block: Block, answered: bool) -> Tensor:
    if not answered:
        return batch.step(block)
    batch.prefill(block)
    return block.queries
