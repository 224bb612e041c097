"""Attention over long contexts from a sublinear summary of the KV cache (SubGen, arXiv 2402.06082)."""

from __future__ import annotations

from importlib.metadata import version

from . import backends, theory
from .budget import Power
from .exact import attention
from .joining import merge
from .persist import load
from .plan import plan
from .sketch import AttentionSketch

__all__ = ["AttentionSketch", "Power", "attention", "backends", "load", "merge", "plan", "theory"]

__version__ = version("subgen-attention")
