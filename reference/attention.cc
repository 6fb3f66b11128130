// Blocked causal attention on the CPU. One chunk of work is one key/value head of one sequence with
// the query heads that share it. Scores are kept transposed, S^T[key, lane], where a lane is one
// (query position, query head) of the block: maxima, sums and exponentials run along lanes, and no
// horizontal reduction is needed. On the diagonal block, strips of 8 positions skip what the causal
// mask hides: probabilities there are zero, and adding their products would change no bit.
#include "kernels/attention.h"

#include <algorithm>
#include <vector>

#include "reference/attention_blocks.h"
#include "reference/lane_group.h"
#include "reference/panel_cutter.h"
#include "reference/panel_product.h"
#include "reference/rounding.h"

namespace cambium::reference {
namespace {

// scores[key, lane] = k . q, not yet scaled, for the lanes of the key's strip and later.
void score_product(const AttentionInputs& in, const QueryBlock& query, const KeyBlock& keys,
                   const float* key_panel, const float* query_transposed, float* scores) {
  for_strips(keys, [&](int64_t first, int64_t count) {
    const int64_t first_lane = first * in.heads;
    panel_product({.a = key_panel + (keys.first + first) * in.head_dim,
                   .a_row = in.head_dim,
                   .a_column = 1,
                   .b = query_transposed + first_lane,
                   .b_row = query.padded,
                   .c = scores + first * query.padded + first_lane,
                   .c_row = query.padded,
                   .rows = count,
                   .columns = query.padded - first_lane,
                   .depth = in.head_dim});
  });
}

// A product over the keys of a block whose result rows are lanes.
struct LaneProduct {
  const float* weights = nullptr;  // [key, lane]
  const float* panel = nullptr;    // [key, Q], the block's first key
  float* result = nullptr;         // [lane, Q]
  PanelCombine combine = PanelCombine::store;
  const float* lane_scale = nullptr;  // scale_add
};

// result[lane] = (combine) sum over keys of weights[key, lane] panel[key]
void lane_product(const AttentionInputs& in, const QueryBlock& query, const KeyBlock& keys,
                  const LaneProduct& p) {
  for_strips(keys, [&](int64_t first, int64_t count) {
    const int64_t first_lane = first * in.heads;
    const int64_t end_lane = keys.is_diagonal ? (first + count) * in.heads : query.lanes;
    panel_product({.a = p.weights + first_lane,
                   .a_row = 1,
                   .a_column = query.padded,
                   .b = p.panel,
                   .b_row = in.head_dim,
                   .c = p.result + first_lane * in.head_dim,
                   .c_row = in.head_dim,
                   .rows = end_lane - first_lane,
                   .columns = in.head_dim,
                   .depth = first + count,
                   .combine = p.combine,
                   .row_scale = p.lane_scale == nullptr ? nullptr : p.lane_scale + first_lane});
  });
}

// The score of (key, 8 lanes): scaled, minus infinity where the lane does not see the key.
inline Lanes masked_score(Lanes score, float scale, const KeyBlock& keys, int64_t key,
                          Lanes first_key, Lanes last_key) {
  const Lanes scaled = score * scale;
  if (!keys.is_masked) return scaled;
  const Lanes position = broadcast(static_cast<float>(keys.first + key));
  return (position < first_key) | (position > last_key) ? broadcast(-kInfinity) : scaled;
}

// Running state of the online softmax, one value per lane.
struct OnlineSoftmax {
  float* largest = nullptr;  // of the scaled scores so far
  float* sum = nullptr;      // of exp(score - largest)
  float* rescale = nullptr;  // what the block just folded multiplies the earlier output by
};

// Keys up to the end of the strip that the register of lanes from `lane` on lies in.
int64_t key_count(const AttentionInputs& in, const KeyBlock& keys, int64_t lane) {
  if (!keys.is_diagonal) return keys.keys;
  return std::min(keys.keys, (lane / in.heads / kStripTokens + 1) * kStripTokens);
}

// Turns scores into probabilities relative to the new maxima and folds their sums into the state;
// the sums are of unrounded probabilities.
void fold_scores(const AttentionInputs& in, const QueryBlock& query, const KeyBlock& keys,
                 const LaneRange& range, const OnlineSoftmax& state, float* scores) {
  for (int64_t lane = 0; lane < query.padded; lane += kLanes) {
    const Lanes first_key = load_lanes(range.first_key + lane);
    const Lanes last_key = load_lanes(range.last_key + lane);
    const Lanes before = load_lanes(state.largest + lane);
    const int64_t count = key_count(in, keys, lane);
    Lanes largest = before;
    float* at = scores + lane;
    for (int64_t key = 0; key < count; ++key, at += query.padded) {
      const Lanes score = masked_score(load_lanes(at), in.scale, keys, key, first_key, last_key);
      store_lanes(at, score);
      largest = max_lanes(largest, score);
    }
    // A lane that has seen no key yet keeps minus infinity; its shift must stay finite.
    const Lanes shift = largest == broadcast(-kInfinity) ? Lanes{} : largest;
    const Lanes rescale = exp_lanes(before - shift);
    Lanes block_sum = {};
    at = scores + lane;
    int64_t key = 0;
    for (; key + kGroupParts <= count; key += kGroupParts, at += kGroupParts * query.padded) {
      const LaneFloats probs = exp_lanes(load_group(at, query.padded) - shift);
      store_group(at, in.operand(probs), query.padded);
      for (const Lanes prob : probs.part) block_sum += prob;
    }
    for (; key < count; ++key, at += query.padded) {
      const Lanes prob = exp_lanes(load_lanes(at) - shift);
      store_lanes(at, in.operand(prob));
      block_sum += prob;
    }
    store_lanes(state.largest + lane, largest);
    store_lanes(state.rescale + lane, rescale);
    store_lanes(state.sum + lane, load_lanes(state.sum + lane) * rescale + block_sum);
  }
}

struct AttentionOutputs {
  const WriteF32& o;
  float* lse;
  int64_t lse_stride;
};

// The softmax as it starts, or as the parts before this one left it.
void start_softmax(const AttentionInputs& in, const QueryBlock& query, const OnlineSoftmax& state,
                   float* output, const AttentionOutputs& out) {
  std::fill_n(state.largest, query.padded, -kInfinity);
  std::fill_n(state.sum, query.padded, 0.0f);
  std::fill_n(output, query.lanes * in.head_dim, 0.0f);
  if (in.part != KeyPart::next) return;
  for (int64_t lane = 0; lane < query.lanes; ++lane, output += in.head_dim) {
    const int64_t h = query.group * in.heads + lane % in.heads;
    const int64_t row = query.row + lane / in.heads;
    const float lse = out.lse[row * out.lse_stride + h];
    if (lse == -kInfinity) continue;
    state.largest[lane] = lse;
    state.sum[lane] = 1.0f;
    copy_row(out.o.row(row) + h * in.head_dim, output, in.head_dim);
  }
}

// o = output / sum and lse of the block's rows.
void store_output(const AttentionInputs& in, const QueryBlock& query, const OnlineSoftmax& state,
                  const float* output, const AttentionOutputs& out) {
  for (int64_t lane = 0; lane < query.lanes; ++lane, output += in.head_dim) {
    const int64_t h = query.group * in.heads + lane % in.heads;
    const int64_t row = query.row + lane / in.heads;
    const float sum = state.sum[lane];
    float* to = out.o.row(row) + h * in.head_dim;
    float& lse = out.lse[row * out.lse_stride + h];
    if (sum == 0.0f) {  // a part of which the query sees nothing
      std::fill_n(to, in.head_dim, 0.0f);
      lse = -kInfinity;
      continue;
    }
    for (int64_t d = 0; d < in.head_dim; ++d) to[d] = output[d] / sum;
    lse = state.largest[lane] + fmath::log(sum);
  }
}

void forward_group(const AttentionInputs& in, int64_t chunk, const AttentionOutputs& out,
                   Scratch& scratch) {
  const int64_t S = in.sequence_length, Q = in.head_dim, rows = in.block_rows();
  const int64_t most_lanes = in.padded_lanes(rows);
  PanelCutter cut(scratch,
                  2 * PanelCutter::round_up(S * Q) + (2 * Q + rows + 5) * most_lanes + 320);
  float* key_panel = cut.take(S * Q);
  float* value_panel = cut.take(S * Q);
  float* query_transposed = cut.take(Q * most_lanes);
  float* output = cut.take(most_lanes * Q);
  float* scores = cut.take(rows * most_lanes);
  LaneRange range{.first_key = cut.take(most_lanes), .last_key = cut.take(most_lanes)};
  const OnlineSoftmax state{cut.take(most_lanes), cut.take(most_lanes), cut.take(most_lanes)};
  load_keys(in, in.k, chunk, key_panel);
  load_keys(in, in.v, chunk, value_panel);
  for (int64_t local = 0; local < in.query_length; local += in.block_tokens) {
    const QueryBlock query = query_block(in, chunk, local, range);
    load_queries(in, in.q, query, {.stacked = output, .transposed = query_transposed});
    bool stores = in.part != KeyPart::next;
    start_softmax(in, query, state, output, out);
    for_key_blocks(in, query, range, [&](const KeyBlock& keys) {
      score_product(in, query, keys, key_panel, query_transposed, scores);
      fold_scores(in, query, keys, range, state, scores);
      lane_product(in, query, keys,
                   {.weights = scores,
                    .panel = value_panel + keys.first * Q,
                    .result = output,
                    .combine = stores ? PanelCombine::store : PanelCombine::scale_add,
                    .lane_scale = state.rescale});
      stores = false;
    });
    store_output(in, query, state, output, out);
  }
}

// Everything the backward pass of one query block reads, as panels.
struct BackwardPanels {
  float* keys = nullptr;      // [S, Q]
  float* values = nullptr;    // [S, Q]
  float* d_keys = nullptr;    // [S, Q]
  float* d_values = nullptr;  // [S, Q]
  QueryPanels query;          // [lanes, Q] and [Q, padded]
  QueryPanels d_output;
  float* d_query = nullptr;   // [lanes, Q]
  float* probs = nullptr;     // [block, padded]
  float* d_scores = nullptr;  // [block, padded]
  float* lse = nullptr;       // [padded]
  float* delta = nullptr;     // [padded], d_o . o
};

// probs = exp(scaled score - lse), d_scores = probs * (d_probs - delta) * scale, both in place.
void score_gradients(const AttentionInputs& in, const QueryBlock& query, const KeyBlock& keys,
                     const LaneRange& range, const BackwardPanels& p) {
  for (int64_t lane = 0; lane < query.padded; lane += kLanes) {
    const Lanes first_key = load_lanes(range.first_key + lane);
    const Lanes last_key = load_lanes(range.last_key + lane);
    const Lanes lse = load_lanes(p.lse + lane), delta = load_lanes(p.delta + lane);
    const int64_t count = key_count(in, keys, lane);
    const auto score = [&](int64_t key) {
      const Lanes product = load_lanes(p.probs + key * query.padded + lane);
      return masked_score(product, in.scale, keys, key, first_key, last_key) - lse;
    };
    int64_t key = 0;
    for (; key + kGroupParts <= count; key += kGroupParts) {
      const int64_t at = key * query.padded + lane;
      const LaneFloats probs = exp_lanes(LaneFloats::of([&](int i) { return score(key + i); }));
      store_group(p.probs + at, in.operand(probs), query.padded);
      const LaneFloats d_probs = load_group(p.d_scores + at, query.padded);
      const LaneFloats d_scores = in.operand(probs * (d_probs - delta)) * in.scale;
      store_group(p.d_scores + at, d_scores, query.padded);
    }
    for (; key < count; ++key) {
      const int64_t at = key * query.padded + lane;
      const Lanes prob = exp_lanes(score(key));
      store_lanes(p.probs + at, in.operand(prob));
      const Lanes d_score = in.operand(prob * (load_lanes(p.d_scores + at) - delta));
      store_lanes(p.d_scores + at, d_score * in.scale);
    }
  }
}

// How a query block's d_keys and d_values meet those of earlier query blocks.
enum class KeySums {
  from_diagonal,  // the diagonal block is the first to reach its keys: it stores, later ones add
  from_zero,      // another rank may hold the diagonal: all add to zeros
  chain,          // as from_diagonal, on from what earlier chunks left
  apart           // every query block's stay apart
};

// d_keys += d_scores q and d_values += probs d_o for one key block.
void key_gradients(const AttentionInputs& in, const QueryBlock& query, const KeyBlock& keys,
                   KeySums sums, const BackwardPanels& p) {
  const int64_t Q = in.head_dim;
  for_strips(keys, [&](int64_t first, int64_t count) {
    const int64_t first_lane = first * in.heads;
    const int64_t corner = first * query.padded + first_lane;
    PanelProduct product{.a = p.probs + corner,
                         .a_row = query.padded,
                         .a_column = 1,
                         .b = p.d_output.stacked + first_lane * Q,
                         .b_row = Q,
                         .c = p.d_values + (keys.first + first) * Q,
                         .c_row = Q,
                         .rows = count,
                         .columns = Q,
                         .depth = query.lanes - first_lane};
    const bool stores = sums == KeySums::apart || (sums != KeySums::from_zero && keys.is_diagonal);
    product.combine = stores ? PanelCombine::store : PanelCombine::add;
    panel_product(product);
    product.a = p.d_scores + corner;
    product.b = p.query.stacked + first_lane * Q;
    product.c = p.d_keys + (keys.first + first) * Q;
    panel_product(product);
  });
}

// What of the arguments belongs to query rows.
struct BackwardRows {
  ReadF32 o, d_o;
  In<float> lse;
  Out<float> delta;
};

// Loads a query block's panels, lse and delta.
void load_backward_query(const AttentionInputs& in, const QueryBlock& query,
                         const BackwardRows& rows, const BackwardPanels& p) {
  load_queries(in, in.q, query, p.query);
  load_queries(in, rows.d_o, query, p.d_output);
  for (int64_t lane = 0; lane < query.lanes; ++lane) {
    const int64_t h = query.group * in.heads + lane % in.heads;
    const int64_t row = query.row + lane / in.heads;
    const float* d_output = p.d_output.stacked + lane * in.head_dim;
    p.lse[lane] = rows.lse.pointer()[row * rows.lse.row_stride + h];
    p.delta[lane] = dot(rows.o.row(row) + h * in.head_dim, d_output, in.head_dim);
    rows.delta.pointer()[row * rows.delta.row_stride + h] = p.delta[lane];
  }
  std::fill(p.lse + query.lanes, p.lse + query.padded, 0.0f);
  std::fill(p.delta + query.lanes, p.delta + query.padded, 0.0f);
}

// One query block against its key blocks in position order.
void backward_query_block(const AttentionInputs& in, const QueryBlock& query,
                          const LaneRange& range, KeySums sums, const BackwardPanels& p) {
  bool stores = in.part == KeyPart::all;
  for_key_blocks(in, query, range, [&](const KeyBlock& keys) {
    score_product(in, query, keys, p.keys, p.query.transposed, p.probs);
    score_product(in, query, keys, p.values, p.d_output.transposed, p.d_scores);
    score_gradients(in, query, keys, range, p);
    key_gradients(in, query, keys, sums, p);
    lane_product(in, query, keys,
                 {.weights = p.d_scores,
                  .panel = p.keys + keys.first * in.head_dim,
                  .result = p.d_query,
                  .combine = stores ? PanelCombine::store : PanelCombine::add});
    stores = false;
  });
}

// What a part's products are added to: zeros, or the sum over the parts before it.
void start_d_query(const AttentionInputs& in, const QueryBlock& query, const WriteF32& d_q,
                   float* d_query) {
  const int64_t width = in.heads * in.head_dim;
  for (int64_t token = 0; token < query.tokens; ++token, d_query += width) {
    if (in.part == KeyPart::first) {
      std::fill_n(d_query, width, 0.0f);
    } else {
      copy_row(d_q.row(query.row + token) + query.group * width, d_query, width);
    }
  }
}

void store_d_query(const AttentionInputs& in, const QueryBlock& query, const float* d_query,
                   const WriteF32& d_q) {
  const int64_t width = in.heads * in.head_dim;
  for (int64_t token = 0; token < query.tokens; ++token, d_query += width) {
    float* to = d_q.row(query.row + token) + query.group * width;
    copy_row(d_query, to, width);
  }
}

// body(panel row, row of the tensor) of each key at hand: by owner of the keys where ranks share
// sequences, which one rank does not.
template <class Body>
void for_d_keys(const AttentionInputs& in, int64_t chunk, float* panel, const WriteF32& tensor,
                Body&& body) {
  const int64_t S = in.sequence_length, column = chunk % in.groups * in.head_dim;
  for (int64_t key = 0; key < S; ++key, panel += in.head_dim) {
    if (!in.has_key(key)) continue;
    const int64_t owner = in.part == KeyPart::all ? in.share.owner(key, S) : 0;
    const int64_t part = owner * in.sequences + chunk / in.groups;
    body(panel, tensor.row(part * in.query_length + in.share.row(key, S)) + column);
  }
}

void load_d_keys(const AttentionInputs& in, int64_t chunk, float* panel, const WriteF32& tensor) {
  for_d_keys(in, chunk, panel, tensor,
             [&](float* to, const float* from) { copy_row(from, to, in.head_dim); });
}
void store_d_keys(const AttentionInputs& in, int64_t chunk, float* panel, const WriteF32& tensor) {
  for_d_keys(in, chunk, panel, tensor,
             [&](const float* from, float* to) { copy_row(from, to, in.head_dim); });
}

// A query block's partials of the keys that it sees, to the parts of the ranks that own the keys.
void store_partials(const AttentionInputs& in, int64_t chunk, int64_t local,
                    const QueryBlock& query, const float* panel, Out<float> partial) {
  const int64_t S = in.sequence_length, blocks = in.query_length / in.block_tokens;
  const int64_t sequence = chunk / in.groups, column = query.group * in.head_dim;
  const int64_t end = query.first + query.tokens;
  for (int64_t key = query.first_key_block * in.block_tokens; key < end; ++key) {
    const int64_t part = in.share.owner(key, S) * in.sequences + sequence;
    const int64_t row =
        (part * blocks + local / in.block_tokens) * in.query_length + in.share.row(key, S);
    copy_row(panel + key * in.head_dim, partial.pointer() + row * partial.row_stride + column,
             in.head_dim);
  }
}

BackwardPanels cut_backward_panels(const AttentionInputs& in, Scratch& scratch, LaneRange& range) {
  const int64_t S = in.sequence_length, Q = in.head_dim, rows = in.block_rows();
  const int64_t lanes = in.padded_lanes(rows);
  PanelCutter cut(scratch, 4 * PanelCutter::round_up(S * Q) + (5 * Q + 2 * rows + 4) * lanes + 320);
  BackwardPanels p;
  for (float** panel : {&p.keys, &p.values, &p.d_keys, &p.d_values}) *panel = cut.take(S * Q);
  for (float** panel : {&p.query.stacked, &p.query.transposed, &p.d_output.stacked,
                        &p.d_output.transposed, &p.d_query}) {
    *panel = cut.take(lanes * Q);
  }
  for (float** panel : {&p.probs, &p.d_scores}) *panel = cut.take(rows * lanes);
  for (float** panel : {&p.lse, &p.delta, &range.first_key, &range.last_key}) {
    *panel = cut.take(lanes);
  }
  return p;
}

}  // namespace

void attention(const AttentionArgs& args, Workers& workers) {
  const AttentionInputs in(args);
  const bool all = args.part == KeyPart::all;
  const WriteF32 o(all ? RawView(args.o_THQ) : RawView(args.o_sum_THQ));
  const AttentionOutputs out{o, all ? args.lse_TH.pointer() : args.lse_sum_TH.pointer(),
                             all ? args.lse_TH.row_stride : args.lse_sum_TH.row_stride};
  workers.parallel_for(in.sequences * in.groups, [&](int64_t chunk, Scratch& scratch) {
    forward_group(in, chunk, out, scratch);
  });
}

void attention_backward(const AttentionBackwardArgs& args, Workers& workers) {
  const AttentionInputs in(args);
  const BackwardRows rows{ReadF32(args.o_THQ), ReadF32(args.d_o_THQ), args.lse_TH, args.delta_TH};
  const bool one_rank = in.share.ranks == 1;
  RawView d_q_rows = in.part == KeyPart::all ? RawView(args.d_q_THQ) : RawView(args.d_q_sum_THQ);
  const bool chains = args.queries != QueryChunk::both;
  if (chains) d_q_rows.access = Access::read_write;  // the other chunk's rows stay
  const WriteF32 d_q(d_q_rows);
  const WriteF32 d_k(one_rank ? RawView(args.d_k_TGQ)
                     : chains ? RawView(args.d_k_chain_SC)
                              : RawView(args.d_k_sum_SC));
  const WriteF32 d_v(one_rank ? RawView(args.d_v_TGQ)
                     : chains ? RawView(args.d_v_chain_SC)
                              : RawView(args.d_v_sum_SC));
  const KeySums sums = one_rank                  ? KeySums::from_diagonal
                       : chains                  ? KeySums::chain
                       : args.d_k_sum_SC.empty() ? KeySums::apart
                                                 : KeySums::from_zero;
  const int64_t half = in.query_length / 2;
  const int64_t first_row = args.queries == QueryChunk::far ? half : 0;
  const int64_t end_row = args.queries == QueryChunk::near ? half : in.query_length;
  workers.parallel_for(in.sequences * in.groups, [&](int64_t chunk, Scratch& scratch) {
    LaneRange range;
    const BackwardPanels p = cut_backward_panels(in, scratch, range);
    load_keys(in, in.k, chunk, p.keys);
    load_keys(in, in.v, chunk, p.values);
    if (sums == KeySums::from_zero) {
      for (float* panel : {p.d_keys, p.d_values}) {
        std::fill_n(panel, in.sequence_length * in.head_dim, 0.0f);
      }
    }
    if (sums == KeySums::chain) {
      load_d_keys(in, chunk, p.d_keys, d_k);
      load_d_keys(in, chunk, p.d_values, d_v);
    }
    for (int64_t local = first_row; local < end_row; local += in.block_tokens) {
      const QueryBlock query = query_block(in, chunk, local, range);
      load_backward_query(in, query, rows, p);
      if (in.part != KeyPart::all) start_d_query(in, query, d_q, p.d_query);
      backward_query_block(in, query, range, sums, p);
      store_d_query(in, query, p.d_query, d_q);
      if (sums != KeySums::apart) continue;
      store_partials(in, chunk, local, query, p.d_keys, args.d_k_partial_MC);
      store_partials(in, chunk, local, query, p.d_values, args.d_v_partial_MC);
    }
    if (sums == KeySums::apart) return;
    store_d_keys(in, chunk, p.d_keys, d_k);
    store_d_keys(in, chunk, p.d_values, d_v);
  });
}

void attention_key_fold(const AttentionKeyFoldArgs& a, Workers& workers) {
  const int64_t S = a.sequence_length, block = a.block_tokens, local_S = S / a.share.ranks;
  const int64_t sequences = a.d_x_TGQ[0] / local_S, C = a.partial_MC[1], blocks = local_S / block;
  const WriteF32 d_x(a.d_x_TGQ);
  // The key block at which a query block begins: earlier ones belong to earlier documents.
  std::vector<int64_t> first_key_block(static_cast<size_t>(sequences * (S / block)), 0);
  for (int64_t i = 0; i < std::ssize(first_key_block) && !a.document_start_S.empty(); ++i) {
    const int64_t sequence_row = i / (S / block) * S;
    int64_t earliest = S;
    for (int64_t t = i * block; t < (i + 1) * block; ++t) {
      earliest = std::min(earliest, a.document_start_S.pointer()[t] - sequence_row);
    }
    first_key_block[i] = std::max<int64_t>(0, earliest) / block;
  }
  workers.parallel_for(sequences * blocks, [&](int64_t chunk, Scratch&) {
    const int64_t sequence = chunk / blocks, first_row = chunk % blocks * block;
    const int64_t key_block = a.share.position(first_row, S) / block;
    for (int64_t index = key_block; index < S / block; ++index) {
      if (first_key_block[sequence * (S / block) + index] > key_block) continue;
      const int64_t part = a.share.owner(index * block, S) * sequences + sequence;
      const int64_t query_block = a.share.row(index * block, S) / block;
      const int64_t from_row = (part * blocks + query_block) * local_S + first_row;
      for (int64_t t = 0; t < block; ++t) {
        const float* from = a.partial_MC.pointer() + (from_row + t) * a.partial_MC.row_stride;
        float* to = d_x.row(sequence * local_S + first_row + t);
        for (int64_t i = 0; i < C; ++i) to[i] = index == key_block ? from[i] : to[i] + from[i];
      }
    }
  });
}

}  // namespace cambium::reference
