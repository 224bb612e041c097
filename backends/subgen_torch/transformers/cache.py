"""`SubGenCache`: past keys and values of a model as sketches."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.cache_utils import Cache

from subgen._checks import check_integer
from subgen.default.algorithm import Storage

from .budget import budgets
from .call import Calls
from .families import layer_kinds
from .functions import subgen_attention, subgen_mask
from .layer import SubGenLayer
from .operation import Operation, StateLayer, row_numbers
from .report import CacheReport, LayerReport
from .switch import NAME
from .window import WindowLayer

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SubGenCache"]

_log = logging.getLogger("subgen_torch.transformers")

AttentionInterface.register(NAME, subgen_attention)
AttentionMaskInterface.register(NAME, subgen_mask)


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
        leave five sixths of them to clusters. A prompt too short for its ratio, whose share holds less than the sinks,
        a window of 2 and 6 clusters, stays exact: the window is not shrunk, and there are as many clusters as the
        prompt has tokens, so that the next ``window / 2`` tokens are exact too. Padded rows have budgets of their
        own. A prompt that comes in chunks needs ``max_clusters``.
    window : int
        Last tokens kept exactly.
    sink : int
        First tokens kept exactly.
    storage : {"input", "int8"}
        What clusters are held in: the dtype of the model, or int8, which makes a cluster about half as large for
        models in 16 bits; ``compression_ratio`` then holds as many as fit into the bytes of its pairs.
    seed : int
        In ``[0, 2**64)``.
    prefill : {"exact", "streaming"}
        How the first call is answered: with exact attention, and compressed after it; or each token from what the
        sketch holds at that moment. Later calls, and so the later chunks of a prompt that comes in chunks, always
        are streaming.
    rollback : int
        How many of a call's tokens can be taken back. Speculative decoding (``prompt_lookup_num_tokens``,
        ``assistant_model``) needs at least as many as are drafted at once. Then the last tokens of a call, and the
        state before them, are kept until the next call: the memory of two caches.

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
        rollback: int = 0,
    ) -> None:
        if not isinstance(config, PretrainedConfig):
            what = "the model itself" if hasattr(config, "config") else f"{type(config).__name__}"
            raise TypeError(f"SubGenCache takes a model's configuration, got {what}: pass model.config")
        kinds = layer_kinds(config)
        if prefill not in ("exact", "streaming"):
            raise ValueError(f"prefill must be 'exact' or 'streaming', got {prefill!r}")
        rollback = check_integer("rollback", rollback, minimum=0)
        each = budgets(
            len(kinds), max_clusters, compression_ratio, window=window, sink=sink, seed=seed, storage=storage
        )
        layers: list[StateLayer[Any]] = [
            SubGenLayer(budget, prefill, rollback) if slide is None else WindowLayer(slide, rollback)
            for budget, slide in zip(each, kinds, strict=True)
        ]
        super().__init__(layers=layers)
        self._by_ratio = compression_ratio is not None
        self._calls = Calls(layers)

    @torch.compiler.disable
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hand new keys and values to a layer.

        Nothing that a layer does with them counts before the whole forward pass has succeeded.

        Raises
        ------
        RuntimeError
            If the tokens of an earlier layer were never attended to (another attention function runs, or the model
            changes the keys on their way to it), an earlier pass did not end, or two run at once.
        """
        call = self._calls.next_layer(layer_idx)
        if layer_idx == 0:
            self._note_chunks(key_states.shape[2])
        try:
            return self.layers[layer_idx].take(key_states, value_states, call)  # type: ignore[no-any-return]
        except BaseException:
            call.abandon()
            raise

    def _note_chunks(self, size: int) -> None:
        if self._by_ratio and self._calls.succeeded == 1 and size > 1:
            _log.warning(
                "a second call of more than one token: compression_ratio counted the first call alone as the prompt. "
                "Use max_clusters for a prompt that comes in chunks"
            )

    @torch.compiler.disable
    def get_seq_length(self, layer_idx: int = 0, *args: Any) -> int:
        """Tokens seen in the forward passes that succeeded, padding included."""
        length: int = self.layers[layer_idx].get_seq_length()
        return length

    @torch.compiler.disable
    def get_mask_sizes(self, query_length: Any, layer_idx: int) -> tuple[int, int]:
        """Length and offset of a layer's mask."""
        sizes: tuple[int, int] = self.layers[layer_idx].get_mask_sizes(query_length)
        return sizes

    def _replace(self, states: Sequence[Any]) -> None:
        """Replace the states of all layers, at once."""
        operation = Operation()
        for layer, state in zip(self.layers, states, strict=True):
            layer.propose(operation, state)
        operation.finished = True
        for layer in self.layers:
            layer.settle()

    def reset(self) -> None:
        """Forget everything; budgets stay."""
        self._calls.forget()
        self._replace([layer.empty for layer in self.layers])

    def crop(self, max_length: int) -> None:
        """Take tokens back, in all layers or in none.

        Parameters
        ----------
        max_length : int
            ``-n`` removes n tokens; a positive number is the length to keep, as in older releases. 0 removes nothing,
            and gives up taking back what was kept for it.

        Raises
        ------
        ValueError
            If a layer cannot take back as many. The cache is unchanged.
        """
        self._replace([layer.cropped(layer.to_remove(max_length)) for layer in self.layers])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Pick rows of the batch, for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Pick rows of the batch, in this order; they may repeat.

        Raises
        ------
        IndexError
            If a row is not in the batch. The cache is unchanged.
        """
        rows = row_numbers(indices, self.layers[0].rows)  # once for all layers, as it waits for the device
        self._select(rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._select([row for row in range(self.layers[0].rows) for _ in range(repeats)])

    def _select(self, rows: list[int]) -> None:
        if self.layers[0].rows:
            self._replace([layer.selected(rows) for layer in self.layers])

    def report(self) -> CacheReport:
        """Report the bytes of each layer, and those of an exact cache."""
        return CacheReport(tuple(_report(layer) for layer in self.layers))


def _report(layer: StateLayer[Any]) -> LayerReport:
    clusters = 0
    if isinstance(layer, SubGenLayer):
        clusters = max(
            (int(cast("Tensor", sketch.n_clusters).max()) for sketch in layer.batch.sketches if sketch.n_seen),
            default=0,
        )
    return LayerReport(
        kind="sketch" if isinstance(layer, SubGenLayer) else "exact",
        n_seen=layer.get_seq_length(),
        n_clusters=clusters,
        nbytes=layer.nbytes,
        exact_nbytes=layer.exact_nbytes,
    )
