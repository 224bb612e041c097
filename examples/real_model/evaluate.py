"""What a real model loses when its cache is compressed: RULER's tasks and text, exact cache and cluster means.

``make evaluate`` runs a small set on SmolLM2-135M-Instruct. Answers are lines of JSON in a file: a run that was stopped
continues where it was. ``presses.py`` adds the methods of kvpress, and ``report.py`` makes tables and plots.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from protocol import (
    EXACT,
    Budgets,
    Filled,
    Folder,
    Haystack,
    Lengths,
    Protocols,
    Samples,
    Tasks,
    cache_name,
    load,
    numbers,
    run,
)
from subgen_torch.transformers import SubGenCache, enable
from subgen_torch.transformers.functions import subgen_attention
from subgen_torch.transformers.recording import Recorded, recorded
from torch import Tensor
from transformers import DynamicCache

#: Name and storage.
METHODS = {"cluster means": "input", "cluster means, int8": "int8"}


def fill(model: Any, kept: Sequence[float], dtype: torch.dtype, ids: Tensor) -> Iterator[Filled]:
    """Read a context once, and compress it by every method at every budget.

    The caches hold that dtype, and bytes are counted in it, whatever the model computes in: a cluster in int8 takes a
    quarter of the bytes of an entry in float32, and half of those in 16 bits, which models run in.
    """
    exact, start = DynamicCache(config=model.config), time.perf_counter()
    with recorded(model) as layers:
        model.base_model(ids, **{cache_name(model): exact})
    seconds = time.perf_counter() - start
    nbytes = sum(x.numel() * dtype.itemsize for layer in exact.layers for x in (layer.keys, layer.values))
    yield Filled(EXACT, 1.0, exact, nbytes, seconds)
    for share in kept:
        for method, storage in METHODS.items():
            start = time.perf_counter()
            cache = SubGenCache(model.config, compression_ratio=1 - share, storage=storage)
            # A cache that began under autocast takes tokens of any dtype afterwards.
            with torch.autocast("cpu", dtype=dtype, enabled=dtype != layers[0].keys.dtype):
                for index, layer in sorted(layers.items()):
                    absorb(cache, index, layer)
            more = time.perf_counter() - start
            yield Filled(method, share, cache, cache.report().total.nbytes, seconds + more)


def absorb(cache: SubGenCache, index: int, layer: Recorded) -> None:
    """Give a layer of the cache what the model gave to attention. It attends once more, which counts in the time."""
    keys, values = cache.update(layer.keys, layer.values, index)
    subgen_attention(layer.module, layer.queries, keys, values, None, scaling=layer.scale)


def main(
    folder: Folder,
    text: Haystack,
    out: Annotated[Path, typer.Option(help="File of answers, as lines of JSON; another for other budgets.")] = Path(
        "build/real/subgen.jsonl"
    ),
    tasks: Tasks = "single_2,prose",
    lengths: Lengths = "1536",
    budgets: Budgets = "0.25,0.1",
    protocols: Protocols = "excluded",
    samples: Samples = 8,
    dtype: Annotated[str, typer.Option(help="Of the model.")] = "float32",
    cache_dtype: Annotated[str, typer.Option(help="Of the caches: bytes are counted in it.")] = "bfloat16",
) -> None:
    """Answer questions from an exact cache, from cluster means and from cluster means in int8."""
    # Two calls a cache, of which the second is no part of the prompt: the warning about chunks is not for us.
    logging.getLogger("subgen_torch").setLevel(logging.ERROR)
    model, tokenizer = load(folder, dtype=dtype)
    enable(model)
    run(
        model,
        tokenizer,
        partial(fill, model, numbers(budgets), getattr(torch, cache_dtype)),
        tasks=tasks,
        lengths=lengths,
        protocols=protocols,
        samples=samples,
        text=text,
        path=out,
    )


if __name__ == "__main__":
    typer.run(main)
