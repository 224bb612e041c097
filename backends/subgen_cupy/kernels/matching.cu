// Rounds of mutual nearest neighbours: which clusters merge. Costs: merging.cu.
//
// A stream is matched by a block of threads, or, from compute capability 9.0 on, by PEERS blocks that write into each
// other's shared memory: each looks for the nearest others of its share of the clusters, and all take the same decisions.
// Costs stay as they are, so a nearest other is looked for again only where it was taken; and of each tile of others the
// least cost is known. If it was taken, it still bounds what is left of the tile from below. So a tile is read again
// only if that bound is less than what is found without it.
//
// Set by the launcher: PEERS.

constexpr int TILE = 64;  // that of `pair_costs`
constexpr int TEAM = 4;   // lanes that look for a cluster's nearest other
constexpr int THREADS = 1024;
constexpr int WARPS = THREADS / 32;
constexpr unsigned char OPEN = 0, KEEPS = 1, GOES = 2;
// A cost and an index, packed: the bits of the cost come first. From here on there is nobody.
constexpr unsigned long long NOBODY = 0x7f800000ull << 32;

#if PEERS > 1
#define TOGETHER __cluster_dims__(PEERS)
#define ALL_PEERS(barrier)                                                       \
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");           \
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory")
#else
#define TOGETHER
#define ALL_PEERS(barrier) barrier
#endif

// Writes a word into the shared memory of a peer.
__device__ __forceinline__ void tell(void* place, int peer, int word) {
#if PEERS > 1
  const unsigned own = (unsigned)__cvta_generic_to_shared(place);
  unsigned theirs;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(theirs) : "r"(own), "r"(peer));
  asm volatile("st.shared::cluster.b32 [%0], %1;" ::"r"(theirs), "r"(word) : "memory");
#else
  *reinterpret_cast<int*>(place) = word;
#endif
}

__device__ __forceinline__ unsigned long long team_min(unsigned long long x) {
  for (int step = TEAM / 2; step; step /= 2) x = min(x, __shfl_xor_sync(EVERY_LANE, x, step));
  return x;
}

// Of the columns of a tile that are open the least cost, as far as a lane reads them. The bits of the mask count.
__device__ __forceinline__ unsigned long long read_tile(const float* row, int tile, const unsigned char* state, int n,
                                                        unsigned mask) {
  unsigned long long least = NOBODY;
#pragma unroll
  for (int q = 0; q < TILE / (4 * TEAM); q++) {
    const int column = tile * TILE + 4 * (q * TEAM + threadIdx.x % TEAM);
    // Rows are whole tiles.
    const float4 four = *reinterpret_cast<const float4*>(row + column);
    const float costs[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int e = 0; e < 4; e++)
      if (column + e < n && state[column + e] == OPEN)
        least = min(least, (unsigned long long)((unsigned)__float_as_int(costs[e]) & mask) << 32 | (unsigned)(column + e));
  }
  return least;
}

// The nearest open other of a cluster, by a team; all lanes of a warp come here, whether their cluster needs it or not.
__device__ __forceinline__ unsigned long long look(const float* row, unsigned long long* least,
                                                   const unsigned char* state, int n, int tiles, unsigned mask,
                                                   bool needed) {
  unsigned long long after = 0;  // tiles up to this bound were read again
  while (true) {
    unsigned long long best = NOBODY, bound = NOBODY;
    for (int tile = threadIdx.x % TEAM; needed && tile < tiles; tile += TEAM) {
      const unsigned long long known = least[tile];
      if (known >= NOBODY) continue;
      if (state[(int)known] == OPEN) best = min(best, known);
      else if (known >= after) bound = min(bound, known);
    }
    best = team_min(best);
    bound = team_min(bound);
    const bool again = bound < best;
    if (!__any_sync(EVERY_LANE, again)) return best;
    const int tile = (int)bound / TILE;
    const unsigned long long found = team_min(again ? read_tile(row, tile, state, n, mask) : NOBODY);
    if (again) {
      if (threadIdx.x % TEAM == 0) least[tile] = found;
      after = bound + 1;
    }
    __syncwarp();  // least
  }
}

