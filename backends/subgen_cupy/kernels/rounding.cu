// Vectors in 8 bits, each with one scale; see `subgen.rounding.quantize`, to nearest.

constexpr int WARPS = 8;

// A warp per vector. Streams may lie apart.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
quantize(const float* __restrict__ x, long long per_stream, long long total, int n, int dim,
         signed char* __restrict__ codes, float* __restrict__ scales) {
  const long long vector = (long long)blockIdx.x * WARPS + threadIdx.x / 32;
  if (vector >= total) return;
  const float* row = x + vector / n * per_stream + vector % n * dim;
  to_8_bits([=](int d) { return row[d]; }, dim, codes + vector * dim, scales + vector);
}
