"""The attention and mask functions that transformers calls under the name "subgen"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

__all__ = ["subgen_attention", "subgen_mask"]

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


class _MaskRecipe:
    """What the mask function was told: the plain mask is made from it only where a layer needs one."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._arguments = arguments
        self._made: tuple[Tensor | None] | None = None

    @property
    def causal(self) -> bool:
        """Whether it is causality and padding, and nothing else."""
        return self._arguments.get("mask_function", causal_mask_function) is causal_mask_function

    def plain(self) -> Tensor | None:
        """Make the four-dimensional mask, once for all layers."""
        if self._made is None:
            self._made = (sdpa_mask(**self._arguments),)
        return self._made[0]


@torch.compiler.disable
def subgen_mask(batch_size: int, *args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    """Hand the padding mask on as it is, whatever the length of a layer's cache, and how to make the plain mask.

    Returns
    -------
    bool Tensor, shape (rows, tokens so far)
        Or (rows, 0) without padding.
    """
    if args:
        raise TypeError(f"the mask function takes keyword arguments, as transformers passes them; got {len(args)} more")
    if attention_mask is None:
        carrier = torch.empty(batch_size, 0, dtype=torch.bool)
    else:
        carrier = attention_mask.bool()
        carrier = carrier.view(carrier.shape)
    arguments = {"batch_size": batch_size, "attention_mask": attention_mask, **kwargs}
    carrier._subgen_mask = _MaskRecipe(arguments)
    return carrier


@torch.compiler.disable
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
        Factor of the logits; ``None`` means ``head_dim ** -0.5``.
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
    layer = getattr(key, "_subgen_layer", None)
    recipe = getattr(attention_mask, "_subgen_mask", None)
    _refuse(_UNSUPPORTED if layer is None else _UNSUPPORTED_BY_SKETCHES, kwargs, module)
    if layer is None:
        if recipe is not None:
            attention_mask = recipe.plain()
            if attention_mask is None and recipe.causal:
                kwargs.pop("is_causal", None)  # some models tell it from whether there is a mask, and saw ours
        elif attention_mask is not None and attention_mask.ndim == 2:
            raise ValueError(
                "the padding mask lost what was noted on it on its way through the model (a copy to another device "
                "does that): without a SubGenCache use attn_implementation='sdpa' here"
            )
        plain: Callable[..., tuple[Tensor, None]] = sdpa_attention_forward
        return plain(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    if not getattr(module, "is_causal", True):
        raise ValueError("a SubGenCache answers causal attention; this layer is not causal")
    if recipe is not None and not recipe.causal:
        raise ValueError(
            "the model asks for another mask than causality and padding (packed sequences, blocks that see each "
            "other, ...), which a SubGenCache does not have: use the model's own cache"
        )
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(
            f"a SubGenCache takes an attention_mask of two dimensions, (rows, tokens); got "
            f"{tuple(attention_mask.shape)}. If it was not yours, this family makes masks of its own and cannot use a "
            f"SubGenCache in this release of transformers"
        )
    if kwargs.get("output_attentions"):
        raise ValueError("a SubGenCache has no attention weights to return: set output_attentions=False")
    if module.training and dropout:
        raise ValueError("a SubGenCache is for inference, and this model drops attention: call model.eval() first")
    mask = attention_mask if attention_mask is not None and attention_mask.shape[1] else None
    factor = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    with torch.no_grad():
        out = layer.attend(query.detach(), key.detach(), value.detach(), mask, factor)
        out = out.transpose(1, 2).contiguous()
    if torch.is_grad_enabled() and query.requires_grad:
        out = _NoGradient.apply(out, query)
    return out, None


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
