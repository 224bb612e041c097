"""Ragged batches: rows with equally many tokens share one sketch, padded tokens enter none.

A sketch takes the same number of tokens in every row. Rows of different lengths therefore go into sketches of their
own, and a group that gets different numbers of tokens splits. A batch without padding stays one group.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from subgen import AttentionSketch

from .exact import causal_attention
from .padding import Valid

__all__ = ["Block", "RaggedBatch"]


@dataclass(frozen=True)
class Block:
    """Tokens of one forward pass.

    Attributes
    ----------
    queries : Tensor, shape (rows, q_heads, n, head_dim)
    keys : Tensor, shape (rows, kv_heads, n, head_dim)
    values : Tensor, shape (rows, kv_heads, n, value_dim)
    valid : Valid or None
        ``None``: all of them are real.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    valid: Valid | None

    @property
    def size(self) -> int:
        """Tokens in each row, padding included."""
        return int(self.keys.shape[2])

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(x.numel() * x.element_size() for x in (self.queries, self.keys, self.values))

    def columns(self, part: slice) -> Block:
        """Return some of the tokens of each row."""
        valid = None if self.valid is None else self.valid.columns(part)
        return Block(self.queries[:, :, part], self.keys[:, :, part], self.values[:, :, part], valid)

    def select(self, rows: list[int]) -> Block:
        """Return rows in this order."""
        index = torch.tensor(rows, device=self.keys.device)
        queries, keys, values = (x.index_select(0, index) for x in (self.queries, self.keys, self.values))
        return Block(queries, keys, values, None if self.valid is None else self.valid.select(rows))

    def clone(self) -> Block:
        """Return a copy that keeps no larger tensor alive."""
        return replace(self, queries=self.queries.clone(), keys=self.keys.clone(), values=self.values.clone())


@dataclass(frozen=True)
class _Group:
    """Rows of the batch with equal numbers of tokens, and their sketch; ``None`` before their first token."""

    rows: tuple[int, ...]
    sketch: AttentionSketch | None

    def pick(self, local: Sequence[int], rows: Sequence[int]) -> _Group:
        """Return the group of these of its rows, under new numbers."""
        sketch = self.sketch
        if sketch is not None:
            sketch = sketch.take(list(local)) if sketch.n_seen else copy.copy(sketch)
        return _Group(tuple(rows), sketch)


