"""The attention and mask functions that transformers calls under the name "subgen"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from .call import HandOver

__all__ = ["SketchLength", "subgen_attention", "subgen_mask"]

# Shape, behind the rows, of what stands for a mask that a sketch cannot have.
_OTHER_MASK = (0, 0, 0)

# What changes attention in ways that neither a sketch nor torch's kernel offers: parameter of the attention function,
# and its name for a reader.
_UNSUPPORTED = {
    "softcap": "soft-capped logits",
    "s_aux": "learned attention sinks",
}
_UNSUPPORTED_BY_SKETCHES = {
    **_UNSUPPORTED,
    "sliding_window": "a sliding window in a layer that its config calls full attention",
    "position_bias": "a bias by position",
    "head_mask": "a mask over heads",
}


class SketchLength(int):
    """The number of tokens behind a mask, where they are in a sketch; `subgen_mask` recognises one by it."""


def subgen_mask(batch_size: int, *args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """Make the mask of plain attention; for a sketch, hand the padding mask on as it is.

    Returns
    -------
    Tensor or None
        That of transformers' "sdpa", made at once: what it depends on, such as the length of a `StaticCache`, changes
        in place. For a sketch bool, of shape (rows, tokens so far), or (rows, 0) without padding.
    """
    if args:
        raise TypeError(f"the mask function takes keyword arguments, as transformers passes them; got {len(args)} more")
    if not isinstance(kwargs.get("kv_length"), SketchLength):
        made: Tensor | None = sdpa_mask(batch_size=batch_size, attention_mask=attention_mask, **kwargs)
        return made
    # A tensor of its own: what is read from it is noted on it.
    device = kwargs.get("device", "cpu")
    if kwargs.get("mask_function", causal_mask_function) is not causal_mask_function:
        # Whether a layer uses it is not known yet; attention refuses this shape.
        return torch.empty(batch_size, *_OTHER_MASK, dtype=torch.bool, device=device)
    if attention_mask is None:
        return torch.empty(batch_size, 0, dtype=torch.bool, device=device)
    mask = attention_mask.bool()
    return mask.view(mask.shape)


def subgen_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention from the sketches of a `SubGenCache`; without one, plain attention.

    Parameters
    ----------
    module : Module
        The attention layer.
    query : Tensor, shape (rows, q_heads, n, head_dim)
    key, value : Tensor, shape (rows, kv_heads, n, ...)
    attention_mask : Tensor or None
        From `subgen_mask`, or the caller's own of four dimensions.
    scaling : float, optional
        Softmax scale; ``None`` means ``head_dim ** -0.5``.
    dropout : float
    **kwargs
        What else the model passes.

    Returns
    -------
    Tensor, shape (rows, n, q_heads, value_dim)
    None
        No weights.

    Raises
    ------
    ValueError
        If the model wants an attention that cannot be answered.
    """
    handed: HandOver | None = getattr(key, "_subgen_layer", None)
    if handed is None:
        _refuse(_UNSUPPORTED, kwargs, module)
        if attention_mask is not None and _is_for_sketches(attention_mask):
            raise ValueError(
                f"{type(module).__name__} changes keys between the cache and attention (repeats or projects them, "
                f"say), so that a SubGenCache never meets the queries: use the model's own cache"
            )
        plain: Callable[..., tuple[Tensor, None]] = sdpa_attention_forward
        return plain(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    return _from_sketches(handed, module, query, key, value, attention_mask, scaling, dropout, kwargs), None


@torch.compiler.disable
def _from_sketches(
    handed: HandOver,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    given: dict[str, Any],
) -> Tensor:
    try:
        _refuse_for_sketches(module, mask, dropout, given)
        factor = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        padding = mask if mask is not None and mask.shape[1] else None
        with torch.no_grad():
            out = handed.attend(query.detach(), key.detach(), value.detach(), padding, factor)
            out = out.transpose(1, 2).contiguous()
    except BaseException:
        handed.abandon()
        raise
    if torch.is_grad_enabled() and query.requires_grad:
        out = _NoGradient.apply(out, query)
    return out


def _refuse_for_sketches(module: torch.nn.Module, mask: Tensor | None, dropout: float, given: dict[str, Any]) -> None:
    _refuse(_UNSUPPORTED_BY_SKETCHES, given, module)
    if not getattr(module, "is_causal", True):
        raise ValueError("a SubGenCache answers causal attention; this layer is not causal")
    if mask is not None and mask.shape[1:] == _OTHER_MASK:
        raise ValueError(
            "the model requests another mask than causality and padding (packed sequences, blocks that see each "
            "other, ...), which a SubGenCache does not have: use the model's own cache"
        )
    if mask is not None and mask.ndim != 2:
        raise ValueError(
            f"a SubGenCache takes an attention_mask of two dimensions, (rows, tokens); got {tuple(mask.shape)}. If it "
            f"was not yours, this family makes masks of its own and cannot use a SubGenCache in this release of "
            f"transformers"
        )
    if given.get("output_attentions"):
        raise ValueError("a SubGenCache has no attention weights to return: set output_attentions=False")
    if module.training and dropout:
        raise ValueError("a SubGenCache is for inference, and this model drops attention: call model.eval() first")


def _is_for_sketches(mask: Tensor) -> bool:
    """Whether `subgen_mask` made a mask for a sketch: that of plain attention has four dimensions."""
    shape = tuple(mask.shape)
    return shape[1:] == _OTHER_MASK or (len(shape) == 2 and bool(mask.dtype == torch.bool))


def _refuse(names: dict[str, str], given: dict[str, Any], module: torch.nn.Module) -> None:
    for name, what in names.items():
        if given.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} uses {what} ({name}), which the attention 'subgen' does not offer: use "
                f"subgen_torch.transformers.disable(model) and the model's own cache"
            )


class _NoGradient(torch.autograd.Function):
    """Passes a tensor on; a gradient that would be wrong is refused."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, query: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        raise RuntimeError("a SubGenCache is for inference: no gradient goes through it. Train without a cache")
