// The closest pairs of clusters merge until a number is left: `subgen.merging`, without asking the host.
//
// `weighted_mean`, `features`: keys and values as points, so that the cost of a pair is a distance of points.
// (Matrix products, by the array library, apply the metric and give the Gram matrix.)
// `pair_costs`: Ward's cost of each pair, written over the Gram matrix.
// `nearest_pairs`: the nearest other of each cluster.
// `match_pairs`: rounds of mutual nearest neighbours, a block of threads per stream. Costs stay as they are, so a
//     nearest other is looked for again only where it was taken.
//     Says where each place of the result comes from, and where each cluster of before the first pass went.
// `merge_pairs`: writes the merged clusters, those that live first, in their order.
//
// Counts are integers, all else is float32; leaders are copied as they are. Free places have count zero.

constexpr int TILE = 32;
constexpr int WARPS = 8;
constexpr int THREADS = 32 * WARPS;
constexpr int MATCH_THREADS = 512;
constexpr int MATCH_WARPS = MATCH_THREADS / 32;
constexpr unsigned char OPEN = 0, KEEPS = 1, GOES = 2;

// The mean of the keys, weighted by counts. A block per TILE coordinates of a stream.
extern "C" __global__ void __launch_bounds__(THREADS)
weighted_mean(const float* __restrict__ keys, const int* __restrict__ counts, int n, int head_dim,
              float* __restrict__ mean) {
  __shared__ float sums[WARPS][TILE];
  __shared__ float totals[WARPS];
  const int tiles = (head_dim + TILE - 1) / TILE;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, d = blockIdx.x % tiles * TILE + lane;
  const long long stream = blockIdx.x / tiles;
  float sum = 0.0f, total = 0.0f;
  for (int i = warp; i < n; i += WARPS) {
    const float count = (float)counts[stream * n + i];
    total += count;
    if (d < head_dim) sum += count * keys[(stream * n + i) * head_dim + d];
  }
  sums[warp][lane] = sum;
  if (lane == 0) totals[warp] = total;
  __syncthreads();  // sums, totals
  if (warp == 0 && d < head_dim) {
    sum = total = 0.0f;
    for (int w = 0; w < WARPS; w++) {
      sum += sums[w][lane];
      total += totals[w];
    }
    mean[stream * head_dim + d] = total > 0.0f ? sum / total : 0.0f;
  }
}

// Points [key - mean, value / value_scale]. A warp per cluster.
extern "C" __global__ void __launch_bounds__(THREADS)
features(const float* __restrict__ keys, const float* __restrict__ values, const float* __restrict__ mean,
         const float* __restrict__ value_scale, long long total, int n, int head_dim, int value_dim,
         float* __restrict__ points) {
  const int lane = threadIdx.x % 32;
  const long long cluster = (long long)blockIdx.x * WARPS + threadIdx.x / 32;
  if (cluster >= total) return;
  const long long stream = cluster / n;
  float* point = points + cluster * (head_dim + value_dim);
  // Differences are all that matters: without the common offset, float32 keeps the digits.
  for (int d = lane; d < head_dim; d += 32) point[d] = keys[cluster * head_dim + d] - mean[stream * head_dim + d];
  for (int d = lane; d < value_dim; d += 32) point[head_dim + d] = values[cluster * value_dim + d] / value_scale[stream];
}

// A block takes a tile of pairs and its mirror image: it reads both before it writes over them.
extern "C" __global__ void __launch_bounds__(THREADS)
pair_costs(float* __restrict__ gram, const float* __restrict__ norms, const int* __restrict__ counts,
           const float* __restrict__ importance, int n) {
  __shared__ float upper[TILE][TILE + 1];
  __shared__ float lower[TILE][TILE + 1];
  const int tiles = (n + TILE - 1) / TILE;
  const int tile_row = blockIdx.x / tiles % tiles, tile_column = blockIdx.x % tiles;
  if (tile_row > tile_column) return;
  const long long stream = blockIdx.x / tiles / tiles;
  gram += stream * n * n;
  norms += stream * n;
  counts += stream * n;
  importance += stream * n;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int r = warp; r < TILE; r += WARPS) {
    const int i = tile_row * TILE + r, j = tile_column * TILE + lane;
    upper[r][lane] = i < n && j < n ? gram[(long long)i * n + j] : 0.0f;
    const int k = tile_column * TILE + r, l = tile_row * TILE + lane;
    lower[r][lane] = k < n && l < n ? gram[(long long)k * n + l] : 0.0f;
  }
  __syncthreads();  // upper, lower
  for (int r = warp; r < TILE; r += WARPS)
    for (int mirror = 0; mirror < 2; mirror++) {
      const int i = (mirror ? tile_column : tile_row) * TILE + r, j = (mirror ? tile_row : tile_column) * TILE + lane;
      if (i >= n || j >= n) continue;
      // The halves of a product may round differently; a sum of both is symmetric, as mutual neighbours need.
      const float cross = mirror ? lower[r][lane] + upper[lane][r] : upper[r][lane] + lower[lane][r];
      const float squared = norms[i] + norms[j] - cross;
      const float sum = importance[i] + importance[j];
      const float factor = importance[i] * importance[j] / (sum > 0.0f ? sum : 1.0f);
      const bool possible = i != j && counts[i] > 0 && counts[j] > 0;
      gram[(long long)i * n + j] = possible ? (squared > 0.0f ? squared : 0.0f) * factor : infinity();
    }
}

