// Vectors in 8 bits, each with one scale; see `subgen.rounding.quantize`, to nearest.

constexpr int WARPS = 8;

// A warp per vector. Streams may lie apart.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
quantize(const float* __restrict__ x, long long per_stream, long long total, int n, int dim,
         signed char* __restrict__ codes, float* __restrict__ scales) {
  const int lane = threadIdx.x % 32;
  const long long vector = (long long)blockIdx.x * WARPS + threadIdx.x / 32;
  if (vector >= total) return;
  const float* row = x + vector / n * per_stream + vector % n * dim;
  float peak = 0.0f;
  for (int d = lane; d < dim; d += 32) peak = fmaxf(peak, fabsf(row[d]));
  for (int step = 16; step; step /= 2) peak = fmaxf(peak, __shfl_xor_sync(EVERY_LANE, peak, step));
  const float scale = peak / 127.0f;
  for (int d = lane; d < dim; d += 32) {
    // The largest keeps its code, and with it the scale of the next rounding.
    const float code = fabsf(row[d]) == peak ? copysignf(127.0f, row[d]) : rintf(row[d] / scale);
    codes[vector * dim + d] = scale > 0.0f ? (signed char)(int)fminf(fmaxf(code, -127.0f), 127.0f) : (signed char)0;
  }
  if (lane == 0) scales[vector] = scale;
}
