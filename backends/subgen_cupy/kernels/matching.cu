// Rounds of mutual nearest neighbours: which clusters merge. Costs: merging.cu.
//
// A stream is matched by a block of threads, or, from compute capability 9.0 on, by PEERS blocks that write into each
// other's shared memory: each looks for the nearest others of its share of the clusters, and all take the same decisions.
// Costs stay as they are, so a nearest other is looked for again only where it was taken; and of each tile of others the
// least cost is known. If it was taken, it still bounds what is left of the tile from below. So a tile is read again
// only if that bound is less than what is found without it.
//
// Set by the launcher: PEERS, HELD (tiles of a row that a lane looks after).

constexpr int TILE = 64;  // that of `pair_costs`: two columns a lane
constexpr int AT_ONCE = HELD > 2 ? 2 : 4;  // tiles that are read again before the first is looked at
constexpr int THREADS = 1024;
constexpr int WARPS = THREADS / 32;
constexpr unsigned char OPEN = 0, KEEPS = 1, GOES = 2;
constexpr unsigned NOBODY = 0x7f800000u;  // the bits of an infinite cost; those of a pair that is not compared are beyond

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

// Two columns of a tile for each lane; rows are whole tiles.
__device__ __forceinline__ float2 read_tile(const float* row, int tile) {
  return *reinterpret_cast<const float2*>(row + tile * TILE + 2 * (threadIdx.x % 32));
}

// The first of the least costs of a tile, of columns that are open. The bits of the mask count.
__device__ __forceinline__ void first_of_tile(float2 costs, int tile, const unsigned char* state, unsigned mask,
                                              unsigned& bits, unsigned& index) {
  const int column = tile * TILE + 2 * (threadIdx.x % 32);
  const unsigned states = *reinterpret_cast<const unsigned short*>(state + column);
  const unsigned left = states & 0xff ? NOBODY : (unsigned)__float_as_int(costs.x) & mask;
  const unsigned right = states >> 8 ? NOBODY : (unsigned)__float_as_int(costs.y) & mask;
  bits = min(left, right);
  index = column + (right < left);
  warp_first(bits, index);
}

__device__ __forceinline__ bool less(unsigned bits, unsigned index, unsigned than_bits, unsigned than_index) {
  return bits < than_bits || (bits == than_bits && index < than_index);
}

