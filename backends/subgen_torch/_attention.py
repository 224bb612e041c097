"""Weighted attention in one buffer of logits."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["weighted_attention"]


@torch.no_grad()
def weighted_attention(queries: Tensor, keys: Tensor, values: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted softmax attention; see `subgen.weighted.weighted_attention`. Builds no autograd graph."""
    dtype = queries.dtype
    logits = torch.baddbmm(
        log_weights.expand(queries.shape[0], queries.shape[1], keys.shape[1]), queries, keys.to(dtype).mT
    )
    peak = logits.amax(dim=-1, keepdim=True)
    # A row without any weight has a peak of -inf: zero in its place makes its weights zero instead of NaN.
    peak.masked_fill_(peak == -torch.inf, 0.0)
    weights = logits.sub_(peak).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    outputs = torch.bmm(weights, values.to(dtype))
    outputs.div_(torch.where(total == 0.0, torch.ones_like(total), total))
    return outputs, total.log_().add_(peak).squeeze(-1)
