// Append tokens.
//
// `append_token`: writes the token of a decoding step, see `subgen.default.attend.decode`; attend.cu answers its
// queries. Its place is an argument, or in memory: then the same launch, recorded once, serves every token.
// `count_tokens`: writes that place.
// `quantize_queries`: queries to int8, see `subgen.default.append.quantize_queries`.
//
// Set by the launcher: ELEMENT and QUERY (types).

constexpr int WARPS = 8;

// `counters`: exact tokens before the next one, and all tokens before it.
extern "C" __global__ void count_tokens(long long* counters, long long n_exact, long long n_seen) {
  counters[0] = n_exact;
  counters[1] = n_seen;
}

// A warp per row. Each stream has three: the key, the value, and one query in int8. With a bound of four blocks a
// multiprocessor no compiler spills registers for more.
extern "C" __global__ void __launch_bounds__(32 * WARPS, 4)
append_token(const QUERY* __restrict__ queries, const ELEMENT* __restrict__ keys, const ELEMENT* __restrict__ values,
             long long key_step, long long value_step, const long long* __restrict__ counters, long long n_exact,
             long long n_seen, float scale, long long total, int group, int head_dim, int value_dim, int capacity,
             ELEMENT* __restrict__ new_keys, ELEMENT* __restrict__ new_values, signed char* __restrict__ codes,
             float* __restrict__ scales) {
  const long long row = (long long)blockIdx.x * WARPS + threadIdx.x / 32;
  if (row >= total) return;
  const long long stream = row / 3;
  const int lane = threadIdx.x % 32, part = row % 3;
  if (counters) {
    n_exact = counters[0];
    n_seen = counters[1];
  }
  const long long to = stream * capacity + n_exact;
  if (part == 0) {
    for (int d = lane; d < head_dim; d += 32) new_keys[to * head_dim + d] = keys[stream * key_step + d];
  } else if (part == 1) {
    for (int d = lane; d < value_dim; d += 32) new_values[to * value_dim + d] = values[stream * value_step + d];
  } else {
    const QUERY* query = queries + (stream * group + n_seen % group) * head_dim;
    to_int8([=](int d) { return upcast(query[d]) * scale; }, head_dim, codes + to * head_dim, scales + to);
  }
}

// A warp per token. Of the `group` query heads of a stream, token t of the stream keeps the query of head t % group;
// the block starts at token `first`. Heads may be strided.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
quantize_queries(const QUERY* __restrict__ queries, long long per_head, long long total, int group, long long first,
                 int n, int dim, float scale, signed char* __restrict__ codes, float* __restrict__ scales) {
  const long long token = (long long)blockIdx.x * WARPS + threadIdx.x / 32;
  if (token >= total) return;
  const long long stream = token / n, place = token % n, head = stream * group + (first + place) % group;
  const QUERY* query = queries + head * per_head + place * dim;
  to_int8([=](int d) { return upcast(query[d]) * scale; }, dim, codes + token * dim, scales + token);
}
