// What the tensor-core kernels of attention share: the problem, its query tiles, tensor maps.
//
// Tiles begin at multiples of their rows from the start of each sequence, never across sequences:
// what lies beyond a sequence's end arrives as zeros and is not written (the tensor maps have one
// dimension for sequences and one for positions). So a sequence's bits depend on it alone (D2).
// Head dims that are multiples of 8 run padded to 64 or 128 columns, the padding being zeros too.
#pragma once

#include "kernels/attention.h"
#include "kernels/attention_hopper.cuh"

namespace cambium::cuda {

constexpr int kTileRows = kAttentionTile;  // queries of a query tile; keys of a key tile
constexpr int kConsumers = 2;              // warpgroups that compute, 64 rows of the tile each
constexpr int kWarpgroupRows = kTileRows / kConsumers;
constexpr int kTileThreads = (kConsumers + 1) * kWarpgroupThreads;  // and one that loads
constexpr int kProducerRegisters = 24;
constexpr int kConsumerRegisters = 240;
static_assert((kProducerRegisters + kConsumers * kConsumerRegisters) * kWarpgroupThreads <= 65536,
              "a multiprocessor has 65,536 registers");
constexpr int kConsumerWarps = kConsumers * kWarpgroupThreads / kWarpLanes;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// Which of the computing warpgroups this thread belongs to.
__device__ __forceinline__ int consumer_index() {
  return static_cast<int>(uniform(threadIdx.x / kWarpgroupThreads)) - 1;
}

// Whole sequences: their queries lie where their keys do.
struct AttentionShape {
  static constexpr bool kIsShared = false;  // dK and dV are sums in fp32
  static constexpr bool kIsPart = false;    // o and dQ are too
  int sequences, S, H, G, Q;                // S: of keys
  float scale;
  const int32_t* document_start;  // null without documents

  __host__ __device__ int heads() const { return H / G; }
  __host__ __device__ int key_tiles() const { return (S + kTileRows - 1) / kTileRows; }
  __host__ __device__ int query_tiles() const { return key_tiles(); }
  __host__ __device__ int query_length() const { return S; }
  __host__ __device__ int first_query() const { return 0; }  // of those that the call takes
  __host__ __device__ int end_query() const { return S; }
  // The last key that a query row sees but for documents, and the first query row that sees a key.
  __device__ int last_key(int row) const { return row; }
  __device__ int first_row(int key) const { return key; }
  // Whether a tile of keys is that of the queries from `row` on, which see a part of it.
  __device__ bool is_own(int, int) const { return true; }
  // A key's number in the micro-batch, as document starts count.
  __device__ int key_number(int sequence, int key) const { return sequence * S + key; }
  // The first key that a query row of a sequence sees.
  __device__ int first_key(int sequence, int row) const {
    if (document_start == nullptr || row >= S) return 0;
    return max(0, document_start[int64_t{sequence} * S + row] - sequence * S);
  }
};

// Rows of a rank's part of a sequence, `length` of them, that lie before a position.
__device__ __forceinline__ int rows_before(const ContextShare& share, int position, int length) {
  const int64_t S = share.ranks * length;
  const int chunk = length / 2, near = static_cast<int>(share.position(0, S));
  const int far = static_cast<int>(share.position(chunk, S));
  return min(max(position - near, 0), chunk) + min(max(position - far, 0), chunk);
}

// This rank's part of every sequence's queries. In products of tiles, tiles do not cross chunks.
struct SharedAttentionShape : AttentionShape {
  static constexpr bool kIsShared = true;
  ContextShare share;
  QueryChunk queries = QueryChunk::both;

