// The MoE decoder layer of Qwen3-MoE as five stages, each with explicit forward and backward.
//
//   1 attend     norm, qkv, q/k norm + RoPE, attention, out + residual, norm, router, dispatch plan
//   2 dispatch   all-to-all: each token once per destination rank, with its routing weights
//   3 expert     grouped GEMM up + SwiGLU, grouped GEMM down, weights applied expert-side
//   4 combine    all-to-all back: fast one partial sum per (token, rank), exact one per (token, k)
//   5 aggregate  sum in k order, shared expert, residual
//
// A shared expert runs between the launch of stage 2 and the wait for it.
// With ep = 1 stages 2 and 4 are empty and nothing waits on the host. Mixtral and OLMoE differ in
// options of ModelConfig alone (src/model/mixtral.cc, olmoe.cc). What runs is what is written:
// there is no tape; `LayerState` is what forward saves for backward.
#pragma once

#include <vector>

#include "src/parallel/param_group.h"
#include "src/parallel/rank.h"

namespace cambium {

// Where a layer's choice of experts is kept for a trace.
struct TracedChoice {
  Out<int32_t> expert_index_TK;
  Out<float> weight_TK;
};

// Tensors of one micro-batch that every layer reads.
struct MicroBatch {
  int64_t index = 0;            // within the step, of this data rank
  int64_t tokens = 0;           // T on this rank
  int64_t sequence_length = 0;  // of whole sequences
  // token_block_T: which block of its call a token's rows are of where experts sum them.
  Buffer token_T, target_T, position_T, document_start_T, token_block_T;
  // With cp > 1, for whole sequences: 0 .. T-1, where a row stands among the ranks' gathered ones,
  // and where its document starts.
  Buffer own_row_T, context_row_S, document_start_S;
  double balance_gradient_scale = 0;  // per sequence, times N (design.md section 3)
  double z_gradient_scale = 0;        // per token, times N
  InOut<float> metric_leaf_BM;        // this micro-batch's rows of the metrics table
  // By layer, of the layers here: experts that balance.routing forces (in `forced_index`), and
  // where choices are traced. Empty where neither happens (src/train/step_routing.h).
  Buffer forced_index;
  std::vector<In<int32_t>> forced_index_LTK;
  std::vector<TracedChoice> traced_L;
};

// Columns of the metrics table. In exact mode every layer has its own balance and z columns, so
// that an entry has one contributor whatever rank holds the layer.
enum MetricColumn : int { kMetricLoss, kMetricBalance, kMetricZ, kMetricColumns };
constexpr int64_t kLayerMetrics = 2;
int64_t metric_columns(const Config& config);
int64_t metric_column(const Config& config, MetricColumn column, int64_t layer);

// Weights of one layer: where its tensors lie in the two groups.
struct LayerTensors {
  const ParamTensor* attn_norm = nullptr;
  const ParamTensor* qkv = nullptr;
  const ParamTensor* q_norm = nullptr;  // null without q/k norm
  const ParamTensor* k_norm = nullptr;
  const ParamTensor* attn_out = nullptr;
  const ParamTensor* mlp_norm = nullptr;
  const ParamTensor* router = nullptr;
  const ParamTensor* gate_up = nullptr;  // first local expert; the others follow
  const ParamTensor* down = nullptr;
  const ParamTensor* qkv_bias = nullptr;  // null without attention biases
  const ParamTensor* attn_out_bias = nullptr;
  const ParamTensor* mlp_gate_up = nullptr;  // of a dense layer, which has no router and experts
  const ParamTensor* mlp_down = nullptr;
  const ParamTensor* shared_gate_up = nullptr;  // null without a shared expert
  const ParamTensor* shared_down = nullptr;
  const ParamTensor* shared_gate = nullptr;
};

// State of the routers that no gradient trains, and the loads of the running step.
struct RouterState {
  Buffer select_bias_LE;     // empty unless balance.bias_update_rate > 0
  Buffer fraction_LE;        // balance loss `global_batch_lagged`: the previous step's loads
  Buffer count_LE;           // int32, this step so far, this rank
  Buffer global_fraction_E;  // balance loss `global_batch`: work space
};

// What a forward pass is for. `nothing`: evaluation. `recomputing`: a second time, for a backward
// pass whose first forward kept the layer's input alone; losses and loads are counted already.
enum class Keep { for_backward, nothing, recomputing };

// What the stages of one layer share.
struct LayerContext {
  Rank& rank;
  const ModelConfig& model;
  ParamGroup& dense;
  ParamGroup* expert;  // null in a dense layer
  RouterState& router;
  In<float> cos_SC, sin_SC;  // C = Q / 2
  LayerTensors tensors;
  int64_t layer = 0;
  Keep keep = Keep::for_backward;

  bool is_dense() const { return tensors.mlp_down != nullptr; }
  bool has_shared_expert() const { return tensors.shared_down != nullptr; }
  DType dtype() const;  // of activations
  void enter(WorkStage stage, WorkPass pass, int64_t micro_batch) const;
  Buffer real(Shape shape, const char* what) const;
  In<Real> in(const Buffer& buffer, Shape shape, int64_t stride = -1) const;
  Out<Real> out(const Buffer& buffer, Shape shape, int64_t stride = -1) const;
};

// Rows between ranks, on the comm stream: whoever reads what comes lands it first, which waits and
// then frees what was sent. Between launch and landing other work runs on compute.
class Flight {
 public:
  bool is_landed() const { return sent_.empty(); }
  void launch(Ticket ticket, std::vector<Buffer> sent);
  void land(const LayerContext& c, std::source_location site = std::source_location::current());

