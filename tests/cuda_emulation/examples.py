"""Small kernels, written out, for tests of the emulation itself."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PAIRS", "REVERSE", "Text"]


@dataclass(frozen=True)
class Text:
    """A module written out in a test."""

    text: str
    constants: tuple[tuple[str, int], ...] = ()

    def source(self) -> str:
        """Return the text."""
        return self.text


REVERSE = Text("""
extern "C" __global__ void reverse(const int* in, int* out, int n) {
  extern __shared__ int shared[];
  __shared__ int offset;
  if (threadIdx.x == n - 1) offset = 7;
  shared[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = shared[n - 1 - threadIdx.x] + offset;
}
""")

PAIRS = Text("""
extern "C" __global__ void pairs(const float* x, float* out) {
  reinterpret_cast<float2*>(out)[threadIdx.x] = reinterpret_cast<const float2*>(x)[threadIdx.x];
}
extern "C" __global__ void odd(const float* x, float* out) {
  *reinterpret_cast<float2*>(out) = *reinterpret_cast<const float2*>(x + 1);
}
""")
