// Rounds of mutual nearest neighbours: which clusters merge. Costs: merging.cu.
//
// A stream is matched by a block of threads, or, from compute capability 9.0 on, by PEERS blocks that write into each
// other's shared memory: each looks after a share of the clusters, and all take the same decisions.
//
// In many data few clusters, light ones, are nearest to nearly all others, and whenever one of them is taken hundreds
// have lost their nearest. Most need not know the next. Clusters stand in an order, by importance; of a pair, the one that
// comes first speaks for it. If a cluster has an open one before it that is nearer than all open ones after it, it has no
// mutual neighbour to speak for, and as costs stay as they are, that holds while the nearer one is open: its guard. Each
// lane of a warp that reads a row finds one, or none, and of those a few are kept, the dearest, which are taken last. Only
// a cluster that has none names its nearest, which is behind it, and they are a pair unless that one has a nearer other: a
// guard again. So a row of costs is read again only when all guards were taken, or whom it names.
//
// Set by the launcher: PEERS, GUARDS (kept of each cluster).

constexpr int CHUNK = 128;    // columns that a warp reads at once, four a lane: rows are whole chunks
constexpr int AT_ONCE = 3;    // chunks that are on their way
constexpr int THREADS = 1024;
constexpr int WARPS = THREADS / 32;
constexpr unsigned NOBODY = 0x7f800000u;  // the bits of an infinite cost; those of a pair that is not compared are beyond
constexpr int KEEPS = -1, GOES = -2, EMPTY = -3;  // instead of their place in the order, of those that are not open
// Of a cluster: whom it names, with NAMES; of a pair, in which round it was found, by turns; that it has guards of its own;
// that nobody is left for it.
constexpr int INDEX = 0x1fff, TURN = 0x4000, NAMES = 0x8000, GUARDED = 0xffff, ALONE = 0xfffe;
constexpr unsigned short NONE = 0xffff;

typedef unsigned short Place;

#if PEERS > 1
#define TOGETHER __cluster_dims__(PEERS)
#define ALL_PEERS(barrier) \
  __cluster_barrier_arrive(); \
  __cluster_barrier_wait()
#else
#define TOGETHER
#define ALL_PEERS(barrier) barrier
#endif

// Writes into the shared memory of a peer.
__device__ __forceinline__ void tell(Place* place, int peer, int word) {
#if PEERS > 1
  place = (Place*)__cluster_map_shared_rank(place, peer);
#endif
  *place = (Place)word;
}

// Gives AT_ONCE chunks of a row: the bits of each cost, the order of the cluster and its index; a lane's in their order.
template <class Take>
__device__ __forceinline__ void some_costs(const float* row, const int* order, int start, int line, unsigned mask,
                                           Take take) {
  const int own = threadIdx.x % 32 * 4;
  row += own;
  order += own;
  float4 costs[AT_ONCE];
#pragma unroll
  for (int q = 0; q < AT_ONCE; q++)
    if (start + q * CHUNK < line) costs[q] = *reinterpret_cast<const float4*>(row + start + q * CHUNK);
#pragma unroll
  for (int q = 0; q < AT_ONCE; q++) {
    const int chunk = start + q * CHUNK, column = chunk + own;
    if (chunk >= line) break;
    const int4 place = *reinterpret_cast<const int4*>(order + chunk);
    take((unsigned)__float_as_int(costs[q].x) & mask, place.x, column);
    take((unsigned)__float_as_int(costs[q].y) & mask, place.y, column + 1);
    take((unsigned)__float_as_int(costs[q].z) & mask, place.z, column + 2);
    take((unsigned)__float_as_int(costs[q].w) & mask, place.w, column + 3);
  }
}

// The first of the least costs to open clusters behind a place in the order, by a warp; and of those before it, for each
// lane, the nearest that it has read.
__device__ __forceinline__ void look(const float* row, const int* order, int own, int line, unsigned mask,
                                     unsigned& bits, unsigned& index, unsigned& nearer, unsigned& guard) {
  bits = nearer = NOBODY;
  index = guard = 0;
#pragma unroll 1
  for (int start = 0; start < line; start += AT_ONCE * CHUNK)
    some_costs(row, order, start, line, mask, [&](unsigned cost, int place, int column) {
      if (place > own && cost < bits) {
        bits = cost;
        index = (unsigned)column;
      }
      if ((unsigned)place < (unsigned)own && cost < nearer) {
        nearer = cost;
        guard = (unsigned)column;
      }
    });
  warp_first(bits, index);
}