 private:
  Ticket ticket_;
  std::vector<Buffer> sent_;
};

// Tokens on their way to experts and back: counts are per rank of the expert group.
struct DispatchState {
  Buffer send_count_P2, recv_count_P2, send_token_M, send_expert_MK, send_weight_MK;
  Buffer return_row_TK, token_part_TP;
  Ticket counts_ticket;
  std::vector<int64_t> send_tokens, send_rows, recv_tokens, recv_rows;  // host, per rank
  int64_t sent = 0, received = 0, rows = 0;                             // M, M', R
  // On the expert side. With ep = 1 they are the local tokens (no copies).
  Buffer recv_x_MD, recv_expert_MK, recv_weight_MK, recv_block_M;
  Flight flight;  // launched by dispatch_forward, landed by expert_forward
};

struct ExpertState {
  Buffer expert_offset_e1, row_token_R, row_slot_R, ordered_row_R, slot_row_MK, row_block_R;
  Buffer weight_R, gate_up_RN, y_RD;
};

// Saved by forward, consumed by backward. Freed piece by piece in program order.
struct LayerState {
  int64_t micro_batch = 0;
  Buffer x_TD, attn_rstd_T, normed_TD, qkv_TC, q_THQ, k_TGQ, q_rstd, k_rstd, o_TC, lse_TH;
  Buffer k_SC, v_SC;  // with cp > 1: of whole sequences
  Buffer sum_TD, mlp_rstd_T, mlp_normed_TD;
  Buffer probs_TE, expert_index_TK, weight_TK, d_probs_TE, d_logits_TE;
  DispatchState dispatch;
  ExpertState expert;
  Buffer returned;   // stage 4's rows or parts on the token side
  Flight returning;  // launched by combine_forward, landed by aggregate_forward
  // Of a dense layer or of the shared expert, whose output with the residual is shared_TD.
  Buffer mlp_gate_up_TN, shared_gate_T, shared_TD;
};

// What recompute.norms and recompute.attention do not keep between the passes, and the norms again;
// attend_backward computes attention again where it is missing.
void release_recomputed(const LayerContext& c, LayerState& s);
void recompute_norms(const LayerContext& c, const MicroBatch& batch, LayerState& s);

// Forward stages; a dense layer has `attend_forward` and `mlp_forward` alone. `attend_forward`
// takes the layer's input, `aggregate_forward` returns its output.
void attend_forward(const LayerContext& c, const MicroBatch& batch, Buffer x_TD, LayerState& s);
void dispatch_forward(const LayerContext& c, const MicroBatch& batch, LayerState& s);
void expert_forward(const LayerContext& c, const MicroBatch& batch, LayerState& s);
void combine_forward(const LayerContext& c, const MicroBatch& batch, LayerState& s);
Buffer aggregate_forward(const LayerContext& c, const MicroBatch& batch, LayerState& s);
// The MLP of a dense layer, or the shared expert, and the residual (src/model/qwen3_dense.cc);
// returns a dense layer's output.
Buffer mlp_forward(const LayerContext& c, const MicroBatch& batch, LayerState& s);

// When weight gradients are computed: with the input gradients, or by a later call.
enum class WeightGradients { now, later };

// Operands of weight gradients that wait.
struct DenseWgrad {
  const ParamTensor* tensor = nullptr;
  In<Real> d_y_TN, x_TK;
};
struct GainWgrad {
  const ParamTensor* tensor = nullptr;
  Buffer leaf;
  int64_t rows = 0, rows_per_block = 1;
};

// Gradients between backward stages.
struct LayerGradients {
  Buffer d_out_TD;  // of the layer's output; the residual's part of d_sum_TD
  Buffer d_y_MD;    // of the received tokens' weighted rows; with ep = 1 that is d_out_TD
  Buffer d_x_RD, d_weight_R, d_gate_up_RN, weighted_h_RF;
  Buffer d_returned;  // rows or parts of d_x on the token side
  Buffer d_returned_weight;
  Flight arriving;     // launched by aggregate_backward, landed by expert_backward_input
  Flight returning;    // launched by dispatch_backward, landed by attend_backward
  Buffer d_shared_TD;  // the shared expert's part of the gradient of the second norm's output

  WeightGradients weights = WeightGradients::now;
  std::vector<DenseWgrad> dense_wgrads;
  std::vector<GainWgrad> gain_wgrads;
  std::vector<Buffer> kept;  // what dense_wgrads point at
};

// Order: aggregate, expert input, dispatch, attend; expert weights anywhere after expert input.
// Stages 5 and 4: gradients travel to the experts, under the shared expert's backward.
void aggregate_backward(const LayerContext& c, const MicroBatch& batch, LayerState& s,
                        LayerGradients& g);
void expert_backward_input(const LayerContext& c, LayerState& s, LayerGradients& g);
void expert_backward_weight(const LayerContext& c, LayerState& s, LayerGradients& g);
void dispatch_backward(const LayerContext& c, LayerState& s, LayerGradients& g);  // stage 2
// Stage 1, input and weight gradients; returns the gradient of the layer's input.
Buffer attend_backward(const LayerContext& c, const MicroBatch& batch, LayerState& s,
                       LayerGradients& g);
// The weight gradients of stages 1 and 3 that `WeightGradients::later` left, and before it the
// release of what they do not read.
void release_for_weights(LayerState& s, LayerGradients& g);
void layer_backward_weight(const LayerContext& c, LayerState& s, LayerGradients& g);

}  // namespace cambium
