"""The baselines: other ways to hold a long context in few KV entries, each a pure function, compared at equal bytes.

Offline tools in plain NumPy: a baseline sees a whole prefix at once (`subgen.evaluation.baselines.prefix.Prefix`). It
returns an object that answers queries (`subgen.evaluation.baselines.prefix.Answers`), most often weighted KV entries
(`subgen.evaluation.baselines.prefix.Summary`). One method a file::

    prefix      what every baseline takes and returns
    eviction    StreamingLLM, H2O, SnapKV, Expected Attention, KeyDiff: keep some KV entries, drop the others
    uniform     a uniform sample of the middle
    halving     kernel halving (Thinformer, the coreset inside Express)
    nystrom     randomly pivoted Nystrom weights (WildCat)
    clusters    ResKV, MomentKV: the best entries, and clusters of the others
    matching    Attention Matching: masses and values fitted to reference queries
    algorithm1  the paper's Algorithm 1 at equal bytes
    oracle      the best KV entries of each future query: no eviction method can beat it

Where a paper leaves a choice open, or its default did worse, the variant that did best is kept and the measurement
is noted where the number stands. Those figures are mean relative errors at 10% / 25% of the pairs on
``lm_qkv.npz`` in the protocol of `subgen.evaluation.compare.compare`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

import numpy as np

from . import algorithm1, clusters, eviction, halving, matching, nystrom, oracle, uniform
from .prefix import Answers, Prefix, Summary, exact

__all__ = ["BASELINES", "Answers", "Baseline", "Compress", "Prefix", "Summary", "exact"]

Compress: TypeAlias = Callable[[Prefix, int, np.random.Generator], Answers]


@dataclass(frozen=True)
class Baseline:
    """A method: its function, one line about it, and where it comes from.

    Attributes
    ----------
    compress : callable
        ``(prefix, budget, rng) -> Answers``: the prefix in at most ``budget`` pairs per stream, or their bytes. Equal
        arguments, the state of ``rng`` included, give equal answers. A budget that cannot hold the sinks and the
        window raises ``ValueError``.
    line : str
    source : str
    """

    compress: Compress
    line: str
    source: str


BASELINES: Mapping[str, Baseline] = MappingProxyType(
    {
        "streaming-llm": Baseline(eviction.streaming_llm, "the sinks and the most recent pairs", "arXiv 2309.17453"),
        "h2o": Baseline(eviction.h2o, "the pairs that received most attention so far", "arXiv 2306.14048"),
        "snapkv": Baseline(
            eviction.snapkv, "the pairs that the last queries attend to, pooled over neighbours", "arXiv 2404.14469"
        ),
        "expected-attention": Baseline(
            eviction.expected_attention,
            "the pairs that a Gaussian of queries is expected to attend to",
            "arXiv 2510.00636",
        ),
        "keydiff": Baseline(eviction.keydiff, "the pairs whose keys differ most from the mean key", "arXiv 2504.15364"),
        "uniform": Baseline(uniform.uniform, "a uniform sample, weighted by 1 / rate", "folklore"),
        "halving": Baseline(
            halving.kernel_halving, "kernel halving, weight 2 for each halving", "arXiv 2502.12063, 2606.10944"
        ),
        "nystrom": Baseline(
            nystrom.nystrom, "randomly pivoted keys with Nystrom weights (WildCat)", "arXiv 2602.10056"
        ),
        "reskv": Baseline(clusters.reskv, "a quarter exactly, clusters of the others", "arXiv 2607.29591"),
        "momentkv": Baseline(
            clusters.momentkv, "the same, clusters with the covariance of values and keys", "arXiv 2606.01563"
        ),
        "attention-matching": Baseline(
            matching.attention_matching, "keys, with masses and values fitted to reference queries", "arXiv 2602.16284"
        ),
        "algorithm1": Baseline(
            algorithm1.algorithm1, "the paper's clusters and value samples, at equal bytes", "arXiv 2402.06082"
        ),
        "oracle": Baseline(oracle.oracle, "the top keys of each future query: bounds every eviction", "not a method"),
    }
)
"""Every baseline by name."""
