"""Attention over long contexts from a sublinear summary of the KV cache (SubGen, arXiv 2402.06082)."""

from __future__ import annotations

from importlib.metadata import version

from . import backends, theory
from .default.budget import Power
from .evaluation.compare import compare
from .evaluation.plan import plan
from .shards import merge
from .sketch import AttentionSketch, load
from .softmax import attention

__all__ = ["AttentionSketch", "Power", "attention", "backends", "compare", "load", "merge", "plan", "theory"]

__version__ = version("subgen-attention")