// The first of the least numbers of a row, among columns that are open; the first column where there is none.
__device__ __forceinline__ void row_argmin(const float* row, const unsigned char* state, int n, float& least,
                                           int& index) {
  least = infinity();
  index = n;
  for (int j = threadIdx.x % 32; j < n; j += 32) {
    const float cost = row[j];
    if (cost < least && (!state || state[j] == OPEN)) {
      least = cost;
      index = j;
    }
  }
  warp_argmin(least, index);
  if (index == n) index = 0;
}

extern "C" __global__ void __launch_bounds__(THREADS)
nearest_pairs(const float* __restrict__ costs, long long total, int n, int* __restrict__ partner,
              float* __restrict__ cost) {
  const long long row = (long long)blockIdx.x * WARPS + threadIdx.x / 32;
  if (row >= total) return;
  float least;
  int index;
  row_argmin(costs + row * n, nullptr, n, least, index);
  if (threadIdx.x % 32 == 0) {
    partner[row] = index;
    cost[row] = least;
  }
}

// Chooses pairs until the surplus over `most` is used or none is left, and says where every cluster goes: place p of
// the result comes from source[p], merged with other[p]; -1 is alone, -2 is a free place. `moved` follows the `given`
// places of before the first pass. Costs and nearest others are not read where there is no surplus.
extern "C" __global__ void __launch_bounds__(MATCH_THREADS)
match_pairs(const float* __restrict__ costs, const int* __restrict__ counts, const int* __restrict__ first_partner,
            const float* __restrict__ first_cost, int n, int most, int places, int given, int first_pass,
            int* __restrict__ source, int* __restrict__ other, long long* __restrict__ moved) {
  extern __shared__ int dynamic[];
  int* partner = dynamic;                                                // n
  float* cost = reinterpret_cast<float*>(dynamic + n);                   // n
  int* pairs = dynamic + 2 * n;                                          // n / 2, first of each pair
  unsigned char* state = reinterpret_cast<unsigned char*>(pairs + n / 2);  // n
  __shared__ int found;
  __shared__ int before[MATCH_WARPS];
  const long long stream = blockIdx.x;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  costs += stream * n * n;
  counts += stream * n;
  moved += stream * given;

  if (thread == 0) found = 0;
  __syncthreads();  // found
  int live = 0;
  for (int i = thread; i < n; i += MATCH_THREADS) live += counts[i] > 0;
  live = warp_sum(live);
  if (lane == 0) atomicAdd(&found, live);
  __syncthreads();  // found
  live = found;
  int surplus = live - most;
  for (int i = thread; i < n; i += MATCH_THREADS) {
    if (surplus > 0) {
      partner[i] = first_partner[stream * n + i];
      cost[i] = first_cost[stream * n + i];
    }
    state[i] = OPEN;
  }
  __syncthreads();  // partner, cost, state; everyone has read found

  while (surplus > 0) {
    for (int i = warp; i < n; i += MATCH_WARPS) {
      if (state[i] != OPEN || cost[i] == infinity() || state[partner[i]] == OPEN) continue;
      float least;
      int index;
      row_argmin(costs + (long long)i * n, state, n, least, index);
      if (lane == 0) {
        partner[i] = index;
        cost[i] = least;
      }
    }
    if (thread == 0) found = 0;
    __syncthreads();  // partner, cost, found
    for (int i = thread; i < n; i += MATCH_THREADS)
      if (state[i] == OPEN && cost[i] < infinity() && i < partner[i] && partner[partner[i]] == i)
        pairs[atomicAdd(&found, 1)] = i;
    __syncthreads();  // pairs, found
    const int candidates = found;
    if (!candidates) break;
    for (int p = thread; p < candidates; p += MATCH_THREADS) {
      const int i = pairs[p];
      int rank = 0;
      // The cheapest, as many as the surplus; of equal ones the first.
      if (candidates > surplus)
        for (int q = 0; q < candidates; q++) {
          const int k = pairs[q];
          rank += cost[k] < cost[i] || (cost[k] == cost[i] && k < i);
        }
      if (rank < surplus) {
        state[i] = KEEPS;
        state[partner[i]] = GOES;
      }
    }
    surplus -= min(candidates, surplus);
    __syncthreads();  // state; everyone has read found and pairs
  }

  // Places of the clusters: those that live to the front, in their order.
  int* ahead = reinterpret_cast<int*>(cost);  // of each cluster, those that live before it; costs are done with
  const int share = (n + MATCH_THREADS - 1) / MATCH_THREADS;
  const int begin = min(n, thread * share), end = min(n, begin + share);
  int own = 0;
  for (int i = begin; i < end; i++) own += counts[i] > 0 && state[i] != GOES;
  int upto = own;
  for (int step = 1; step < 32; step *= 2) {
    const int left = __shfl_up_sync(EVERY_LANE, upto, step);
    if (lane >= step) upto += left;
  }
  if (lane == 31) before[warp] = upto;
  __syncthreads();  // before
  int all = 0, place = upto - own;
  for (int w = 0; w < MATCH_WARPS; w++) {
    if (w < warp) place += before[w];
    all += before[w];
  }
  for (int i = begin; i < end; i++) {
    const bool lives = counts[i] > 0 && state[i] != GOES;
    const int to = lives ? place : all + i - place;
    ahead[i] = place;
    place += lives;
    if (to >= places) continue;
    source[stream * places + to] = i;
    other[stream * places + to] = !lives ? -2 : state[i] == KEEPS ? partner[i] : -1;
  }
  __syncthreads();  // ahead
  for (int i = thread; i < given; i += MATCH_THREADS) {
    const long long at = first_pass ? i : moved[i];
    if (first_pass ? counts[i] > 0 : at < live) {
      moved[i] = ahead[state[at] == GOES ? partner[at] : at];
    } else {
      // A free place goes behind the clusters, as far as it was. After a pass it stood behind `live` and i - passed
      // others, so `passed` clusters were before it.
      const long long passed = first_pass ? i : live + i - at;
      moved[i] = all + i - (passed < n ? ahead[passed] : all);
    }
  }
}