  __host__ __device__ int query_length() const { return S / static_cast<int>(share.ranks); }
  __host__ __device__ int first_query() const {
    return queries == QueryChunk::far ? query_length() / 2 : 0;
  }
  __host__ __device__ int end_query() const {
    return queries == QueryChunk::near ? query_length() / 2 : query_length();
  }
  __host__ __device__ int query_tiles() const { return (end_query() - first_query()) / kTileRows; }
  // Whether the call goes on from what chunks before its own left, and ends what they add.
  __device__ bool is_chain() const { return queries != QueryChunk::both; }
  __device__ bool is_end() const { return !is_chain() || last_key(end_query() - 1) == S - 1; }
  __device__ int last_key(int row) const { return static_cast<int>(share.position(row, S)); }
  __device__ int first_row(int key) const { return rows_before(share, key, query_length()); }
  __device__ bool is_own(int row, int key) const {
    return row < end_query() && last_key(row) == key;
  }
  __device__ int first_key(int sequence, int row) const {
    if (document_start == nullptr) return 0;
    return max(0, document_start[int64_t{sequence} * query_length() + row] - sequence * S);
  }
  // Row of a key's sums: [rank that owns it][sequence][row there].
  __device__ int64_t sum_row(int sequence, int position) const {
    return (share.owner(position, S) * sequences + sequence) * query_length() +
           share.row(position, S);
  }
};

// This rank's part of every sequence's queries against one rank's part of the keys, S of each: rows
// are numbered within the parts. Of its own keys a query sees those up to itself; of an earlier
// rank's every query sees the near chunk; of a later rank's the far queries see all.
struct PartAttentionShape : AttentionShape {
  static constexpr bool kIsShared = true;
  static constexpr bool kIsPart = true;
  ContextShare queries, keys;
  bool adds = false;  // to what earlier parts left

