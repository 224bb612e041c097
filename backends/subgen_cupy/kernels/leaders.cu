// The leader rule for a block of keys, as if they came one by one. Distances are computed in float64 as in
// `subgen.leaders.squared_distances`, so that decisions agree.
//
// `nearest_centres`: the nearest representative of each key; a product of matrices in tiles of TILE x TILE.
// `open_leaders`: a block of threads per stream, one step per cluster that opens, without the host.
//
// Set by the launcher: ELEMENT.

constexpr int TILE = 32;
constexpr int WARPS = 8;
constexpr int THREADS = 32 * WARPS;
constexpr int SHARE = TILE / WARPS;  // keys of a tile for each warp

__device__ __forceinline__ double wide(ELEMENT x) { return (double)upcast(x); }

__device__ __forceinline__ double squared_distance(double norms, double product, int head_dim) {
  const double squared = norms - 2.0 * product;
  // The rounding of a dot product of head_dim terms, relative to the norms: equal keys are equal.
  const double resolution = (head_dim + 4) * 2.220446049250313e-16;
  return squared > norms * resolution ? squared : 0.0;
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
nearest_centres(const ELEMENT* __restrict__ keys, const ELEMENT* __restrict__ centres,
                const long long* __restrict__ n_clusters, int n, int capacity, int head_dim,
                double* __restrict__ nearest, long long* __restrict__ assignment) {
  __shared__ double key_tile[TILE][TILE];
  __shared__ double centre_tile[TILE][TILE + 1];  // read along a column: one more, so that no two lanes share a bank
  const int tiles = (n + TILE - 1) / TILE;
  const int first_key = blockIdx.x % tiles * TILE;
  const long long stream = blockIdx.x / tiles;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  keys += stream * n * head_dim;
  centres += stream * capacity * head_dim;
  const int live = (int)min(n_clusters[stream], (long long)capacity);

  double best[SHARE], key_norm[SHARE];
  int choice[SHARE];
#pragma unroll
  for (int s = 0; s < SHARE; s++) {
    best[s] = __longlong_as_double(0x7ff0000000000000LL);
    choice[s] = 0;
    const int i = first_key + warp * SHARE + s;
    double norm = 0.0;
    for (int d = lane; i < n && d < head_dim; d += 32) {
      const double x = wide(keys[(long long)i * head_dim + d]);
      norm += x * x;
    }
    key_norm[s] = warp_sum(norm);
  }
  for (int first = 0; first < live; first += TILE) {
    double product[SHARE] = {}, centre_norm = 0.0;
    for (int start = 0; start < head_dim; start += TILE) {
      __syncthreads();  // the tiles of the step before have been read
#pragma unroll
      for (int s = 0; s < SHARE; s++) {
        const int row = warp * SHARE + s, d = start + lane;
        const long long i = first_key + row, c = first + row;
        key_tile[row][lane] = i < n && d < head_dim ? wide(keys[i * head_dim + d]) : 0.0;
        centre_tile[row][lane] = c < live && d < head_dim ? wide(centres[c * head_dim + d]) : 0.0;
      }
      __syncthreads();  // key_tile, centre_tile
#pragma unroll 8
      for (int d = 0; d < TILE; d++) {
        const double c = centre_tile[lane][d];
        centre_norm += c * c;
#pragma unroll
        for (int s = 0; s < SHARE; s++) product[s] += key_tile[warp * SHARE + s][d] * c;
      }
    }
#pragma unroll
    for (int s = 0; s < SHARE; s++) {
      double distance = first + lane < live ? squared_distance(key_norm[s] + centre_norm, product[s], head_dim)
                                            : __longlong_as_double(0x7ff0000000000000LL);
      int index = first + lane;
      warp_argmin(distance, index);
      if (distance < best[s]) {  // equal distances go to the oldest
        best[s] = distance;
        choice[s] = index;
      }
    }
  }
#pragma unroll
  for (int s = 0; s < SHARE; s++) {
    const int i = first_key + warp * SHARE + s;
    if (lane == 0 && i < n) {
      nearest[stream * n + i] = best[s];
      assignment[stream * n + i] = choice[s];
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
open_leaders(const ELEMENT* __restrict__ keys, const long long* __restrict__ n_clusters, int n, int head_dim,
             double delta, double* __restrict__ nearest, long long* __restrict__ assignment, bool* __restrict__ opened) {
  __shared__ int found;
  const long long stream = blockIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  keys += stream * n * head_dim;
  nearest += stream * n;
  assignment += stream * n;
  opened += stream * n;
  for (int i = threadIdx.x; i < n; i += THREADS) opened[i] = false;
  long long next_cluster = n_clusters[stream];
  int from = 0;
  for (;;) {
    if (threadIdx.x == 0) found = n;
    __syncthreads();  // found is reset; the step before has been written
    for (int i = from + threadIdx.x; i < n; i += THREADS)
      if (sqrt(nearest[i]) > delta) {
        atomicMin(&found, i);
        break;
      }
    __syncthreads();  // found
    const int leader = found;
    if (leader == n) return;
    __syncthreads();  // found has been read
    if (threadIdx.x == 0) {
      nearest[leader] = 0.0;
      assignment[leader] = next_cluster;
      opened[leader] = true;
    }
    const ELEMENT* own = keys + (long long)leader * head_dim;
    // A leader does not change the assignment of tokens before it.
    for (int i = leader + 1 + warp; i < n; i += WARPS) {
      const ELEMENT* other = keys + (long long)i * head_dim;
      double norms = 0.0, product = 0.0;
      for (int d = lane; d < head_dim; d += 32) {
        const double a = wide(own[d]), b = wide(other[d]);
        norms += a * a + b * b;
        product += a * b;
      }
      norms = warp_sum(norms);
      product = warp_sum(product);
      const double distance = squared_distance(norms, product, head_dim);
      if (lane == 0 && distance < nearest[i]) {
        nearest[i] = distance;
        assignment[i] = next_cluster;
      }
    }
    next_cluster++;
    from = leader + 1;
  }
}
