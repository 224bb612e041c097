"""The last tokens, kept so that they can be taken back: speculative decoding drafts tokens and rejects some.

The state of a sketch never changes, so keeping one costs only its memory. Taking tokens back
means going to the state before them and absorbing again those that stay; the result is the same, as a sketch does not
depend on how its stream was cut.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .ragged import Block, RaggedBatch

__all__ = ["Rollback"]


@dataclass(frozen=True)
class Rollback:
    """The last blocks and the state before them.

    Attributes
    ----------
    before : RaggedBatch
        The state before the first of the blocks. Nothing changes it.
    least : int
        Tokens that can always be taken back; at most twice as many are kept.
    blocks : tuple of Block
    middle : tuple of RaggedBatch and int, or None
        A later state and the number of blocks before it: when enough tokens follow it, it takes the place of the
        first.
    """

    before: RaggedBatch
    least: int
    blocks: tuple[Block, ...] = ()
    middle: tuple[RaggedBatch, int] | None = None

    @property
    def size(self) -> int:
        """Tokens that can be taken back."""
        return sum(block.size for block in self.blocks)

    @property
    def nbytes(self) -> int:
        """Bytes held; arrays shared with the current state count again."""
        states = [self.before] if self.middle is None else [self.before, self.middle[0]]
        return sum(block.nbytes for block in self.blocks) + sum(state.nbytes for state in states)

    def append(self, block: Block, before: RaggedBatch) -> Rollback:
        """Return these blocks with one that comes after the others; ``before`` is the state before it."""
        blocks, middle = (*self.blocks, block.clone()), self.middle
        if middle is None and self.size >= self.least:
            middle = (before.copy(), len(self.blocks))
        if middle is not None and sum(x.size for x in blocks[middle[1] :]) >= self.least:
            first, start = middle
            return Rollback(first, self.least, blocks[start:])
        return replace(self, blocks=blocks, middle=middle)

    def take_back(self, tokens: int, scale: float) -> tuple[RaggedBatch, Rollback]:
        """Return the state without the last tokens, and the rollback of those that stay.

        The softmax scale is for rows whose first tokens are among them.
        """
        keep, kept = self.size - tokens, []
        for block in self.blocks:
            size = min(block.size, keep)
            if size:
                kept.append(block.columns(slice(0, size)))
            keep -= size
        batch = self.before.copy()
        for block in kept:
            batch.open(block, scale)
            batch.update(block)
        return batch, Rollback(self.before, self.least, tuple(kept))

    def select(self, rows: list[int]) -> Rollback:
        """Return the rollback of some rows of the batch."""
        middle = None if self.middle is None else (self.middle[0].select(rows), self.middle[1])
        return Rollback(self.before.select(rows), self.least, tuple(x.select(rows) for x in self.blocks), middle)