// A block per place of the result.
extern "C" __global__ void __launch_bounds__(128)
merge_pairs(const float* __restrict__ keys, const float* __restrict__ values, const int* __restrict__ counts,
            const float* __restrict__ spread, const float* __restrict__ importance,
            const unsigned short* __restrict__ leaders, const int* __restrict__ source, const int* __restrict__ other,
            int n, int places, int head_dim, int value_dim, int bands, int leader_halves,
            float* __restrict__ new_keys, float* __restrict__ new_values, int* __restrict__ new_counts,
            float* __restrict__ new_spread, float* __restrict__ new_importance,
            unsigned short* __restrict__ new_leaders) {
  const long long place = blockIdx.x;
  const long long base = place / places * n;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, mate = other[place];
  const long long a = base + source[place], b = mate < 0 ? a : base + mate;
  const int added = mate < 0 ? 0 : counts[b], total = counts[a] + added;
  const float share = (float)added / (float)(total > 0 ? total : 1);
  const int band = head_dim / bands;
  for (int c = warp; c < bands; c += warps) {
    float apart = 0.0f;
    for (int d = c * band + lane; d < (c + 1) * band; d += 32) {
      const float key = keys[a * head_dim + d], difference = keys[b * head_dim + d] - key;
      new_keys[place * head_dim + d] = key + difference * share;
      apart += difference * difference;
    }
    apart = warp_sum(apart) / band;
    // The parallel-axis rule.
    const float s = spread[a * bands + c];
    if (lane == 0) new_spread[place * bands + c] = s + share * (spread[b * bands + c] - s + (1.0f - share) * apart);
  }
  for (int d = threadIdx.x; d < value_dim; d += blockDim.x) {
    const float value = values[a * value_dim + d];
    new_values[place * value_dim + d] = value + (values[b * value_dim + d] - value) * share;
  }
  // The leader of the first stays, bit by bit, whatever its dtype.
  for (int d = threadIdx.x; d < leader_halves; d += blockDim.x)
    new_leaders[place * leader_halves + d] = leaders[a * leader_halves + d];
  if (threadIdx.x == 0) {
    new_counts[place] = mate == -2 ? 0 : total;
    new_importance[place] = importance[a] + (mate < 0 ? 0.0f : importance[b]);
  }
}
