"""The methods of kvpress on the samples of evaluate.py, in an environment of their own (``make evaluate-baselines``).

kvpress 0.5.5 needs transformers below 5.3. A context is read once; at each layer every press compresses a copy of its
keys and values, with the hidden states of that pass. H2O is left out: it needs attention weights, and AdaKV needs an
attention that gives none.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import kvpress
import torch
import typer
from protocol import EXACT, Budgets, Filled, Folder, Haystack, Lengths, Protocols, Samples, Tasks, load, numbers, run
from torch import Tensor
from transformers import DynamicCache


def presses(ratio: float) -> dict[str, Any]:
    """Return presses that remove a share of the KV entries."""
    return {
        "StreamingLLM": kvpress.StreamingLLMPress(ratio),
        "SnapKV": kvpress.SnapKVPress(ratio),
        "TOVA": kvpress.TOVAPress(ratio),
        "Knorm": kvpress.KnormPress(ratio),
        "KeyDiff": kvpress.KeyDiffPress(ratio),
        "Expected Attention": kvpress.ExpectedAttentionPress(ratio),
        "AdaKV, SnapKV": kvpress.AdaKVPress(kvpress.SnapKVPress(ratio)),
        "AdaKV, Expected Attention": kvpress.AdaKVPress(kvpress.ExpectedAttentionPress(ratio)),
    }


class Compressed:
    """The cache of one press.

    Parameters
    ----------
    method, kept, press
    """

    def __init__(self, method: str, kept: float, press: Any) -> None:
        self.method, self.kept, self.press = method, kept, press
        self.cache, self.seconds = DynamicCache(), 0.0
        # AdaKV keeps all entries and masks some: where, by layer.
        self.masked: dict[Any, Any] = {}

    def add(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any, keys: Tensor, values: Tensor) -> None:
        """Compress a layer."""
        start = time.perf_counter()
        self.cache.update(keys, values, module.layer_idx)
        module.masked_key_indices = None
        self.press.forward_hook(module, args, {**kwargs, "past_key_values": self.cache}, output)
        self.masked[module], module.masked_key_indices = module.masked_key_indices, None
        self.seconds += time.perf_counter() - start

    @property
    def nbytes(self) -> int:
        """Bytes of the entries that are not masked."""
        held = sum(x.nbytes for layer in self.cache.layers for x in (layer.keys, layer.values))
        layer = self.cache.layers[0]
        entry = sum(x.shape[-1] * x.element_size() for x in (layer.keys, layer.values))
        return held - entry * sum(len(where[0]) for where in self.masked.values() if where is not None)

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Mask what AdaKV masks."""
        for module, where in self.masked.items():
            module.masked_key_indices = where
        try:
            yield
        finally:
            for module in self.masked:
                module.masked_key_indices = None


def fill(model: Any, kept: Sequence[float], ids: Tensor) -> Iterator[Filled]:
    """Read a context once, and compress it by every press at every budget."""
    exact = DynamicCache()
    made = [Compressed(name, share, press) for share in kept for name, press in presses(1 - share).items()]

    def compress(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        layer = exact.layers[module.layer_idx]
        for one in made:
            one.add(module, args, kwargs, output, layer.keys, layer.values)

    hooks = []
    for one in made:
        one.press.post_init_from_model(model)
    for layer in model.model.layers:
        layer.self_attn.rotary_emb = model.model.rotary_emb
        hooks.append(layer.self_attn.register_forward_hook(compress, with_kwargs=True))
    start = time.perf_counter()
    try:
        model.model(ids, past_key_values=exact)
    finally:
        for hook in hooks:
            hook.remove()
    seconds = time.perf_counter() - start - sum(one.seconds for one in made)
    nbytes = sum(x.nbytes for layer in exact.layers for x in (layer.keys, layer.values))
    yield Filled(EXACT, 1.0, exact, nbytes, seconds)
    for one in made:
        yield Filled(one.method, one.kept, one.cache, one.nbytes, seconds + one.seconds, one.answering)


def main(
    folder: Folder,
    text: Haystack,
    out: Annotated[Path, typer.Option(help="File of answers, as lines of JSON; another for other budgets.")] = Path(
        "build/real/presses.jsonl"
    ),
    tasks: Tasks = "single_2,prose",
    lengths: Lengths = "1536",
    budgets: Budgets = "0.25,0.1",
    protocols: Protocols = "excluded",
    samples: Samples = 8,
) -> None:
    """Answer the questions of evaluate.py from caches that kvpress compressed."""
    logging.disable(logging.WARNING)
    model, tokenizer = load(folder)
    run(
        model,
        tokenizer,
        partial(fill, model, numbers(budgets)),
        tasks=tasks,
        lengths=lengths,
        protocols=protocols,
        samples=samples,
        text=text,
        path=out,
    )


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    typer.run(main)
