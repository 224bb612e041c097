"""A context in shards, one to a rank: every rank answers over its own tokens, and the answers are put together.

Attention over a union of tokens is the mean of the parts' outputs, weighted by the exponentials of their logsumexps, so
ranks exchange answers and never keys, values or clusters.
"""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor

from subgen import AttentionSketch
from subgen._checks import check_example
from subgen._inputs import outside_modes

__all__ = ["attend"]


@overload
def attend(sketch: AttentionSketch, queries: Tensor, *, group: dist.ProcessGroup | None = None) -> Tensor: ...


@overload
def attend(
    sketch: AttentionSketch,
    queries: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    return_logsumexp: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@outside_modes
@torch.no_grad()
def attend(
    sketch: AttentionSketch,
    queries: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    return_logsumexp: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Answer queries from the tokens of all ranks; every rank calls it, with the same queries.

    Two reductions of ``m * (value_dim + 1)`` numbers in all for each query head, whatever the shards hold.

    Parameters
    ----------
    sketch : subgen.AttentionSketch
        Of the tokens of this rank; it may be empty, unless all are.
    queries : Tensor, shape (..., q_heads, m, head_dim)
        Equal on all ranks.
    group : torch.distributed.ProcessGroup, optional
        Default: all ranks.
    return_logsumexp : bool
        Whether to return the logarithm of the denominator too.

    Returns
    -------
    outputs : Tensor, shape (..., q_heads, m, value_dim)
        Equal on all ranks, in the dtype of the queries.
    logsumexp : Tensor, shape (..., q_heads, m)
        If ``return_logsumexp``; float32, or float64 if the queries are.

    Raises
    ------
    RuntimeError
        If no rank has seen a token, or torch.distributed is not initialised.
    ValueError
        If the ranks' values differ in their last dimension.
    TypeError, ValueError
        As in `subgen.AttentionSketch.attend`. Raised on one rank alone it leaves the others waiting, as with every
        collective operation.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("no process group: call torch.distributed.init_process_group first, or run under torchrun")
    if not isinstance(sketch, AttentionSketch):
        raise TypeError(f"sketch must be a subgen.AttentionSketch, got {type(sketch).__name__}")
    queries = check_example("queries", queries)
    wide = torch.float64 if queries.dtype == torch.float64 else torch.float32
    if sketch.n_seen:
        output, logsumexp = sketch.attend(queries, return_logsumexp=True)
        value_dim = output.shape[-1]
    else:
        logsumexp = queries.new_full(queries.shape[:-1], -math.inf, dtype=wide)
        value_dim = 0
    # Besides the largest logsumexp, what a rank without tokens lacks: the greatest and the least value_dim.
    shape = logsumexp.new_tensor([value_dim, -value_dim if value_dim else -math.inf])
    peak = torch.cat([logsumexp.reshape(-1), shape])
    dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
    most, least = int(peak[-2]), -peak[-1]
    if most == 0:
        raise RuntimeError("every rank's sketch is empty: call update with keys and values before attend")
    if most != least:
        raise ValueError(f"value_dim is {int(least)} on one rank and {most} on another: it must be the same on all")
    peak = peak[:-2].reshape(logsumexp.shape)
    weight = torch.exp(logsumexp - peak)[..., None]
    part = torch.zeros((*queries.shape[:-1], most + 1), dtype=wide, device=queries.device)
    if value_dim:
        part[..., :-1] = output * weight
        part[..., -1:] = weight
    dist.all_reduce(part, group=group)
    total = part[..., -1:]
    outputs = (part[..., :-1] / total).to(queries.dtype)
    return (outputs, torch.log(total[..., 0]) + peak) if return_logsumexp else outputs
