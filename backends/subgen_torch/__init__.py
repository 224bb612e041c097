"""The PyTorch backend: hot operations without autograd graphs or waits for the device.

`subgen_torch.transformers` plugs the sketch into `model.generate` of the transformers library.
"""

from __future__ import annotations

from subgen.backends import Backend

from ._attention import weighted_attention

__all__ = ["BACKEND"]

BACKEND = Backend("torch", {"weighted_attention": weighted_attention})
