"""SubGen in `model.generate`: a cache for transformers that answers attention from sketches.

>>> from subgen_torch.transformers import SubGenCache, enable      # doctest: +SKIP
>>> enable(model)                                                  # doctest: +SKIP
>>> cache = SubGenCache(model.config, max_clusters=512)            # doctest: +SKIP
>>> model.generate(**inputs, cache=cache)                          # doctest: +SKIP
>>> print(cache.report())                                          # doctest: +SKIP
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

try:
    import transformers as _transformers  # noqa: F401
except ImportError as error:  # pragma: no cover
    raise ImportError(
        "subgen_torch.transformers needs the transformers library, 4.57 or newer: pip install "
        "'subgen-attention[transformers]'"
    ) from error

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

from subgen._checks import check_integer
from subgen.means import Storage

from ._budget import budgets
from ._families import layer_kinds, refuse_model
from ._functions import subgen_attention, subgen_mask
from ._layer import SubGenLayer
from ._report import CacheReport, LayerReport

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CacheReport", "LayerReport", "SubGenCache", "disable", "enable"]

_log = logging.getLogger(__name__)
_NAME = "subgen"

AttentionInterface.register(_NAME, subgen_attention)
AttentionMaskInterface.register(_NAME, subgen_mask)


def enable(model: Any) -> None:
    """Switch a model's attention to "subgen": plain attention, until it is given a `SubGenCache`.

    Parameters
    ----------
    model : transformers.PreTrainedModel

    Raises
    ------
    ValueError
        If the model is of a family that cannot work; the message says why.
    """
    refuse_model(model)
    previous = model.config._attn_implementation
    if previous != _NAME:
        model.set_attn_implementation(_NAME)
        model._subgen_previous = previous


def disable(model: Any) -> None:
    """Give a model back the attention it had before `enable`.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    """
    previous = getattr(model, "_subgen_previous", None)
    if previous is not None and model.config._attn_implementation == _NAME:
        model.set_attn_implementation(previous)


class SubGenCache(Cache):
    """Past keys and values as sketches, for a model's ``cache``; the model must be switched on with `enable`.

    Before transformers 5.24 the argument ``cache`` of models and of ``generate`` is called ``past_key_values``.

    Layers that slide over a window stay exact: their memory is bounded as it is. The seeds, dtype and device are
    those of each layer's first tokens. The cache is for one batch; call `reset` before another.

    Parameters
    ----------
    config : transformers.PretrainedConfig
        The model's.
    max_clusters : int or sequence of int, optional
        Clusters held for each key-value head, besides the sinks and the window: for all layers, or for each.
    compression_ratio : float or sequence of float, optional
        Instead: the share of (key, value) pairs *removed*, in ``[0, 1)``. ``(1 - ratio)`` times the tokens of the
        first call, the prompt, is the number of pairs from then on, sinks and window included; the window shrinks to
        leave five sixths of them to clusters. A prompt that comes in chunks needs ``max_clusters``.
    window : int
        Last tokens kept exactly.
    sink : int
        First tokens kept exactly.
    storage : {"input", "int8"}
        What clusters are held in: the dtype of the model, or 8 bits, which makes a cluster about half as large for
        models in 16 bits; ``compression_ratio`` then holds as many as fit into the bytes of its pairs.
    seed : int
        In ``[0, 2**64)``.
    prefill : {"exact", "streaming"}
        How the first call is answered: with exact attention, and compressed after it; or each token from what the
        sketch holds at that moment. Later calls, and so the later chunks of a prompt that comes in chunks, always
        are streaming.
    rollback : int
        How many of a call's tokens can be taken back, for speculative decoding: at least as many as are drafted at
        once. Until the next call the last tokens are kept for it, and the state before them, if there were more than
        one. 0 keeps nothing: half the memory where long text is streamed in blocks.

    Raises
    ------
    TypeError, ValueError
        If an argument is out of bounds, or the model is of a family that cannot work.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from subgen_torch.transformers import SubGenCache, enable
    >>> sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, vocab_size=64)
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    >>> enable(model)
    >>> cache = SubGenCache(model.config, max_clusters=32, window=16)
    >>> prompt = torch.randint(3, 64, (1, 200))
    >>> tokens = model.generate(prompt, cache=cache, max_new_tokens=8, do_sample=False, eos_token_id=None)
    >>> tokens.shape, cache.get_seq_length()
    (torch.Size([1, 208]), 207)
    >>> cache.report().layers[0].n_clusters
    32
    """

    def __init__(
        self,
        config: Any,
        *,
        max_clusters: int | Sequence[int] | None = None,
        compression_ratio: float | Sequence[float] | None = None,
        window: int = 128,
        sink: int = 4,
        storage: Storage = "input",
        seed: int = 0,
        prefill: str = "exact",
        rollback: int = 64,
    ) -> None:
        kinds = layer_kinds(config)
        if prefill not in ("exact", "streaming"):
            raise ValueError(f"prefill must be 'exact' or 'streaming', got {prefill!r}")
        rollback = check_integer("rollback", rollback, minimum=0)
        each = budgets(
            len(kinds), max_clusters, compression_ratio, window=window, sink=sink, seed=seed, storage=storage
        )
        super().__init__(
            layers=[
                SubGenLayer(budget, prefill, rollback) if slide is None else DynamicSlidingWindowLayer(slide)
                for budget, slide in zip(each, kinds, strict=True)
            ]
        )
        self._by_ratio = compression_ratio is not None
        self._calls = 0

    @torch.compiler.disable
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hand new keys and values to a layer.

        Raises
        ------
        RuntimeError
            If the tokens of an earlier call were never attended to: another attention function runs, or the model
            changes the keys on their way to it.
        """
        for number, layer in enumerate(self.layers):
            if getattr(layer, "awaited", False):
                raise RuntimeError(
                    f"layer {number} handed its keys over to attention, and nobody took them: the answers would be "
                    f"silently wrong. Switch the model on with subgen_torch.transformers.enable(model); if it is, this "
                    f"family changes keys between the cache and attention and cannot use a SubGenCache. The cache "
                    f"must be reset() before it is used again"
                )
        if layer_idx == 0:
            self._note_chunks(key_states.shape[2])
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return keys, values

    def _note_chunks(self, size: int) -> None:
        self._calls += 1
        if self._by_ratio and self._calls == 2 and size > 1:
            _log.warning(
                "a second call of more than one token: compression_ratio counted the first call alone as the prompt. "
                "Use max_clusters for a prompt that comes in chunks"
            )

    def reset(self) -> None:
        """Forget everything; budgets stay."""
        super().reset()
        self._calls = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Pick rows of the batch, for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Pick rows of the batch, in this order; they may repeat."""
        rows = indices.tolist()  # once for all layers, as it waits for the device
        for layer in self.layers:
            layer.batch_select_indices(rows if isinstance(layer, SubGenLayer) else indices)

    def report(self) -> CacheReport:
        """Tell what each layer holds, and what an exact cache would."""
        return CacheReport(tuple(_report(layer) for layer in self.layers))


def _report(layer: Any) -> LayerReport:
    if isinstance(layer, SubGenLayer):
        clusters = [int(torch.as_tensor(sketch.n_clusters).max()) for sketch in layer.lanes.sketches]
        return LayerReport(
            kind="sketch",
            n_seen=layer.seen,
            n_clusters=max(clusters, default=0),
            nbytes=layer.nbytes,
            exact_nbytes=layer.seen * layer.exact_nbytes_per_token,
        )
    held = [x for x in (layer.keys, layer.values) if x is not None and x.numel()]
    seen = layer.get_seq_length()
    nbytes = sum(x.numel() * x.element_size() for x in held)
    length = held[0].shape[-2] if held else 0
    return LayerReport("exact", seen, 0, nbytes, nbytes // length * seen if length else 0)
