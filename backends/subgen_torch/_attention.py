"""Weighted attention, and attention over clusters, each in one buffer of logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from subgen import mass
from subgen.merging import bands
from subgen.rounding import Codes, from_roots, scale_unit
from subgen.weighted import causal_bias

from ._shared import NUMPY, by_numpy, reads_words

__all__ = ["coded_attention", "sketch_attention", "weighted_attention"]

# Up to this many rows NumPy's way is the faster one on a CPU, by a third for the rows of one token.
_FEW_ROWS = 32


@torch.no_grad()
def weighted_attention(queries: Tensor, keys: Tensor, values: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted softmax attention; see `subgen.weighted.weighted_attention`. Builds no autograd graph."""
    dtype = queries.dtype
    logits = torch.baddbmm(
        log_weights.expand(queries.shape[0], queries.shape[1], keys.shape[1]), queries, keys.to(dtype).mT
    )
    return _softmax(logits, values)


def sketch_attention(
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    counts: Tensor,
    spread: Tensor,
    causal: int = 0,
    weighted: Callable[..., tuple[Tensor, Tensor]] = weighted_attention,
) -> tuple[Tensor, Tensor]:
    """Attention over clusters, and over exact pairs behind them; see `subgen.mass.sketch_attention`.

    Log-weights go into the logits where they lie, and ``weighted`` is not called. Builds no autograd graph. A few rows
    on a CPU are answered by the NumPy backend, over the same memory.
    """
    if rows.shape[1] <= _FEW_ROWS and rows.device.type == "cpu":
        keys, values = _as_read(keys, rows.dtype), _as_read(values, rows.dtype)
        spread = spread if reads_words(spread) else from_roots(spread, rows.dtype)
        outputs, logsumexp = by_numpy(NUMPY.sketch_attention, rows, keys, values, counts, spread, causal)
        return torch.from_numpy(outputs), torch.from_numpy(logsumexp)
    with torch.no_grad():
        return _by_torch(rows, keys, values, counts, spread, causal)


def coded_attention(
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    counts: Tensor,
    spread: Tensor,
    key_codes: Codes,
    value_codes: Codes,
    causal: int,
    ops: Any,
) -> tuple[Tensor, Tensor]:
    """Attention over clusters in 8 bits, and over exact pairs; see `subgen.mass.coded_attention`.

    A few rows on a CPU are answered by the NumPy backend, over the same memory. Builds no autograd graph.
    """
    if rows.shape[1] > _FEW_ROWS or rows.device.type != "cpu":
        with torch.no_grad():
            return mass.coded_attention(rows, keys, values, counts, spread, key_codes, value_codes, causal, ops)
    keys, values = _as_read(keys, rows.dtype), _as_read(values, rows.dtype)
    spread = spread if reads_words(spread) else from_roots(spread, rows.dtype)
    codes = (Codes(x.codes, _scales_as_read(x.scales, rows.dtype)) for x in (key_codes, value_codes))
    outputs, logsumexp = by_numpy(NUMPY.coded_attention, rows, keys, values, counts, spread, *codes, causal, NUMPY)
    return torch.from_numpy(outputs), torch.from_numpy(logsumexp)


def _as_read(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast to the dtype to compute in, if the NumPy backend does not read what is given."""
    return x if x.dtype == dtype or reads_words(x) else x.to(dtype)


def _scales_as_read(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Do the same to scales of codes, which 16 bits hold in another unit."""
    if x.dtype == dtype or reads_words(x):
        return x
    return x.to(dtype).mul_(scale_unit(x.dtype, torch))


def _by_torch(
    rows: Tensor, keys: Tensor, values: Tensor, counts: Tensor, spread: Tensor, causal: int
) -> tuple[Tensor, Tensor]:
    m, clusters, dtype = rows.shape[1], counts.shape[1], rows.dtype
    logits = torch.bmm(rows, keys.to(dtype).mT)
    if clusters:
        # Half the variance of the logits of the members: the sum over a band's coordinates is head_dim / bands means.
        energy = (rows * rows).unflatten(-1, (bands(rows.shape[-1]), -1)).sum(dim=-1).mul_(0.5)
        half = torch.bmm(energy, from_roots(spread, dtype).mT)
        # Free places: the logarithm of 0 is -inf, the smaller of the two is, and so is the sum.
        log_counts = counts.to(dtype).log_().unsqueeze(1)
        logits[:, :, :clusters] += torch.minimum(half, log_counts).add_(log_counts)
    if causal > 1:  # one token sees all that is held
        by_head = logits.unflatten(1, (m // causal, causal))
        by_head[..., clusters:] += causal_bias(causal, keys.shape[1] - clusters, 1, rows)
    return _softmax(logits, values)


def _softmax(logits: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and logsumexp; writes into the logits."""
    peak = logits.amax(dim=-1, keepdim=True)
    # A row without any weight has a peak of -inf: zero in its place makes its weights zero instead of NaN.
    peak.masked_fill_(peak == -torch.inf, 0.0)
    weights = logits.sub_(peak).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    outputs = torch.bmm(weights, values.to(logits.dtype))
    outputs.div_(torch.where(total == 0.0, torch.ones_like(total), total))
    return outputs, total.log_().add_(peak).squeeze(-1)
