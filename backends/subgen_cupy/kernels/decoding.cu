// A token comes in; see `subgen.decoding.decode`. Its answer: attention.cu.
//
// Where it goes is an argument, or in memory: then the same launch, recorded once, serves every token.
//
// Set by the launcher: ELEMENT and QUERY (types).

constexpr int WARPS = 8;

// Exact tokens before this one, and tokens.
extern "C" __global__ void count_tokens(long long* counters, long long n_exact, long long n_seen) {
  counters[0] = n_exact;
  counters[1] = n_seen;
}

// A warp per row: of each stream the key, the value and one query, in 8 bits, which sinks do not keep.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
take_in(const QUERY* __restrict__ queries, const ELEMENT* __restrict__ keys, const ELEMENT* __restrict__ values,
        long long key_step, long long value_step, const long long* __restrict__ counters, long long n_exact,
        long long n_seen, float scale, long long total, int group, int head_dim, int value_dim, int clusters, int sink, int window,
        ELEMENT* __restrict__ new_keys, ELEMENT* __restrict__ new_values, signed char* __restrict__ codes,
        float* __restrict__ scales) {
  const long long row = (long long)blockIdx.x * WARPS + threadIdx.x / 32;
  if (row >= total) return;
  const long long stream = row / 3;
  const int lane = threadIdx.x % 32, what = row % 3;
  if (counters) {
    n_exact = counters[0];
    n_seen = counters[1];
  }
  const long long to = stream * (clusters + sink + window) + clusters + n_exact;
  if (what == 0) {
    for (int d = lane; d < head_dim; d += 32) new_keys[to * head_dim + d] = keys[stream * key_step + d];
  } else if (what == 1) {
    for (int d = lane; d < value_dim; d += 32) new_values[to * value_dim + d] = values[stream * value_step + d];
  } else if (n_exact >= sink) {
    const QUERY* query = queries + (stream * group + n_seen % group) * head_dim;
    const long long kept = stream * window + n_exact - sink;
    to_8_bits([=](int d) { return widen(query[d]) * scale; }, head_dim, codes + kept * head_dim, scales + kept);
  }
}
