"""The PyTorch backend: hot operations without autograd graphs or waits for the device.

CUDA tensors are served by the kernels of `subgen_cupy` where CuPy is installed; `OWN` does without.

`subgen_torch.transformers` plugs the sketch into `model.generate` of the transformers library.
"""

from __future__ import annotations

from subgen.backends import Backend

from ._absorbing import absorb, quantize
from ._attention import coded_attention, sketch_attention, weighted_attention
from ._decoding import decode
from ._kernels import with_kernels
from ._merging import merge_closest
from ._tail import write

__all__ = ["BACKEND", "OWN"]

OWN = Backend(
    "torch",
    {
        "weighted_attention": weighted_attention,
        "sketch_attention": sketch_attention,
        "coded_attention": coded_attention,
        "merge_closest": merge_closest,
        "write": write,
        "quantize": quantize,
        "absorb": absorb,
        "decode": decode,
    },
)

BACKEND = with_kernels(OWN)