class RaggedBatch:
    """The sketches of one layer.

    Parameters
    ----------
    make : callable
        Gives a new sketch, from the number of tokens it starts with, the softmax scale, and keys and values.
    """

    def __init__(self, make: Callable[[int, float, Tensor, Tensor], AttentionSketch]) -> None:
        self._make = make
        self._groups: list[_Group] = []

    def copy(self) -> RaggedBatch:
        """Return a copy that later tokens do not change; the arrays are shared, as what a state holds never changes."""
        other = RaggedBatch(self._make)
        other._groups = [replace(group, sketch=copy.copy(group.sketch)) for group in self._groups]
        return other

    @property
    def sketches(self) -> list[AttentionSketch]:
        """The sketches that hold something."""
        return [group.sketch for group in self._groups if group.sketch is not None]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(sketch.nbytes for sketch in self.sketches)

    @property
    def counts(self) -> tuple[int, ...]:
        """Real tokens seen in each row."""
        seen = {row: 0 if group.sketch is None else group.sketch.n_seen for group in self._groups for row in group.rows}
        return tuple(seen[row] for row in range(len(seen)))

    def open(self, block: Block, scale: float) -> None:
        """Prepare for a block that comes next, whole or in parts: rows with their first tokens get their sketch.

        The block must have as many rows as the batch.
        """
        if not self._groups:
            self._groups = [_Group(tuple(range(block.keys.shape[0])), None)]
        counts = self._split(block)
        for number, group in enumerate(self._groups):
            count = counts[group.rows[0]]
            if group.sketch is None and count:
                self._groups[number] = replace(group, sketch=self._make(count, scale, block.keys, block.values))

    def prefill(self, block: Block) -> None:
        """Absorb the first tokens of the rows as whole prompts; rows that have tokens absorb theirs by `update`."""
        for _, sketch, part in self._parts(block):
            absorb = sketch.update if sketch.n_seen else sketch.prefill
            absorb(part.keys, part.values, queries=part.queries)

    def update(self, block: Block) -> None:
        """Absorb tokens."""
        for _, sketch, part in self._parts(block):
            sketch.update(part.keys, part.values, queries=part.queries)

    def step(self, block: Block) -> Tensor:
        """Absorb tokens and answer each as if they came one by one: (rows, q_heads, n, value_dim)."""
        parts = self._parts(block)
        return _gather([(index, sketch.step(p.queries, p.keys, p.values)) for index, sketch, p in parts], block)

    def exact(self, block: Block, scale: float) -> Tensor:
        """Answer the tokens of a block from the block alone, exactly; absorbs nothing."""
        parts = self._parts(block)
        return _gather([(index, causal_attention(p.queries, p.keys, p.values, scale)) for index, _, p in parts], block)

    def select(self, indices: list[int]) -> RaggedBatch:
        """Return a batch of some rows, in this order; they may repeat. This batch is unchanged."""
        place = {row: (group, local) for group in self._groups for local, row in enumerate(group.rows)}
        picked = []
        for group in self._groups:
            rows = [new for new, old in enumerate(indices) if place[old][0] is group]
            if rows:
                picked.append(group.pick([place[indices[new]][1] for new in rows], rows))
        other = RaggedBatch(self._make)
        other._groups = picked
        return other

    def _split(self, block: Block) -> tuple[int, ...]:
        """Split groups by the number of real tokens their rows get next; return these numbers."""
        counts = (block.size,) * block.keys.shape[0] if block.valid is None else block.valid.counts
        self._groups = [piece for group in self._groups for piece in _split(group, counts)]
        return counts

    def _parts(self, block: Block) -> list[tuple[Tensor | None, AttentionSketch, Block]]:
        """Return for each group the index of its real tokens, its sketch, and the block of its real tokens alone.

        The index is ``None`` where a group is the whole batch without padding.
        """
        counts = self._split(block)
        parts = []
        for group in self._groups:
            count = counts[group.rows[0]]
            if count and group.sketch is not None:
                index, part = _pick_real(block, group.rows, count)
                parts.append((index, group.sketch, part))
        return parts


def _gather(answers: list[tuple[Tensor | None, Tensor]], block: Block) -> Tensor:
    """Put the answers of the groups at their tokens; zero at padded ones."""
    rows, heads, n, _ = block.queries.shape
    out = None
    for index, answer in answers:
        if index is None:
            return answer
        if out is None:
            out = answer.new_zeros(rows * n, heads, answer.shape[-1])
        out[index.reshape(-1)] = answer.transpose(1, 2).flatten(0, 1)
    if out is None:
        return block.queries.new_zeros(rows, heads, n, block.values.shape[-1])
    return out.unflatten(0, (rows, n)).transpose(1, 2)


def _split(group: _Group, counts: tuple[int, ...]) -> list[_Group]:
    """Split a group by the number of real tokens its rows get next."""
    groups: dict[int, list[int]] = {}
    for local, row in enumerate(group.rows):
        groups.setdefault(counts[row], []).append(local)
    if len(groups) == 1:
        return [group]
    return [group.pick(local, [group.rows[i] for i in local]) for local in groups.values()]


def _pick_real(block: Block, rows: tuple[int, ...], count: int) -> tuple[Tensor | None, Block]:
    """Pick the real tokens of rows that have equally many, and their index in the flattened block."""
    total, n = block.keys.shape[0], block.size
    if count == n and rows == tuple(range(total)):
        return None, block
    if block.valid is None or count == n:
        columns = torch.arange(n, device="cpu").expand(len(rows), n)
    else:
        columns = block.valid.positions(list(rows))
    index = (torch.tensor(rows, device="cpu")[:, None] * n + columns).to(block.keys.device)

    def pick(x: Tensor) -> Tensor:
        flat = x.transpose(1, 2).flatten(0, 1)[index.reshape(-1)]
        return flat.unflatten(0, (len(rows), count)).transpose(1, 2)

    return index, Block(pick(block.queries), pick(block.keys), pick(block.values), None)
