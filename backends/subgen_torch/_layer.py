"""One layer of the cache: holds sketches instead of keys and values, and answers attention itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ._budget import Budget
from ._lanes import Block, Lanes
from ._padding import read_mask
from ._rollback import Tail

__all__ = ["SubGenLayer"]


class SubGenLayer(CacheLayerMixin):
    """Sketches of one layer's keys and values.

    `update` only hands the new keys over: the cache does not see the queries and the padding. The attention function
    finds the layer on the keys and calls `attend`.

    Parameters
    ----------
    budget : Budget
    prefill : {"exact", "streaming"}
    rollback : int
        Tokens of a block that can be taken back.
    """

    is_compileable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, budget: Budget, prefill: str, rollback: int) -> None:
        super().__init__()
        self.budget = budget
        self.prefill = prefill
        self.rollback = rollback
        self.record_past = False
        self._start()

    def _start(self) -> None:
        self.seen = 0
        self.awaited = False
        self.lanes = Lanes(self.budget)
        self.exact_nbytes_per_token = 0
        self._tail: Tail | None = None
        self._scale: float | None = None
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Note dtype and device."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Count the new tokens and hand the layer over on their keys: nothing is absorbed before `attend`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        numbers = key_states[:, :, :1].numel() + value_states[:, :, :1].numel()
        self.exact_nbytes_per_token = numbers * key_states.element_size()
        self.seen += key_states.shape[2]
        self.awaited = True
        keys = key_states.view(key_states.shape)
        keys._subgen_layer = self
        return keys, value_states

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """Answer the tokens handed over, and absorb them.

        Parameters
        ----------
        queries : Tensor, shape (rows, q_heads, n, head_dim)
        keys, values : Tensor, shape (rows, kv_heads, n, ...)
        mask : bool Tensor, shape (rows, tokens so far), or None
            Which tokens are real.
        scale : float
            Factor of the logits.

        Returns
        -------
        Tensor, shape (rows, q_heads, n, value_dim)

        Raises
        ------
        ValueError
            If the rows or the mask are not those of this stream, or the factor changed.
        """
        self.awaited = False
        size = int(keys.shape[2])
        before = self.seen - size
        valid, past = read_mask(mask, before, size)
        self._check(int(keys.shape[0]), past, before, scale)
        block = Block(queries, keys, values, valid)
        self.lanes.open(block, scale)
        exact = self.prefill == "exact" and before == 0 and size > 1
        answer = self.lanes.exact(block, scale) if exact else None
        # Only blocks of more than one token are ever drafts, unless the decoder announces that it will take back.
        keep = min(size, self.rollback) if size > 1 or self.record_past else 0
        pieces = []
        if size > keep:
            self._tail = None
            pieces.append(self._absorb(block.columns(slice(0, size - keep)), exact))
        if keep:
            last = block.columns(slice(size - keep, size))
            if self._tail is None or not self.record_past:
                self._tail = Tail(self.lanes.copy(), self.rollback)
            self._tail.append(last, self.lanes)
            pieces.append(self._absorb(last, exact))
        if answer is None:
            answer = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)
        return answer

    def _absorb(self, block: Block, answered: bool) -> Tensor:
        if not answered:
            return self.lanes.step(block)
        self.lanes.update(block)
        return block.queries

    def _check(self, rows: int, past: tuple[int, ...] | None, before: int, scale: float) -> None:
        held = self.lanes.counts
        if held and len(held) != rows:
            raise ValueError(
                f"the cache holds a batch of {len(held)} rows, got {rows}: start another cache, or reset() this one"
            )
        if past is not None and held and past != held:
            raise ValueError(
                f"attention_mask says that {list(past)} of the {before} tokens before this block are real, but the "
                f"cache absorbed {list(held)}: what was absorbed cannot be masked later, nor can masked tokens come "
                f"back. Pass the mask of the earlier calls, extended"
            )
        if past is None and any(count != before for count in held):
            raise ValueError(
                f"earlier calls had padding (the rows hold {list(held)} of {before} tokens) and this one has no "
                f"attention_mask: pass one over the whole sequence"
            )
        if self._scale is not None and scale != self._scale:
            raise ValueError(f"the factor of the logits was {self._scale} and is now {scale}: it must not change")
        self._scale = scale

    @property
    def is_croppable(self) -> bool:
        """Whether tokens can be taken back: from 5.24 on, transformers drafts tokens only for caches that say so."""
        return self.rollback > 0

    def crop(self, max_length: int) -> None:
        """Take tokens back: ``-n`` removes n; a positive number is the length to keep, as in older releases.

        Raises
        ------
        ValueError
            If more tokens are to be removed than can be taken back.
        """
        tokens = -max_length if max_length <= 0 else max(0, self.seen - max_length)
        if tokens == 0:
            self._tail = None
            return
        most = 0 if self._tail is None else self._tail.size
        if self._tail is None or tokens > most:
            raise ValueError(
                f"crop was to remove {tokens} of {self.seen} tokens, and the last {most} can be taken back: the rest "
                f"is in the summary. Only the last block of a call can be, up to rollback={self.rollback} tokens of it"
            )
        self.lanes = self._tail.take_back(tokens)
        self.seen -= tokens

    def activate_past_recording(self) -> None:
        """Keep the last tokens of any block: a decoder is going to take some back."""
        self.record_past = True

    def get_seq_length(self, *args: Any) -> int:
        """Tokens seen, padding included: positions follow it, not what is held."""
        return self.seen

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Length and offset of the mask; releases before 5 pass the positions of the new tokens."""
        size = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.seen + size, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    get_max_cache_shape = get_max_length

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.lanes.nbytes + (0 if self._tail is None else self._tail.nbytes)

    def reset(self) -> None:
        """Forget everything."""
        self._start()

    def offload(self) -> None:
        """Refuse: a sketch stays on the device of its stream."""
        raise NotImplementedError("a SubGenCache is not offloaded: it is small enough to stay on the device")

    prefetch = offload

    def reorder_cache(self, beam_idx: Tensor | list[int]) -> None:
        """Pick rows of the batch, in this order."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor | list[int]) -> None:
        """Pick rows of the batch, in this order."""
        rows = indices.tolist() if isinstance(indices, Tensor) else indices
        held = len(self.lanes.counts)
        if held and rows != list(range(held)):
            self.lanes.select(rows)
            if self._tail is not None:
                self._tail.select(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self.batch_select_indices([row for row in range(len(self.lanes.counts)) for _ in range(repeats)])
