"""Exact attention as others would write it for speed: the yardsticks of the benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["causal_exact", "exact_decoders", "torch_or_none"]


def torch_or_none() -> Any:
    """Return the module, or None where it is not installed."""
    try:
        import torch
    except ImportError:
        return None
    return torch


def exact_decoders(queries: np.ndarray, keys: np.ndarray, values: np.ndarray) -> dict[str, Callable[[], Any]]:
    """Ways to answer one token's queries exactly, by name.

    Parameters
    ----------
    queries : array, shape (q_heads, 1, dim)
    keys, values : array, shape (kv_heads, n, dim)

    Returns
    -------
    dict of str to callable
    """
    heads, dim = keys.shape[0], keys.shape[-1]
    # The heads of a group are rows of one product: keys are read once.
    rows = queries.reshape(heads, -1, dim)
    turned = np.ascontiguousarray((rows * np.float32(dim**-0.5)).swapaxes(1, 2))

    def plain_numpy() -> np.ndarray:
        # Keys on the left: several times faster than the product of few rows with transposed keys.
        logits = np.ascontiguousarray(np.matmul(keys, turned).swapaxes(1, 2))
        logits -= logits.max(axis=-1, keepdims=True)
        np.exp(logits, out=logits)
        logits /= logits.sum(axis=-1, keepdims=True)
        return np.matmul(logits, values)

    found: dict[str, Callable[[], Any]] = {"numpy": plain_numpy}
    torch = torch_or_none()
    if torch is None:
        return found
    q, k, v = (torch.from_numpy(x) for x in (np.ascontiguousarray(rows), keys, values))
    turned_q = torch.from_numpy(turned)
    attention = torch.nn.functional.scaled_dot_product_attention

    def plain_torch() -> Any:
        return torch.bmm(torch.softmax(torch.bmm(q * dim**-0.5, k.mT), -1), v)

    def left_torch() -> Any:
        return torch.bmm(torch.softmax(torch.bmm(k, turned_q), 1).mT, v)

    return found | {
        "torch, fused": lambda: attention(q[None], k[None], v[None]),
        "torch, products": plain_torch,
        "torch, products with keys on the left": left_torch,
    }


def causal_exact(queries: np.ndarray, keys: np.ndarray, values: np.ndarray) -> Any:
    """Answer every token exactly by torch's fused causal attention; None without torch.

    The heads of a group in one call: head after head, threads share a head's tokens, of which the last take longest.
    """
    torch = torch_or_none()
    if torch is None:
        return None
    q, k, v = (torch.from_numpy(x) for x in (queries, keys, values))
    group = q.shape[0] // k.shape[0]
    q = q.reshape(k.shape[0], group, *q.shape[1:])
    k, v = (x[:, None].expand(-1, group, -1, -1) for x in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
