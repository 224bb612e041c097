"""The last tokens, kept so that they can be taken back: speculative decoding drafts tokens and rejects some.

What a state of a sketch holds never changes, so that remembering one costs nothing but its memory. Taking tokens back
means going to the state before them and absorbing again those that stay; the result is the same, as a sketch does not
depend on how its stream was cut.
"""

from __future__ import annotations

from ._lanes import Block, Lanes

__all__ = ["Tail"]


class Tail:
    """The last blocks and the state before them.

    Parameters
    ----------
    before : Lanes
        The state before the first of the blocks. A copy that nothing else changes.
    least : int
        Tokens that can always be taken back; at most twice as many are kept.
    """

    def __init__(self, before: Lanes, least: int) -> None:
        self._before = before
        self._least = least
        self._blocks: list[Block] = []
        # A later state and the number of blocks before it: when enough tokens follow it, it takes the place of the
        # first.
        self._middle: tuple[Lanes, int] | None = None

    @property
    def size(self) -> int:
        """Tokens that can be taken back."""
        return sum(block.size for block in self._blocks)

    @property
    def nbytes(self) -> int:
        """Bytes held; arrays shared with the current state count again."""
        states = [self._before] if self._middle is None else [self._before, self._middle[0]]
        return sum(block.nbytes for block in self._blocks) + sum(state.nbytes for state in states)

    def append(self, block: Block, before: Lanes) -> None:
        """Remember a block that comes after the others, and the state before it."""
        if self._middle is None and self.size >= self._least:
            self._middle = (before.copy(), len(self._blocks))
        self._blocks.append(block.clone())
        if self._middle is not None and sum(x.size for x in self._blocks[self._middle[1] :]) >= self._least:
            self._before, first = self._middle
            self._blocks, self._middle = self._blocks[first:], None

    def take_back(self, tokens: int) -> Lanes:
        """Forget the last tokens; return the state without them."""
        keep, kept = self.size - tokens, []
        for block in self._blocks:
            size = min(block.size, keep)
            if size:
                kept.append(block.columns(slice(0, size)))
            keep -= size
        self._blocks, self._middle = kept, None
        lanes = self._before.copy()
        for block in kept:
            lanes.update(block)
        return lanes

    def select(self, rows: list[int]) -> None:
        """Pick rows of the batch."""
        self._before.select(rows)
        if self._middle is not None:
            self._middle[0].select(rows)
        self._blocks = [block.select(rows) for block in self._blocks]