// An open cluster for each lane that is nearer in a row than a cost and an index, or NOBODY: the dearest that it has read.
// From the end of the row on, where those are that came last and are light, and no further than there are enough.
__device__ __forceinline__ void look_for_guards(const float* row, const int* order, unsigned bits, int index, int line,
                                                unsigned mask, unsigned& nearer, unsigned& guard) {
  nearer = NOBODY;
  guard = 0;
  unsigned have = 0;
#pragma unroll 1
  for (int start = (line - 1) / (AT_ONCE * CHUNK) * AT_ONCE * CHUNK; start >= 0 && __popc(have) < GUARDS;
       start -= AT_ONCE * CHUNK) {
    some_costs(row, order, start, line, mask, [&](unsigned cost, int place, int column) {
      if (place >= 0 && cost < bits + (column < index) && (nearer == NOBODY || cost >= nearer)) {
        nearer = cost;
        guard = (unsigned)column;
      }
    });
    have = __ballot_sync(EVERY_LANE, nearer != NOBODY);
  }
}

// Keeps the dearest of what the lanes have found, unless that is NOBODY. Whether there are any; by a warp.
__device__ __forceinline__ bool keep(unsigned nearer, unsigned guard, Place* guards) {
  const unsigned lane = threadIdx.x % 32;
  unsigned left = NOBODY - 1 - nearer;  // less for what is dearer; ~0u: nothing
  Place mine = NONE;
  bool any = false;
#pragma unroll
  for (unsigned q = 0; q < GUARDS; q++) {
    unsigned first = left, which = guard;
    warp_first(first, which);
    if (first == ~0u) break;
    any = true;
    if (lane == q) mine = (Place)which;
    if (guard == which) left = ~0u;
  }
  if (any && lane < GUARDS) guards[lane] = mine;
  return any;
}

// Whether a cluster may have become one of a pair that it speaks for.
__device__ __forceinline__ bool must_look(int i, const int* order, const Place* names, const Place* guards) {
  const int named = names[i];
  if (named == ALONE) return false;
  if (named != GUARDED && order[named & INDEX] < 0) return true;
#pragma unroll
  for (int q = 0; q < GUARDS; q++) {
    const Place guard = guards[i * GUARDS + q];
    if (guard != NONE && order[guard] >= 0) return false;
  }
  return true;
}

