// What a chunk of attention's work on the CPU reads: blocks of queries, and the key blocks that
// each of them sees.
#pragma once

#include <algorithm>
#include <limits>

#include "kernels/attention.h"
#include "reference/panel_product.h"
#include "reference/rounding.h"

namespace cambium::reference {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The part of the arguments that both passes read.
struct AttentionInputs {
  template <class Args>
  explicit AttentionInputs(const Args& a)
      : q(a.q_THQ),
        k(a.k_TGQ),
        v(a.v_TGQ),
        document_start(a.document_start_T.pointer()),
        heads(a.q_THQ[1] / a.k_TGQ[1]),
        groups(a.k_TGQ[1]),
        head_dim(a.q_THQ[2]),
        sequences(a.q_THQ[0] * a.share.ranks / a.sequence_length),
        sequence_length(a.sequence_length),
        query_length(a.sequence_length / a.share.ranks),
        block_tokens(a.block_tokens),
        scale(a.scale),
        share(a.share),
        part(a.part),
        key_rank(a.key_rank),
        rounds_operands(a.q_THQ.dtype == DType::bf16) {}
  ReadF32 q, k, v;
  const int32_t* document_start;
  int64_t heads;  // query heads per group
  int64_t groups, head_dim, sequences;
  int64_t sequence_length;  // of keys
  int64_t query_length;     // this rank's part of a sequence
  int64_t block_tokens;
  float scale;
  ContextShare share;
  KeyPart part;
  int64_t key_rank;
  bool rounds_operands;  // P and dS, as the tensor cores' operands