// Chooses pairs until the surplus over `most` is used or none is left, and says where every cluster goes: place p of
// the result comes from source[p], merged with other[p]; -1 is alone, -2 is a free place. `moved` follows the `given`
// places of before the first pass. Costs and their minima are not read where there is no surplus; minima are written.
//
// With `remembered`, `new_nearest` is for those in no pair the nearest other in no pair, and where there is no surplus
// what they remember. In a stream with fewer new clusters than two less one for each of the surplus all are compared: a
// matching halves what there is if it must, whatever is remembered, so that the host knows how many passes there are.
extern "C" __global__ void TOGETHER __launch_bounds__(THREADS, 1)
match_pairs(const float* __restrict__ costs, const int* __restrict__ counts, unsigned long long* least,
            const int* __restrict__ remembered, int n, int most, int places, int given, int first_pass,
            int* __restrict__ source, int* __restrict__ other, int* __restrict__ new_nearest,
            long long* __restrict__ moved) {
  extern __shared__ int dynamic[];
  int* partner = dynamic;                                                // n
  float* cost = reinterpret_cast<float*>(dynamic + n);                   // n
  int* pairs = dynamic + 2 * n;                                          // n / 2, first of each pair
  unsigned char* state = reinterpret_cast<unsigned char*>(pairs + n / 2);  // n
  __shared__ int found;
  __shared__ int before[WARPS];
  const long long stream = blockIdx.x / PEERS;
  const int peer = blockIdx.x % PEERS;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int tiles = (n + TILE - 1) / TILE;
  costs += stream * n * tiles * TILE;
  least += stream * n * tiles;
  counts += stream * n;
  moved += stream * given;

  if (thread == 0) found = 0;
  __syncthreads();  // found
  // Of the clusters, those that live, and in the upper half those of them that are new.
  int live = 0;
  for (int i = thread; i < n; i += THREADS)
    if (counts[i] > 0) live += remembered && remembered[stream * n + i] < 0 ? 0x10001 : 1;
  live = warp_sum(live);
  if (lane == 0) atomicAdd(&found, live);
  __syncthreads();  // found
  live = found & 0xffff;
  int surplus = live - most;
  const bool chooses = surplus > 0;
  // Whether pairs count that are not compared: their sign does not, then.
  const bool every = chooses && remembered && (found >> 16) < 2 * surplus - 1;
  const unsigned mask = every ? 0x7fffffffu : 0xffffffffu;
  for (int i = thread; i < n; i += THREADS) {
    if (!chooses && remembered) partner[i] = remembered[stream * n + i];
    state[i] = OPEN;
  }
  ALL_PEERS(__syncthreads());  // partner, state; everyone has read found

  bool start = true;
  while (chooses) {
    for (int i = thread / TEAM * PEERS + peer; i - lane / TEAM * PEERS < n; i += THREADS / TEAM * PEERS) {
      const bool needed =
          i < n && state[i] == OPEN && (start || (cost[i] < infinity() && state[partner[i]] != OPEN));
      if (!__any_sync(EVERY_LANE, needed)) continue;
      const float* row = costs + (long long)min(i, n - 1) * tiles * TILE;
      unsigned long long* minima = least + (long long)min(i, n - 1) * tiles;
      for (int tile = 0; start && every && tile < tiles; tile++) {
        const unsigned long long found = team_min(read_tile(row, tile, state, n, mask));
        if (needed && lane % TEAM == 0) minima[tile] = found;
      }
      __syncwarp();  // minima
      const unsigned long long nearest = look(row, minima, state, n, tiles, mask, needed);
      for (int p = lane % TEAM; needed && p < PEERS; p += TEAM) {
        tell(partner + i, p, (int)nearest);
        tell(cost + i, p, (int)(nearest >> 32));
      }
    }
    start = false;
    if (thread == 0) found = 0;
    ALL_PEERS(__syncthreads());  // partner, cost, found
    if (surplus == 0) break;
    for (int i = thread; i < n; i += THREADS)
      if (state[i] == OPEN && cost[i] < infinity() && i < partner[i] && partner[partner[i]] == i)
        pairs[atomicAdd(&found, 1)] = i;
    __syncthreads();  // pairs, found
    const int candidates = found;
    if (!candidates) break;
    for (int p = thread; p < candidates; p += THREADS) {
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
    ALL_PEERS(__syncthreads());  // state; everyone has read found, pairs, partner and cost
    if (surplus == 0 && !remembered) break;  // or those that are left look for their nearest others
  }
  if (peer) return;

  // Places of the clusters: those that live to the front, in their order.
  int* ahead = reinterpret_cast<int*>(cost);  // of each cluster, those that live before it; costs are done with
  const int share = (n + THREADS - 1) / THREADS;
  const int begin = min(n, thread * share), end = min(n, begin + share);
  int own = 0;
  for (int i = begin; i < end; i++) {
    own += counts[i] > 0 && state[i] != GOES;
    if (chooses && state[i] == OPEN && cost[i] == infinity()) partner[i] = -1;
  }
  int upto = own;
  for (int step = 1; step < 32; step *= 2) {
    const int left = __shfl_up_sync(EVERY_LANE, upto, step);
    if (lane >= step) upto += left;
  }
  if (lane == 31) before[warp] = upto;
  __syncthreads();  // before
  int all = 0, place = upto - own;
  for (int w = 0; w < WARPS; w++) {
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
  for (int i = thread; i < given; i += THREADS) {
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
  if (!remembered) return;
  const auto place_of = [&](int i) { return counts[i] > 0 && state[i] != GOES ? ahead[i] : all + i - ahead[i]; };
  for (int i = thread; i < n; i += THREADS) {
    const int to = place_of(i), found_for = state[i] == OPEN && partner[i] >= 0 ? place_of(partner[i]) : -1;
    if (to < places) new_nearest[stream * places + to] = found_for;
  }
}
