// Context parallelism (zigzag, src/parallel/batch_layout.h): what the ranks that share sequences
// exchange in a layer. With cp = 1 nothing here is called.
//
// Forward gathers every rank's keys and values and puts them in position order; they are kept for
// backward. Backward, fast: each rank's sums of dK and dV over its queries are reduced to the ranks
// that own the keys. Exact: each query block's dK and dV stay apart, travel, and are folded by the
// owners in position order: the bits of one rank. Napkin, per layer and rank: 2 T G Q elements
// travel forward to each other rank; back as many in fp32, exact S / (cp block_tokens) times that.
#pragma once

#include "kernels/attention.h"
#include "src/model/qwen3_moe.h"

namespace cambium {

ContextShare context_share(const Rank& rank);

// Whole sequences' rows [T cp, G Q] of this rank's `x` ([T, G Q], rows may be strided).
Buffer gather_context(const LayerContext& c, const MicroBatch& batch, In<Real> x_TC);

// What a layer's attention asks of its keys and values.
struct KeyGradients {
  Out<Real> d_k_TGQ, d_v_TGQ;
};

// `sum_SC` [T cp, 2 G Q], a key's dK beside its dV: attention_backward's sums, owner by owner.
void reduce_context(const LayerContext& c, const MicroBatch& batch, const Buffer& sum_SC,
                    const KeyGradients& d);

// d_x [T, G, Q] of this rank's keys from the partials of its query blocks.
void fold_context(const LayerContext& c, const MicroBatch& batch, const Buffer& partial_MC,
                  Out<Real> d_x_TGQ);

// Fractions of the choices [N, E] over the context group's tokens, for balance_loss: of each
// sequence, or of all (N = 1).
enum class FractionOf { each_sequence, all };
Buffer context_fractions(const LayerContext& c, const MicroBatch& batch,
                         In<int32_t> expert_index_TK, FractionOf of);

}  // namespace cambium
