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
  static constexpr bool kIsShared = false;
  int sequences, S, H, G, Q;
  float scale;
  const int32_t* document_start;  // null without documents

  __host__ __device__ int heads() const { return H / G; }
  __host__ __device__ int key_tiles() const { return (S + kTileRows - 1) / kTileRows; }
  __host__ __device__ int query_tiles() const { return key_tiles(); }
  __host__ __device__ int query_length() const { return S; }
  // The place in its sequence of a query row, and the first query row from a place on.
  __host__ __device__ int first_query() const { return 0; }  // of those that the call takes
  __host__ __device__ int end_query() const { return S; }
  __device__ int position(int row) const { return row; }
  __device__ int first_row(int position) const { return position; }
  // Position of the first key that a query row of a sequence sees.
  __device__ int first_key(int sequence, int row) const {
    if (document_start == nullptr || row >= S) return 0;
    return max(0, document_start[int64_t{sequence} * S + row] - sequence * S);
  }
};

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
  __device__ bool is_end() const { return !is_chain() || position(end_query() - 1) == S - 1; }
  __device__ int position(int row) const { return static_cast<int>(share.position(row, S)); }
  __device__ int first_row(int position) const {
    const int chunk = query_length() / 2, near = this->position(0), far = this->position(chunk);
    return min(max(position - near, 0), chunk) + min(max(position - far, 0), chunk);
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

// 128 queries of one head, from `row` of the rank's part of the sequence and position `first` on,
// and the key tiles they see, first_key_tile .. last_key_tile.
struct QueryTile {
  int sequence, head, row, first, first_key_tile, last_key_tile;
};

// Longest first, so that the last ones to start are short; heads that share keys side by side.
template <class Shape>
__device__ __forceinline__ QueryTile query_tile(const Shape& shape, int index) {
  const int columns = shape.sequences * shape.H, column = index % columns;
  QueryTile tile;
  tile.sequence = column / shape.H;
  tile.head = column % shape.H;
  tile.row = shape.first_query() + (shape.query_tiles() - 1 - index / columns) * kTileRows;
  tile.first = shape.position(tile.row);
  tile.last_key_tile = tile.first / kTileRows;
  tile.first_key_tile = shape.first_key(tile.sequence, tile.row) / kTileRows;
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
  int position[2];
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
    rows.position[r] = rows.row[r] - tile.row + tile.first;
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

// Map of a [T][heads][Q] view as [sequences][T / sequences][heads][Q], boxes of [rows][64 columns].
CUtensorMap attention_map(const RawView& view, const AttentionShape& shape, int rows);

}  // namespace cambium::cuda
