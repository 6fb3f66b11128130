// Context parallelism (zigzag, src/parallel/batch_layout.h): what the ranks that share sequences
// exchange in a layer. With cp = 1 nothing here is called.
//
// parallel.context = all_gather: forward gathers every rank's keys and values and puts them in
// position order; they are kept for backward. Backward, fast: each rank's sums of dK and dV over
// its queries are reduced to the ranks that own the keys. Exact: the sums go on from chunk to chunk
// of the queries in position order, up the ranks and down again, and from rank 0 to the owners: the
// bits of one rank, one rank at work at a time. Napkin, per layer and rank: 2 T G Q elements travel
// forward to each other rank; back as many in fp32, exact two to three times that.
//
// parallel.context = ring, fast: a rank keeps its own keys and values alone. They go from rank to
// rank, each part on its way to the next one while attention reads it, and are folded by their
// log-sum-exp; backward sends them round again, and behind them the sums of their dK and dV, which
// come home with the last hop. Exact (CPU alone): the same hops fill the whole sequences that
// all_gather would, each query block's dK and dV stay apart, go straight to their owners, rank by
// rank, and are folded there in position order: blocks travel, not sums, and ranks work side by
// side, for S / (2 cp block_tokens) times the bytes of a chain's sums.
#pragma once

#include <utility>

#include "kernels/attention.h"
#include "src/model/qwen3_moe.h"

namespace cambium {

ContextShare context_share(const Rank& rank);

// Keys and values of a layer's attention on this rank (rows may be strided), and their gradients.
struct KeyRows {
  In<Real> k_TGQ, v_TGQ;
};
struct KeyGradients {
  Out<Real> d_k_TGQ, d_v_TGQ;
};

// K and V of whole sequences, [T cp, G Q].
std::pair<Buffer, Buffer> gather_context(const LayerContext& c, const MicroBatch& batch,
                                         const KeyRows& own);

// Whether attention reads one rank's part of the keys after the other: the fast ring.
bool attends_by_parts(const LayerContext& c);
// Attention over every rank's part of the keys; `args` lacks k and v, and has o and lse, or d_q.
void ring_attention(const LayerContext& c, const MicroBatch& batch, const KeyRows& own,
                    AttentionArgs args);
void ring_attention_backward(const LayerContext& c, const MicroBatch& batch, const KeyRows& own,
                             const KeyGradients& d, AttentionBackwardArgs args);

// `sum_SC` [T cp, 2 G Q], a key's dK beside its dV: attention_backward's sums, owner by owner.
void reduce_context(const LayerContext& c, const MicroBatch& batch, const Buffer& sum_SC,
                    const KeyGradients& d);

// attention_backward of this rank's two chunks of queries as links of one chain; `args` lacks what
// the keys get.
void chain_context(const LayerContext& c, const MicroBatch& batch, const KeyGradients& d,
                   AttentionBackwardArgs args);

// d_x [T, G, Q] of this rank's keys from the partials of its query blocks.
void fold_context(const LayerContext& c, const MicroBatch& batch, const Buffer& partial_MC,
                  Out<Real> d_x_TGQ);

// Fractions of the choices [N, E] over the context group's tokens, for balance_loss: of each
// sequence, or of all (N = 1).
enum class FractionOf { each_sequence, all };
Buffer context_fractions(const LayerContext& c, const MicroBatch& batch,
                         In<int32_t> expert_index_TK, FractionOf of);

}  // namespace cambium
