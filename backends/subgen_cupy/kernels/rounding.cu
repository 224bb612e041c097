// Queries in 8 bits, each with one scale, to nearest; see `subgen.queries.query_codes`.
//
// Set by the launcher: QUERY (type).

constexpr int WARPS = 8;

// A warp per token, whose queries are those of `group` heads; they take turns, token `first` of the stream being the
// first. Heads may lie apart.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
query_codes(const QUERY* __restrict__ queries, long long per_head, long long total, int group, long long first, int n,
            int dim, float scale, signed char* __restrict__ codes, float* __restrict__ scales) {
  const long long token = (long long)blockIdx.x * WARPS + threadIdx.x / 32;
  if (token >= total) return;
  const long long stream = token / n, place = token % n, head = stream * group + (first + place) % group;
  const QUERY* query = queries + head * per_head + place * dim;
  to_8_bits([=](int d) { return widen(query[d]) * scale; }, dim, codes + token * dim, scales + token);
}