  __host__ __device__ bool is_own_part() const { return keys.index == queries.index; }
  __host__ __device__ int first_query() const { return keys.index > queries.index ? S / 2 : 0; }
  __host__ __device__ int query_tiles() const { return (S - first_query()) / kTileRows; }
  __device__ bool is_chain() const { return false; }
  __device__ bool is_end() const { return true; }
  __device__ int last_key(int row) const {
    if (is_own_part()) return row;
    return keys.index < queries.index ? S / 2 - 1 : S - 1;
  }
  __device__ int first_row(int key) const {
    if (is_own_part()) return key;
    return keys.index < queries.index && key >= S / 2 ? S : first_query();
  }
  __device__ bool is_own(int row, int) const { return is_own_part() && row < S; }
  __device__ int key_number(int sequence, int key) const {
    const int64_t whole = queries.ranks * S;
    return static_cast<int>(sequence * whole + keys.position(key, whole));
  }
  __device__ int first_key(int sequence, int row) const {
    if (document_start == nullptr) return 0;
    const int64_t of_batch = document_start[int64_t{sequence} * S + row];
    const int64_t start = of_batch - sequence * queries.ranks * S;
    return rows_before(keys, static_cast<int>(start < 0 ? 0 : start), S);
  }
  __device__ int64_t sum_row(int sequence, int key) const { return int64_t{sequence} * S + key; }
};

// A ring of stages in shared memory: which one is next, and its barriers' phase.
template <int kStages>
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// 128 queries of one head, from `row` of the rank's part of the sequence on, and the key tiles they
// see, first_key_tile .. last_key_tile; one that they do not see where they see none.
struct QueryTile {
  int sequence, head, row, first_key_tile, last_key_tile;
};

// Longest first, so that the last ones to start are short; heads that share keys side by side.
template <class Shape>
__device__ __forceinline__ QueryTile query_tile(const Shape& shape, int index) {
  const int columns = shape.sequences * shape.H, column = index % columns;
  QueryTile tile;
  tile.sequence = column / shape.H;
  tile.head = column % shape.H;
  tile.row = shape.first_query() + (shape.query_tiles() - 1 - index / columns) * kTileRows;
  tile.last_key_tile = shape.last_key(tile.row) / kTileRows;
  tile.first_key_tile =
      min(shape.first_key(tile.sequence, tile.row) / kTileRows, tile.last_key_tile);
  return tile;
}

// The tile that this block works on in its `round`-th turn: blocks take turns in snake order, which
// evens out tiles sorted by length.
__device__ __forceinline__ int snake_index(int round) {
  const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
  return round * blocks + (round % 2 == 0 ? block : blocks - 1 - block);
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log(e^before + e^part), and the shares of it that the two are.
struct MergedLse {
  float lse, before, part;
  __device__ __forceinline__ MergedLse(float lse_before, float lse_part) {
    const float most = fmaxf(lse_before, lse_part);
    if (most == -INFINITY) {
      lse = -INFINITY, before = part = 0.0f;
      return;
    }
    before = expf(lse_before - most), part = expf(lse_part - most);
    const float sum = before + part;
    before /= sum, part /= sum;
    lse = most + logf(sum);
  }
};

// Which rows and columns of an accumulator are this thread's.
struct AccumulatorLane {
  int row;     // and row + 8
  int column;  // and column + 1, and both + 8 i
};
__device__ __forceinline__ AccumulatorLane accumulator_lane() {
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroupThreads;
  return {thread / kWarpLanes * 16 + thread % kWarpLanes / 4, thread % 4 * 2};
}

// The two rows of a warpgroup's 64 queries that are this thread's, and the keys they see.
struct QueryRows {
  int first_row;  // the warpgroup's, in the rank's part of the sequence
  int row[2];
  int last_seen[2];
  int first_seen[2];
  int latest_first;  // the largest first_seen of the warpgroup
};
template <class Shape>
__device__ __forceinline__ QueryRows query_rows(const Shape& shape, const QueryTile& tile,
                                                int warpgroup) {
  QueryRows rows;
  rows.first_row = tile.row + warpgroup * kWarpgroupRows;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    rows.row[r] = rows.first_row + accumulator_lane().row + 8 * r;
    rows.last_seen[r] = shape.last_key(rows.row[r]);
    rows.first_seen[r] = shape.first_key(tile.sequence, rows.row[r]);
  }
  rows.latest_first = shape.first_key(
      tile.sequence, min(rows.first_row + kWarpgroupRows, shape.query_length()) - 1);
  return rows;
}

// Rows of an accumulator, times a factor for each of the two rows, as bf16 into a swizzled tile of
// kRows rows in shared memory, at `first_row`.
template <int kRows, int kElements>
__device__ __forceinline__ void store_accumulator(const float (&d)[kElements], float factor,
                                                  char* tile, int first_row) {
  const AccumulatorLane lane = accumulator_lane();
#pragma unroll
  for (int i = 0; i < kElements; i += 2) {
    const int row = first_row + lane.row + i / 2 % 2 * 8, chunk = i / 4;
    char* at = tile + chunk / 8 * kRows * kSwizzleBytes + row * kSwizzleBytes +
               ((chunk % 8 ^ row % 8) * 16) + lane.column * 2;
    *reinterpret_cast<uint32_t*>(at) = pack_pair(d[i] * factor, d[i + 1] * factor);
  }
}

// A sum's place for this thread's row `r` and a head's columns from its first on.
__device__ __forceinline__ float* sum_at(float* sum, int64_t stride, const AttentionShape& shape,
                                         const QueryTile& tile, int row) {
  const int64_t token = int64_t{tile.sequence} * shape.S + row;
  return sum + token * stride + tile.head * shape.Q + accumulator_lane().column;
}

// body(element, its place) for pairs of this thread's row `r` of an accumulator.
template <int kElements, class Body>
__device__ __forceinline__ void each_pair(int r, int Q, float* row, Body&& body) {
#pragma unroll
  for (int i = 2 * r; i < kElements; i += 4) {
    const int column = i / 4 * 8;
    if (column < Q) body(i, reinterpret_cast<float2*>(row + column));
  }
}

// Map of a [T][heads][Q] view as [sequences][T / sequences][heads][Q], boxes of [rows][64 columns].
CUtensorMap attention_map(const RawView& view, const AttentionShape& shape, int rows);

}  // namespace cambium::cuda
