// Context parallelism (zigzag, src/parallel/batch_layout.h): what the ranks that share sequences
// exchange in a layer. With cp = 1 nothing here is called.
//
// Forward gathers every rank's keys and values and puts them in position order; they are kept for
// backward. Backward leaves each query block's dK and dV apart, sends them to the ranks that own
// the keys, and folds them there in position order: the bits of one rank. Napkin, per layer and
// rank: 2 T G Q elements travel forward, and 2 T G Q S / (cp block_tokens) fp32 elements back.
#pragma once

#include "kernels/attention.h"
#include "src/model/qwen3_moe.h"

namespace cambium {

ContextShare context_share(const Rank& rank);

// Whole sequences' rows [T cp, G Q] of this rank's `x` ([T, G Q], rows may be strided).
Buffer gather_context(const LayerContext& c, const MicroBatch& batch, In<Real> x_TC);

// d_x [T, G, Q] of this rank's keys from the partials of its query blocks.
void fold_context(const LayerContext& c, const MicroBatch& batch, const Buffer& partial_MC,
                  Out<Real> d_x_TGQ);

// Fractions of the choices [N, E] over the context group's tokens, for balance_loss: of each
// sequence, or of all (N = 1).
enum class FractionOf { each_sequence, all };
Buffer context_fractions(const LayerContext& c, const MicroBatch& batch,
                         In<int32_t> expert_index_TK, FractionOf of);

}  // namespace cambium
