"""Which tokens of a block are real: read from the device once a forward pass, shared by all layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Valid", "read_mask"]


@dataclass(frozen=True)
class Valid:
    """The real tokens of a padded block.

    Attributes
    ----------
    mask : bool Tensor, shape (rows, n)
        On the host.
    counts : tuple of int
        Real tokens of each row.
    """

    mask: Tensor
    counts: tuple[int, ...]

    def columns(self, part: slice) -> Valid | None:
        """Return the same for some of the columns; ``None`` if all tokens there are real."""
        return _valid(self.mask[:, part])

    def select(self, rows: list[int]) -> Valid:
        """Return the same for some of the rows, in this order."""
        return Valid(self.mask[rows], tuple(self.counts[row] for row in rows))

    def positions(self, rows: list[int]) -> Tensor:
        """Return the columns of the real tokens of rows that have equally many: int64, shape (rows, count)."""
        mask = self.mask[rows]
        return torch.nonzero(mask)[:, 1].reshape(len(rows), -1)


def _valid(mask: Tensor) -> Valid | None:
    counts = tuple(mask.sum(dim=-1).tolist())
    return None if all(count == mask.shape[1] for count in counts) else Valid(mask, counts)


def read_mask(mask: Tensor | None, seen: int, size: int) -> tuple[Valid | None, tuple[int, ...] | None]:
    """Read the padding mask of a forward pass.

    Parameters
    ----------
    mask : bool Tensor, shape (rows, at least seen + size), or None
        Over all tokens so far and the block; ``None`` if there is no padding.
    seen, size : int
        Tokens before the block, and in it.

    Returns
    -------
    valid : Valid or None
        Of the block; ``None`` if all of its tokens are real.
    past : tuple of int, or None
        Real tokens of each row before the block; ``None`` without a mask.

    Raises
    ------
    ValueError
        If the mask is shorter than the tokens it is about.
    """
    if mask is None:
        return None, None
    if mask.shape[-1] < seen + size:
        raise ValueError(
            f"attention_mask has {mask.shape[-1]} columns, but the cache has seen {seen} tokens and {size} are new: "
            f"pass a mask of {seen + size} columns over the whole sequence, padding of earlier turns included"
        )
    known = getattr(mask, "_subgen_read", None)
    if known is None or known[0] != (seen, size):
        # One transfer, as every one waits for the device.
        counts = torch.cat([mask[:, seen : seen + size].long(), mask[:, :seen].sum(dim=-1, keepdim=True)], dim=1).cpu()
        known = ((seen, size), _valid(counts[:, :-1].bool()), tuple(counts[:, -1].tolist()))
        mask._subgen_read = known
    return known[1], known[2]
