// Load-balance loss of the router (GShard, arXiv 2006.16668; Switch, arXiv 2101.03961).
//
//   loss of a sequence = loss_scale * E * sum_e f_e P_e, block by block: a block's leaf is its
//   positions' part of P_e
//   P_e = mean over the sequence's `positions` positions of probs_TE
//   f_e = count_e / (K * tokens counted), where `source` says which tokens are counted:
//     own_sequence   the sequence itself        (bits depend on the sequence alone: exact mode)
//     micro_batch    all T tokens of this call
//     given          fraction_NE is f itself, of every sequence or of all (global_batch,
//                    global_batch_lagged, and sequences that ranks share)
//   d_probs_TE = gradient_scale * E * f_e / positions (f is a count: no gradient flows through it)
//
// With a shared f, P is still the sequence's, so the mean over sequences is the loss of the whole.
// Sums run over a block's positions in order.
// Napkin: 4 T E bytes read and written each, 2 T E FLOPs; memory bound.
#pragma once

#include "kernels/op.h"

namespace cambium {

enum class CountSource : uint8_t { own_sequence, micro_batch, given };

struct BalanceLossArgs {
  In<float> probs_TE;           // T = sequences * sequence_length, sequence-major
  In<int32_t> expert_index_TK;  // global numbers, each in [0, E)
  In<float> fraction_NE;        // CountSource::given: N = 1 or the number of sequences
  int64_t sequence_length = 0;  // S: this rank's rows of a sequence
  int64_t positions = 0;        // of a whole sequence
  int64_t block_tokens = 0;     // divides S
  CountSource source = CountSource::own_sequence;
  float loss_scale = 0;
  float gradient_scale = 0;
  Out<float> loss_leaf_B;  // B = T / block_tokens
  Out<float> d_probs_TE;
};

inline void check_args(const BalanceLossArgs& a) {
  const int64_t T = a.probs_TE[0], E = a.probs_TE[1], K = a.expert_index_TK[1];
  CHECK_GE(a.block_tokens, 1);
  CHECK_GE(a.sequence_length, 1);
  CHECK_EQ(a.sequence_length % a.block_tokens, 0);
  CHECK_EQ(T % a.sequence_length, 0);
  check_shape("balance_loss", "expert_index_TK", a.expert_index_TK, Shape(T, K));
  check_shape("balance_loss", "d_probs_TE", a.d_probs_TE, Shape(T, E));
  check_shape("balance_loss", "loss_leaf_B", a.loss_leaf_B, Shape(T / a.block_tokens));
  CHECK_GE(a.positions, a.sequence_length);
  CHECK_EQ(a.source == CountSource::given, !a.fraction_NE.empty());
  if (a.fraction_NE.empty()) return;
  const int64_t N = a.fraction_NE[0];
  CHECK(N == 1 || N == T / a.sequence_length);
  check_shape("balance_loss", "fraction_NE", a.fraction_NE, Shape(N, E));
}

inline Cost cost(const BalanceLossArgs& a) {
  const int64_t T = a.probs_TE[0], E = a.probs_TE[1], K = a.expert_index_TK[1];
  return {"balance_loss", {T, E, K}, 2 * T * E, 8 * T * E + 4 * T * K, 0};
}

template <class Visitor>
void visit_views(const BalanceLossArgs& a, Visitor&& visit) {
  visit("probs_TE", a.probs_TE);
  visit("expert_index_TK", a.expert_index_TK);
  visit("fraction_NE", a.fraction_NE);
  visit("loss_leaf_B", a.loss_leaf_B);
  visit("d_probs_TE", a.d_probs_TE);
}

namespace reference {
void balance_loss(const BalanceLossArgs& args, Workers& workers);
}
namespace cuda {
void balance_loss(const BalanceLossArgs& args, Stream& stream);
}  // namespace cuda

inline void balance_loss(const BalanceLossArgs& args, OpCall call) {
  execute(args, call, reference::balance_loss, kHasCuda ? cuda::balance_loss : nullptr);
}

}  // namespace cambium
