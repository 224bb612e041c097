"""The PyTorch backend: operations without autograd graphs or waits for the device.

CUDA tensors are served by the kernels of `subgen_cupy` where CuPy is installed; `WITHOUT_CUPY` does without.

`subgen_torch.transformers` plugs the sketch into `model.generate` of the transformers library.
"""

from __future__ import annotations

from .backend import WITHOUT_CUPY, with_kernels

__all__ = ["BACKEND", "WITHOUT_CUPY"]

BACKEND = with_kernels(WITHOUT_CUPY)
