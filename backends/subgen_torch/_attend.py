"""Attention of many rows, in one buffer of logits, by torch's own operations. Builds no autograd graph."""

from __future__ import annotations

import torch
from torch import Tensor

from subgen.default.attend import upcast
from subgen.default.merging import bands
from subgen.default.quantization import from_roots
from subgen.default.state import State
from subgen.softmax import causal_bias

__all__ = ["attend", "weighted_attention"]


@torch.no_grad()
def weighted_attention(queries: Tensor, keys: Tensor, values: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Compute weighted softmax attention; see `subgen.softmax.weighted_attention`."""
    dtype = queries.dtype
    logits = torch.baddbmm(
        log_weights.expand(queries.shape[0], queries.shape[1], keys.shape[1]), queries, keys.to(dtype).mT
    )
    return _softmax(logits, [values])


@torch.no_grad()
def attend(state: State, rows: Tensor, causal: int = 0) -> tuple[Tensor, Tensor]:
    """Answer scaled queries from a state; see `subgen.default.attend.attend`."""
    clusters, n, dtype = state.clusters, state.exact.n, rows.dtype
    logits = torch.bmm(rows, state.exact.keys[:, :n].to(dtype).mT)
    if causal > 1:  # one token sees all
        logits.unflatten(1, (-1, causal)).add_(causal_bias(causal, n, 1, rows))
    values = [state.exact.values[:, :n]]
    if clusters.counts.shape[1]:
        means = torch.bmm(rows, upcast(clusters.keys, dtype).mT)
        # Half the variance of the logits of the members: the sum over a band's coordinates is head_dim / bands means.
        energy = (rows * rows).unflatten(-1, (bands(rows.shape[-1]), -1)).sum(dim=-1).mul_(0.5)
        half = torch.bmm(energy, from_roots(clusters.key_variance, dtype).mT)
        # Free places: the logarithm of 0 is -inf, the smaller of the two is, and so is the sum.
        log_counts = clusters.counts.to(dtype).log_().unsqueeze(1)
        means += torch.minimum(half, log_counts).add_(log_counts)
        logits = torch.cat([means, logits], dim=2)
        values.insert(0, upcast(clusters.values, dtype))
    return _softmax(logits, values)


def _softmax(logits: Tensor, values: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Compute outputs and logsumexp, from values for consecutive columns; writes into the logits."""
    peak = logits.amax(dim=-1, keepdim=True)
    # A row without any weight has a peak of -inf: zero in its place makes its weights zero instead of NaN.
    peak.masked_fill_(peak == -torch.inf, 0.0)
    weights = logits.sub_(peak).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    first = values[0].shape[1]
    outputs = torch.bmm(weights[:, :, :first], values[0].to(logits.dtype))
    if len(values) > 1:
        outputs.baddbmm_(weights[:, :, first:], values[1].to(logits.dtype))
    outputs.div_(torch.where(total == 0.0, torch.ones_like(total), total))
    return outputs, total.log_().add_(peak).squeeze(-1)