// Chooses pairs until the surplus over `most` is used or none is left, and says where every cluster goes: place p of
// the result comes from source[p], merged with other[p]; -1 is alone, -2 is a free place. `moved` follows the `given`
// places of before the first pass. Costs and their minima are not read where there is no surplus; minima are written.
//
// With `remembered`, `new_nearest` is for those in no pair the nearest other in no pair, and where there is no surplus
// what they remember. In a stream with fewer new clusters than two less one for each of the surplus all are compared: a
// matching halves what there is if it must, whatever is remembered, so that the host knows how many passes there are.
extern "C" __global__ void TOGETHER __launch_bounds__(THREADS, 1)
match_pairs(const float* __restrict__ costs, const long long* __restrict__ counts,
            const float* __restrict__ importance, const int* __restrict__ remembered, int n, int most, int places,
            int given, int first_pass,
            int* __restrict__ source, int* __restrict__ other, int* __restrict__ new_nearest,
            long long* __restrict__ moved) {
  extern __shared__ int4 dynamic[];
  const int line = (n + CHUNK - 1) / CHUNK * CHUNK;
  int* order = reinterpret_cast<int*>(dynamic);            // line; of those that are open
  Place* guards = reinterpret_cast<Place*>(order + line);  // n x GUARDS
  Place* names = guards + n * GUARDS;                      // n
  Place* list = names + n;                                 // n
  __shared__ int found, looking;
  __shared__ int before[WARPS];
  const long long stream = blockIdx.x / PEERS;
  const int peer = blockIdx.x % PEERS;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  costs += stream * line * line;
  counts += stream * n;
  importance += stream * n;
  remembered += remembered ? stream * n : 0;
  moved += stream * given;

  if (thread == 0) found = looking = 0;
  __syncthreads();  // found, looking
  // Of the clusters, those that live, and in the upper half those of them that are new.
  int live = 0;
  for (int i = thread; i < line; i += THREADS) {
    const bool lives = i < n && counts[i] > 0;
    if (lives) live += remembered && remembered[i] < 0 ? 0x10001 : 1;
    order[i] = lives ? (__float_as_int(importance[i]) & 0x7fffffff & ~INDEX) | i : EMPTY;
    if (i < n) names[i] = GUARDED;
  }
  live = warp_sum(live);
  if (lane == 0) atomicAdd(&found, live);
  ALL_PEERS(__syncthreads());  // found, order, names; all peers are there
  live = found & 0xffff;
  int surplus = live - most;
  const bool chooses = surplus > 0;
  // Whether pairs count that are not compared: their sign does not, then.
  const bool every = chooses && remembered && (found >> 16) < 2 * surplus - 1;
  const unsigned mask = every ? 0x7fffffffu : 0xffffffffu;

  bool start = true;
  int turn = 0;
  while (chooses) {
    // Of this block's share, those that must look.
    for (int i = thread * PEERS + peer; i < n; i += THREADS * PEERS)
      if (order[i] >= 0 && (start || must_look(i, order, names, guards))) list[atomicAdd(&looking, 1)] = (Place)i;
    __syncthreads();  // list, looking
    for (int k = warp; k < looking; k += WARPS) {
      const int i = list[k];
      unsigned bits, nearest, nearer, guard;
      look(costs + (long long)i * line, order, order[i], line, mask, bits, nearest, nearer, guard);
      if (nearer >= bits + (guard < nearest)) nearer = NOBODY;
      int named = GUARDED;
      if (!keep(nearer, guard, guards + i * GUARDS)) {
        named = ALONE;
        if (bits < NOBODY) {
          look_for_guards(costs + (long long)nearest * line, order, bits, i, line, mask, nearer, guard);
          named = (keep(nearer, guard, guards + i * GUARDS) ? NAMES : turn) | (int)nearest;
        }
      }
      if (named & NAMES ? lane == peer : lane < PEERS) tell(names + i, lane, named);
    }
    start = false;
    if (thread == 0) found = 0;
    ALL_PEERS(__syncthreads());  // names, guards, found; everyone has read list and looking
    if (thread == 0) looking = 0;
    // A peer may be in the next turn already, and tell of pairs of that.
    for (int i = thread; i < n; i += THREADS)
      if (order[i] >= 0 && (names[i] & ~INDEX) == turn) list[atomicAdd(&found, 1)] = (Place)i;
    __syncthreads();  // list, found, looking
    const int candidates = found;
    if (!candidates) break;
    float* cheap = reinterpret_cast<float*>(guards);  // the last pairs: guards are done with
    if (candidates > surplus) {
      for (int p = thread; p < candidates; p += THREADS)
        cheap[p] = __int_as_float(__float_as_int(costs[(long long)list[p] * line + (names[list[p]] & INDEX)]) & (int)mask);
      __syncthreads();  // cheap
    }
    for (int p = thread; p < candidates; p += THREADS) {
      const int i = list[p], j = names[i] & INDEX;
      int rank = 0;
      // The cheapest, as many as the surplus; of equal ones that whose first cluster comes first.
      if (candidates > surplus)
        for (int q = 0; q < candidates; q++)
          rank += cheap[q] < cheap[p] || (cheap[q] == cheap[p] && min((int)list[q], names[list[q]] & INDEX) < min(i, j));
      if (rank < surplus) {
        order[min(i, j)] = KEEPS;
        order[max(i, j)] = GOES;
        names[j] = (Place)i;
      }
    }
    surplus -= min(candidates, surplus);
    turn ^= TURN;
    __syncthreads();  // order, names; everyone has read found, list and cheap
    if (surplus == 0) break;
  }

  // What the result remembers: of those that are left the nearest others.
  Place* nearest = guards;  // n, of the first peer; guards are done with
  if (chooses && remembered) {
    ALL_PEERS();  // the first peer has read cheap
    for (int i = warp * PEERS + peer; i < n; i += WARPS * PEERS) {
      if (order[i] < 0) continue;
      unsigned bits, index, nearer, guard;
      look(costs + (long long)i * line, order, -1, line, mask, bits, index, nearer, guard);  // all are behind that
      if (lane == 0) tell(nearest + i, 0, bits < NOBODY ? (int)index : NONE);
    }
    ALL_PEERS();  // nearest
  }
  if (peer) return;

  // Places of the clusters: those that live to the front, in their order.
  Place* ahead = list;  // of each cluster, those that live before it
  const int share = (n + THREADS - 1) / THREADS;
  const int begin = min(n, thread * share), end = min(n, begin + share);
  int own = 0;
  for (int i = begin; i < end; i++) own += order[i] >= KEEPS;
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
    const bool lives = order[i] >= KEEPS;
    const int to = lives ? place : all + i - place;
    ahead[i] = (Place)place;
    place += lives;
    if (to >= places) continue;
    source[stream * places + to] = i;
    other[stream * places + to] = !lives ? -2 : order[i] == KEEPS ? names[i] & INDEX : -1;
  }
  __syncthreads();  // ahead
  for (int i = thread; i < given; i += THREADS) {
    const long long at = first_pass ? i : moved[i];
    if (first_pass ? counts[i] > 0 : at < live) {
      moved[i] = ahead[order[at] == GOES ? names[at] & INDEX : at];
    } else {
      // A free place goes behind the clusters, as far as it was. After a pass it stood behind `live` and i - passed
      // others, so `passed` clusters were before it.
      const long long passed = first_pass ? i : live + i - at;
      moved[i] = all + i - (passed < n ? ahead[passed] : all);
    }
  }
  if (!remembered) return;
  const auto place_of = [&](int i) { return order[i] >= KEEPS ? ahead[i] : all + i - ahead[i]; };
  for (int i = thread; i < n; i += THREADS) {
    const int to = place_of(i);
    int known = -1;
    if (order[i] >= 0) known = !chooses ? remembered[i] : nearest[i] == NONE ? -1 : nearest[i];
    if (to < places) new_nearest[stream * places + to] = known < 0 ? -1 : place_of(known);
  }
}