  // A register or a group of them as the operand of a product.
  template <class Values>
  [[gnu::always_inline]] Values operand(const Values& values) const {
    return rounds_operands ? bf16_lanes(values) : values;
  }
  // Whether k and v hold a position of a sequence, and its row there.
  bool has_key(int64_t position) const {
    return part == KeyPart::all || share.owner(position, sequence_length) == key_rank;
  }
  int64_t key_row(int64_t sequence, int64_t position) const {
    return part == KeyPart::all ? sequence * sequence_length + position
                                : sequence * query_length + share.row(position, sequence_length);
  }
  int64_t block_rows() const { return std::min(block_tokens, sequence_length); }
  int64_t padded_lanes(int64_t tokens) const {
    return (heads * tokens + kLanes - 1) / kLanes * kLanes;
  }
};

// One (sequence, group) and one of its query blocks.
struct QueryBlock {
  int64_t row = 0;  // of the block's first token in q
  int64_t group = 0;
  int64_t first = 0;  // position in the sequence
  int64_t tokens = 0;
  int64_t lanes = 0;  // heads * tokens; lane = token * heads + head
  int64_t padded = 0;
  int64_t first_key_block = 0;  // blocks before it belong to earlier documents
};

// Keys that a lane sees: first_key <= key <= last_key, positions held as floats (exact below 2^24).
struct LaneRange {
  float* first_key = nullptr;
  float* last_key = nullptr;
  float latest_first = 0.0f;  // the largest first_key
};

// `local`: the block's first row in this rank's part of the sequence.
inline QueryBlock query_block(const AttentionInputs& in, int64_t chunk, int64_t local,
                              LaneRange& range) {
  const int64_t key_row = chunk / in.groups * in.sequence_length;
  const int64_t first = in.share.position(local, in.sequence_length);
  QueryBlock block;
  block.row = chunk / in.groups * in.query_length + local;
  block.group = chunk % in.groups;
  block.first = first;
  block.tokens = std::min(in.block_tokens, in.query_length - local);
  block.lanes = in.heads * block.tokens;
  block.padded = in.padded_lanes(block.tokens);
  int64_t earliest = first;
  range.latest_first = 0.0f;
  for (int64_t token = 0; token < block.tokens; ++token) {
    int64_t start = 0;
    if (in.document_start != nullptr) {
      start = std::max<int64_t>(0, in.document_start[block.row + token] - key_row);
      CHECK_LE(start, first + token);
    }
    earliest = std::min(earliest, start);
    range.latest_first = std::max(range.latest_first, static_cast<float>(start));
    for (int64_t head = 0; head < in.heads; ++head) {
      range.first_key[token * in.heads + head] = static_cast<float>(start);
      range.last_key[token * in.heads + head] = static_cast<float>(first + token);
    }
  }
  for (int64_t lane = block.lanes; lane < block.padded; ++lane) {
    range.first_key[lane] = 0.0f;
    range.last_key[lane] = kInfinity;
  }
  block.first_key_block = earliest / in.block_tokens;
  return block;
}

// stacked[lane, d] = the block's rows of a [T, heads, Q] tensor, transposed[d, lane] the same;
// padding lanes of `transposed` are zero.
struct QueryPanels {
  float* stacked = nullptr;
  float* transposed = nullptr;
};

inline void load_queries(const AttentionInputs& in, const ReadF32& tensor, const QueryBlock& block,
                         QueryPanels to) {
  const int64_t width = in.heads * in.head_dim;
  for (int64_t token = 0; token < block.tokens; ++token) {
    const float* from = tensor.row(block.row + token) + block.group * width;
    copy_row(from, to.stacked + token * width, width);
  }
  panel_transpose({.from = to.stacked,
                   .from_row = in.head_dim,
                   .to = to.transposed,
                   .to_row = block.padded,
                   .rows = block.lanes,
                   .columns = in.head_dim});
  for (int64_t d = 0; d < in.head_dim; ++d) {
    float* row = to.transposed + d * block.padded;
    std::fill(row + block.lanes, row + block.padded, 0.0f);
  }
}

// to[position, d]: one key/value head of a sequence, where k and v hold it.
inline void load_keys(const AttentionInputs& in, const ReadF32& tensor, int64_t chunk, float* to) {
  const int64_t sequence = chunk / in.groups, column = chunk % in.groups * in.head_dim;
  for (int64_t position = 0; position < in.sequence_length; ++position, to += in.head_dim) {
    if (!in.has_key(position)) continue;
    copy_row(tensor.row(in.key_row(sequence, position)) + column, to, in.head_dim);
  }
}

// A block of keys and where its scores lie.
struct KeyBlock {
  int64_t first = 0;
  int64_t keys = 0;
  bool is_diagonal = false;  // keys and queries are the same positions
  bool is_masked = false;    // some lane does not see some key
};

// Positions per strip of a diagonal block: a strip's lanes begin at a multiple of a register.
constexpr int64_t kStripTokens = kLanes;

// body(first, count) for the strips of a diagonal block, or once for another block. On the diagonal
// keys [first, first + count) are seen by lanes from first * heads on.
template <class Body>
void for_strips(const KeyBlock& keys, Body&& body) {
  const int64_t step = keys.is_diagonal ? kStripTokens : keys.keys;
  for (int64_t first = 0; first < keys.keys; first += step) {
    body(first, std::min(step, keys.keys - first));
  }
}

inline KeyBlock key_block(const AttentionInputs& in, const QueryBlock& query,
                          const LaneRange& range, int64_t index) {
  KeyBlock block;
  block.first = index * in.block_tokens;
  block.keys = std::min(in.block_tokens, in.sequence_length - block.first);
  block.is_diagonal = block.first == query.first;
  block.is_masked = block.is_diagonal || range.latest_first > static_cast<float>(block.first);
  return block;
}

// body(keys) for the key blocks that a query block sees and k and v hold, in position order.
template <class Body>
void for_key_blocks(const AttentionInputs& in, const QueryBlock& query, const LaneRange& range,
                    Body&& body) {
  for (int64_t index = query.first_key_block; index <= query.first / in.block_tokens; ++index) {
    const KeyBlock keys = key_block(in, query, range, index);
    if (in.has_key(keys.first)) body(keys);
  }
}

}  // namespace cambium::reference
