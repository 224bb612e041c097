"""Queries, keys and values of a model while it reads a text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from subgen._checks import check_choice, check_integer
from subgen.io.captures import Capture, FileError

from .families import layer_kinds
from .switch import check_model, switched

__all__ = ["CAPTURING", "Recorded", "capture", "capture_text", "capturing_attention", "recorded"]

#: The name in transformers of the attention that records.
CAPTURING = "subgen-capture"
_DTYPES = ("float16", "float32")
# Attribute of attention layers, while a block records: the attention function gets the layer, not the model.
_TO = "_subgen_recorded"


@dataclass(frozen=True)
class Recorded:
    """What one layer attended to, at the input of attention: keys and queries after rotary positions.

    Attributes
    ----------
    queries : Tensor, shape (rows, q_heads, n, head_dim)
    keys, values : Tensor, shape (rows, kv_heads, n, ...)
    scale : float
        Softmax scale.
    module : torch.nn.Module
        The attention layer.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    scale: float
    module: torch.nn.Module


def capturing_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Record the inputs of attention, then attend as transformers' "sdpa" does."""
    to: dict[int, Recorded] | None = getattr(module, _TO, None)
    if to is not None:
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        to[int(module.layer_idx)] = Recorded(query, key, value, scale, module)
    answer: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )
    return answer


AttentionInterface.register(CAPTURING, capturing_attention)
AttentionMaskInterface.register(CAPTURING, sdpa_mask)


@contextmanager
def recorded(model: Any) -> Iterator[dict[int, Recorded]]:
    """Record each layer's inputs of attention in forward passes inside the block; the last pass stays.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Afterwards it has the attention that it had before.

    Yields
    ------
    dict
        By index of the layer. Filled while the model runs.
    """
    check_model("recorded", model)
    layers: dict[int, Recorded] = {}
    parts = [part for part in model.modules() if hasattr(part, "layer_idx")]
    for part in parts:
        setattr(part, _TO, layers)
    try:
        with switched(model, CAPTURING):
            yield layers
    finally:
        for part in parts:
            delattr(part, _TO)


def capture(model: Any, input_ids: Tensor, *, layers: Sequence[int] | None = None, dtype: str = "float16") -> Capture:
    """Capture queries, keys and values of a text, for ``subgen.compare`` and ``subgen.plan``.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Of the families that `SubGenCache` takes.
    input_ids : int64 Tensor, shape (n,) or (1, n)
        The tokens of the text. Time and memory grow with n: all layers are held at once.
    layers : sequence of int, optional
        Their indices, counted from the end if negative. If ``None``, all that attend to all tokens: in a layer that
        slides over a window nothing is to be compressed.
    dtype : {"float16", "float32"}
        Of the arrays.

    Returns
    -------
    Capture
        The heads of all layers one after the other: q of shape ``(layers * q_heads, n, head_dim)``, k and v of shape
        ``(layers * kv_heads, n, ...)``.

    Raises
    ------
    TypeError, ValueError
        If the model is none of transformers, or of a family that cannot work; if input_ids are not one text, or a
        layer does not exist or slides over a window; if a number does not fit in float16.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from subgen_torch.transformers import capture
    >>> sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, vocab_size=64)
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    >>> found = capture(model, torch.arange(60))
    >>> found.q.shape, found.k.shape, found.v.shape
    ((8, 60, 16), (4, 60, 16), (4, 60, 16))
    """
    check_model("capture", model)
    check_choice("dtype", dtype, _DTYPES)
    kinds = layer_kinds(model.config)
    chosen = _chosen(layers, kinds)
    ids = input_ids if isinstance(input_ids, Tensor) else torch.as_tensor(input_ids)
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.ndim != 2 or ids.shape[0] != 1 or not ids.shape[1] or ids.is_floating_point():
        raise ValueError(
            f"input_ids must be the tokens of one text, integers of shape (n,) or (1, n): got {tuple(ids.shape)}, "
            f"{ids.dtype}"
        )
    with recorded(model) as found, torch.inference_mode():
        model.base_model(ids.to(model.device), use_cache=False)
    missing = [i for i in chosen if i not in found]
    if missing:
        raise ValueError(
            f"{type(model).__name__} does not call attention through transformers' interface in layers {missing}: "
            f"nothing can be captured there"
        )
    scales = sorted({found[i].scale for i in chosen})
    if len(scales) > 1:
        raise ValueError(f"the softmax scales of layers differ, {scales}: capture layers of one scale at a time")
    # A capture has no scale of its own: that of the model goes into the queries, over the usual one.
    factor = scales[0] * found[chosen[0]].queries.shape[-1] ** 0.5
    some = [found[i] for i in chosen]
    arrays = [
        np.concatenate([_array(x, dtype) for x in tensors])
        for tensors in ([x.queries.float() * factor for x in some], [x.keys for x in some], [x.values for x in some])
    ]
    return Capture(*arrays)


def capture_text(
    name: str, text: str, *, length: int, layers: Sequence[int] | None = None, dtype: str = "float16"
) -> Capture:
    """Load a model in float32, and capture the first tokens of a text.

    Parameters
    ----------
    name : str
        Folder or name of a model, with its tokenizer.
    text : str
    length : int
        Tokens read, if the text has so many.
    layers, dtype
        As in ``capture``.

    Returns
    -------
    Capture

    Raises
    ------
    FileError
        If the model or its tokenizer cannot be loaded.
    TypeError, ValueError
        As ``capture`` raises, or if the text is empty.
    """
    length = check_integer("length", length)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    except (OSError, ValueError) as error:
        raise FileError(f"{name}: no model with a tokenizer can be loaded from there: {error}") from error
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :length].long()
    if not ids.shape[1]:
        raise ValueError("the text is empty: there is nothing to read")
    return capture(model, ids, layers=layers, dtype=dtype)


def _chosen(layers: Sequence[int] | None, kinds: Sequence[int | None]) -> list[int]:
    full = [i for i, slide in enumerate(kinds) if slide is None]
    if layers is None:
        return full
    chosen = []
    for layer in layers:
        if not -len(kinds) <= layer < len(kinds):
            raise ValueError(f"layer {layer} does not exist: the model has {len(kinds)}")
        chosen.append(layer % len(kinds))
    sliding = [i for i in chosen if i not in full]
    if sliding:
        raise ValueError(f"layers {sliding} slide over a window and are kept exactly: choose some of {full}")
    if not chosen:
        raise ValueError(f"layers is empty: choose some of {full}")
    return chosen


def _array(x: Tensor, dtype: str) -> np.ndarray[Any, Any]:
    wide = x[0].float().cpu().numpy()
    if not np.isfinite(wide).all():
        raise ValueError("the model computed NaN or infinite numbers in attention: nothing can be measured on them")
    with np.errstate(over="ignore"):  # refused below
        narrow: np.ndarray[Any, Any] = wide.astype(dtype)
    if not np.isfinite(narrow).all():
        raise ValueError(f"numbers up to {abs(wide).max():.3g} do not fit in {dtype}: pass dtype='float32'")
    return narrow