// The nearest open other of a cluster, by a warp.
__device__ __forceinline__ void look(const float* row, unsigned long long* least, const unsigned char* state, int tiles,
                                     unsigned mask, unsigned& best, unsigned& best_index) {
  const int lane = threadIdx.x % 32;
  unsigned bits[HELD], index[HELD];
  bool exact[HELD];
#pragma unroll
  for (int h = 0; h < HELD; h++) {
    bits[h] = NOBODY;
    index[h] = 0;
    if (h * 32 + lane < tiles) {
      const unsigned long long known = least[h * 32 + lane];
      bits[h] = (unsigned)(known >> 32);
      index[h] = (unsigned)known;
    }
    exact[h] = bits[h] < NOBODY && state[index[h]] == OPEN;
  }
  const auto find_best = [&]() {
    best = NOBODY;
    best_index = 0;
#pragma unroll
    for (int h = 0; h < HELD; h++)
      if (exact[h] && less(bits[h], index[h], best, best_index)) {
        best = bits[h];
        best_index = index[h];
      }
    warp_first(best, best_index);
  };
  find_best();
  // Tiles that may hide a nearer one are read again, several at a time.
#pragma unroll
  for (int h = 0; h < HELD; h++) {
    if (h * 32 >= tiles) break;
    unsigned hiding =
        __ballot_sync(EVERY_LANE, bits[h] < NOBODY && !exact[h] && less(bits[h], index[h], best, best_index));
    while (hiding) {
      int tile[AT_ONCE];
      float2 costs[AT_ONCE];
#pragma unroll
      for (int q = 0; q < AT_ONCE; q++) {
        tile[q] = hiding ? h * 32 + __ffs((int)hiding) - 1 : -1;
        hiding &= hiding - 1;
        if (tile[q] >= 0) costs[q] = read_tile(row, tile[q]);
      }
#pragma unroll
      for (int q = 0; q < AT_ONCE; q++) {
        if (tile[q] < 0) break;
        unsigned found, found_index;
        first_of_tile(costs[q], tile[q], state, mask, found, found_index);
        if (h * 32 + lane == tile[q]) {
          bits[h] = found;
          index[h] = found_index;
          exact[h] = found < NOBODY;
          least[tile[q]] = (unsigned long long)found << 32 | found_index;
        }
      }
    }
  }
  find_best();
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
  unsigned char* state = reinterpret_cast<unsigned char*>(dynamic);  // whole tiles
  const int tiles = (n + TILE - 1) / TILE;
  int* partner = dynamic + tiles * TILE / 4;                                  // n
  float* cost = reinterpret_cast<float*>(partner + n);                        // n
  unsigned short* list = reinterpret_cast<unsigned short*>(partner + 2 * n);  // n
  __shared__ int found, looking;
  __shared__ int before[WARPS];
  const long long stream = blockIdx.x / PEERS;
  const int peer = blockIdx.x % PEERS;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
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
  for (int i = thread; i < tiles * TILE; i += THREADS) {
    if (i < n && !chooses && remembered) partner[i] = remembered[stream * n + i];
    state[i] = i < n ? OPEN : GOES;
  }
  if (thread == 0) looking = 0;
  ALL_PEERS(__syncthreads());  // partner, state, looking; everyone has read found

  bool start = true;
  while (chooses) {
    // Of this block's share, those that must look.
    for (int i = thread * PEERS + peer; i < n; i += THREADS * PEERS)
      if (state[i] == OPEN && (start || (cost[i] < infinity() && state[partner[i]] != OPEN)))
        list[atomicAdd(&looking, 1)] = (unsigned short)i;
    __syncthreads();  // list, looking
    for (int k = warp; k < looking; k += WARPS) {
      const int i = list[k];
      const float* row = costs + (long long)i * tiles * TILE;
      unsigned long long* minima = least + (long long)i * tiles;
      unsigned bits, index;
      for (int tile = 0; start && every && tile < tiles; tile++) {
        first_of_tile(read_tile(row, tile), tile, state, mask, bits, index);
        if (lane == tile % 32) minima[tile] = (unsigned long long)bits << 32 | index;  // the lane that reads it
      }
      look(row, minima, state, tiles, mask, bits, index);
      if (lane < PEERS) {
        tell(partner + i, lane, (int)index);
        tell(cost + i, lane, (int)min(bits, NOBODY));
      }
    }
    start = false;
    if (thread == 0) found = 0;
    ALL_PEERS(__syncthreads());  // partner, cost, found; everyone has read list and looking
    if (surplus == 0) break;
    if (thread == 0) looking = 0;
    for (int i = thread; i < n; i += THREADS)
      if (state[i] == OPEN && cost[i] < infinity() && i < partner[i] && partner[partner[i]] == i)
        list[atomicAdd(&found, 1)] = (unsigned short)i;
    __syncthreads();  // list, found
    const int candidates = found;
    if (!candidates) break;
    for (int p = thread; p < candidates; p += THREADS) {
      const int i = list[p];
      int rank = 0;
      // The cheapest, as many as the surplus; of equal ones the first.
      if (candidates > surplus)
        for (int q = 0; q < candidates; q++) {
          const int k = list[q];
          rank += cost[k] < cost[i] || (cost[k] == cost[i] && k < i);
        }
      if (rank < surplus) {
        state[i] = KEEPS;
        state[partner[i]] = GOES;
      }
    }
    surplus -= min(candidates, surplus);
    ALL_PEERS(__syncthreads());  // state; everyone has read found, list, partner and cost
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
