"""The methods of kvpress on the task of generate.py, in an environment of their own (`make examples-baselines`).

kvpress 0.5.5 needs transformers below 5.3. Left out: methods that need trained parts or a tokenizer (KVzip, KVzap,
DuoAttention, Q-Filters, DMS, ...), those that compress while decoding (CAM, ...), and KVgrad, which needs gradients and
takes one row at a time.

A press compresses the prompt; the tokens after it are added whole. A SubGenCache holds its number of pairs at all
times. Each method therefore runs twice: as it comes, and with so much less of the prompt that both hold equally many
on average.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kvpress
import torch
from task import MODEL, evaluate, read, samples
from transformers import AutoModelForCausalLM, DynamicCache


def presses(ratio: float) -> Iterator[tuple[str, str, Any]]:
    """Yield name, attention and press of each method; the ratio is the share removed."""
    yield "random", "sdpa", kvpress.RandomPress(ratio)
    yield "Knorm", "sdpa", kvpress.KnormPress(ratio)
    yield "StreamingLLM", "sdpa", kvpress.StreamingLLMPress(ratio)
    yield "SnapKV", "sdpa", kvpress.SnapKVPress(ratio)
    yield "TOVA", "sdpa", kvpress.TOVAPress(ratio)
    yield "H2O", "eager", kvpress.ObservedAttentionPress(ratio)
    yield "Expected Attention", "sdpa", kvpress.ExpectedAttentionPress(ratio)
    yield "KeyDiff", "sdpa", kvpress.KeyDiffPress(ratio)
    yield "LagKV", "sdpa", kvpress.LagKVPress(ratio)
    yield "PyramidKV", "sdpa", kvpress.PyramidKVPress(ratio)
    yield "leverage scores", "sdpa", kvpress.LeverageScorePress(ratio)
    yield "Compactor", "sdpa", kvpress.CompactorPress(ratio)
    yield "CUR", "sdpa", kvpress.CURPress(ratio)
    yield "non-causal attention", "sdpa", kvpress.NonCausalAttnPress(ratio)
    yield "CriticalKV", "sdpa", kvpress.CriticalKVPress(kvpress.ExpectedAttentionPress(ratio, use_vnorm=False))
    yield "AdaKV, Expected Attention", "sdpa", kvpress.AdaKVPress(kvpress.ExpectedAttentionPress(ratio))
    yield "AdaKV, SnapKV", "sdpa", kvpress.AdaKVPress(kvpress.SnapKVPress(ratio))
    yield "ChunkKV, SnapKV", "sdpa", kvpress.ChunkKVPress(kvpress.SnapKVPress(ratio))
    yield "merging, SnapKV", "sdpa", kvpress.MergingPress(kvpress.SnapKVPress(ratio))


def main() -> None:
    """Run them all and write the scores."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.25, 0.1])
    parser.add_argument("--out", type=Path, default=Path("build/baselines.json"))
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    models = {
        name: AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation=name).eval()
        for name in ("sdpa", "eager")
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    drawn = samples(options.samples)
    scores: dict[str, dict[str, Any]] = {}
    first, rest = len(drawn[0].prompt), len(drawn[0].rest)
    for budget, equal in itertools.product(options.budgets, (True, False)):
        kept = budget - (rest / 2 / first if equal else 0.0)
        for name, attention, press in presses(1.0 - kept):
            model = models[attention]

            def answer(prompt: Any, rest: Any, model: Any = model, press: Any = press) -> Any:
                cache = DynamicCache(config=model.config)
                with press(model):
                    start = read(model, prompt, cache)[:, -1:]
                # The cache forgot how long the prompt was.
                places = prompt.shape[1] + torch.arange(rest.shape[1])[None].expand(len(rest), -1)
                more = read(model, rest, cache, position_ids=places)[:, :-1]
                return torch.cat([start, more], dim=1)

            name = name if equal else f"{name} (growing)"
            try:
                score = evaluate(drawn, answer)
            except RuntimeError as error:
                # ChunkKV at a few dozen pairs leaves layers of different lengths, which one mask cannot serve.
                print(f"{budget:.0%}  {name:36}  does not run: {error}", flush=True)
                continue
            scores.setdefault(str(budget), {})[name] = dataclasses.asdict(score)
            print(f"{budget:.0%}  {name:36}  {score}", flush=True)
            # After each, so that a run that is stopped loses nothing.
            options.out.write_text(json.dumps({"samples": options.samples, "scores": scores}, indent=2) + "\n")


if __name__ == "__main__":
    main()
