// The memory-bound ops on the GPU at production shapes (Qwen3-30B-A3B, 16,384 tokens), each
// interleaved with a device copy of as many bytes: `of_copy` is the share of its bandwidth.
#include <memory>
#include <numeric>

#include "bench/ops/cuda_bench.h"
#include "kernels/adamw.h"
#include "kernels/balance_loss.h"
#include "kernels/combine.h"
#include "kernels/cross_entropy.h"
#include "kernels/dispatch_plan.h"
#include "kernels/embedding.h"
#include "kernels/expert_load.h"
#include "kernels/grad_merge.h"
#include "kernels/grad_norm.h"
#include "kernels/leaf_fold.h"
#include "kernels/metric_sum.h"
#include "kernels/param_digest.h"
#include "kernels/permute.h"
#include "kernels/qk_norm_rope.h"
#include "kernels/rms_norm.h"
#include "kernels/routing_sort.h"
#include "kernels/swiglu.h"
#include "kernels/z_loss.h"
#include "tests/ops/op_test.h"

namespace cambium::bench {
namespace {

constexpr int64_t T = 16384, D = 2048, H = 32, G = 4, Q = 128, E = 128, K = 8, F = 768;
constexpr int64_t kVocabulary = 151936, kBlockTokens = 32, kBlocks = T / kBlockTokens;

// Times `op` beside a copy that moves `bytes` (half read, half written).
template <class Args>
void run_beside_copy(benchmark::State& state, void (*op)(const Args&, OpCall),
                     const std::type_identity_t<Args>& args, double bytes) {
  const auto half = static_cast<int64_t>(bytes / 2) / 16 * 16;
  DeviceTensor from(Shape(half / 4), DType::f32), to(Shape(half / 4), DType::f32);
  from.fill_normal(99);
  const GpuContender contenders[] = {
      {.name = "op",
       .bytes = bytes,
       .launch = [&](OpContext& context, int64_t) { op(args, context); }},
      {.name = "copy",
       .bytes = 2.0 * static_cast<double>(half),
       .launch = [&](OpContext& context, int64_t) {
         device_copy(from.data(), to.data(), half, *context.stream);
       }}};
  run_gpu_bench(state, contenders, {.samples = 11, .warmups = 2, .l2 = L2State::cold});
}
template <class Args>
void run_beside_copy(benchmark::State& state, void (*op)(const Args&, OpCall),
                     const std::type_identity_t<Args>& args) {
  run_beside_copy(state, op, args, static_cast<double>(cost(args).bytes));
}

DeviceTensor normal(Shape shape, DType dtype = DType::bf16) {
  static uint64_t seed = 1;
  DeviceTensor tensor(shape, dtype);
  tensor.fill_normal(seed++);
  return tensor;
}
// Integers in [low, high], uniform.
DeviceTensor integers(Shape shape, int64_t low, int64_t high) {
  test::TestRandom random(static_cast<uint64_t>(high));
  std::vector<int32_t> values(static_cast<size_t>(shape.elements()));
  for (int32_t& value : values) value = static_cast<int32_t>(random.integer(low, high));
  DeviceTensor tensor(shape, DType::i32);
  tensor.upload(values.data());
  return tensor;
}
// K distinct experts a token.
DeviceTensor routing() {
  test::TestRandom random(7);
  std::vector<int32_t> values(static_cast<size_t>(T * K)), experts(static_cast<size_t>(E));
  std::iota(experts.begin(), experts.end(), 0);
  for (int64_t i = 0; i < T * K; ++i) {
    std::swap(experts[i % K], experts[random.integer(i % K, E - 1)]);
    values[i] = experts[i % K];
  }
  DeviceTensor tensor(Shape(T, K), DType::i32);
  tensor.upload(values.data());
  return tensor;
}
// A permutation of [0, count).
DeviceTensor permutation(Shape shape) {
  test::TestRandom random(8);
  std::vector<int32_t> values(static_cast<size_t>(shape.elements()));
  std::iota(values.begin(), values.end(), 0);
  for (int64_t i = 0; i < std::ssize(values); ++i) {
    std::swap(values[i], values[random.integer(i, std::ssize(values) - 1)]);
  }
  DeviceTensor tensor(shape, DType::i32);
  tensor.upload(values.data());
  return tensor;
}

void bandwidth_rms_norm(benchmark::State& state) {
  if (!gpu_is_there(state)) return;
  DeviceTensor x = normal(Shape(T, D)), residual = normal(Shape(T, D)), gain = normal(Shape(D));
  DeviceTensor y(Shape(T, D)), sum(Shape(T, D)), rstd(Shape(T), DType::f32);
  RmsNormArgs args{.x_TD = x.in<Real>(),
                   .gain_D = gain.in<Real>(),
                   .y_TD = y.out<Real>(),
                   .rstd_T = rstd.out<float>()};
  if (state.range(0) != 0) {
    args.residual_TD = residual.in<Real>();
    args.sum_TD = sum.out<Real>();
  }
  run_beside_copy(state, rms_norm, args);
}

void bandwidth_rms_norm_backward(benchmark::State& state) {
  if (!gpu_is_there(state)) return;
  DeviceTensor d_y = normal(Shape(T, D)), x = normal(Shape(T, D)), gain = normal(Shape(D));
  DeviceTensor d_residual = normal(Shape(T, D)), rstd = normal(Shape(T), DType::f32);
  DeviceTensor d_x(Shape(T, D)), leaf(Shape(kBlocks, D), DType::f32);
  RmsNormBackwardArgs args{.d_y_TD = d_y.in<Real>(),
                           .x_TD = x.in<Real>(),
                           .gain_D = gain.in<Real>(),
                           .rstd_T = rstd.in<float>(),
                           .d_x_TD = d_x.out<Real>(),
                           .d_gain_leaf_BD = leaf.out<float>(),
                           .block_tokens = kBlockTokens};
  if (state.range(0) != 0) args.d_residual_TD = d_residual.in<Real>();
  run_beside_copy(state, rms_norm_backward, args);
}

// Queries and keys as parts of a fused qkv tensor, forward and backward.
void bandwidth_qk_norm_rope(benchmark::State& state) {
  if (!gpu_is_there(state)) return;
  const int64_t C = (H + 2 * G) * Q;
  DeviceTensor qkv = normal(Shape(T, C)), d_qkv(Shape(T, C)), q_out = normal(Shape(T, H, Q));
  DeviceTensor k_out = normal(Shape(T, G, Q)), gain = normal(Shape(Q));
  DeviceTensor cos = normal(Shape(4096, Q / 2), DType::f32), position = integers(Shape(T), 0, 4095);
  DeviceTensor q_rstd = normal(Shape(T, H), DType::f32), k_rstd = normal(Shape(T, G), DType::f32);
  DeviceTensor leaf(Shape(kBlocks, Q), DType::f32), k_leaf(Shape(kBlocks, Q), DType::f32);
  const auto part = [](DeviceTensor& tensor, int64_t first) {
    return static_cast<uint16_t*>(tensor.data()) + first * Q;
  };
  const In<Real> q(part(qkv, 0), DType::bf16, Shape(T, H, Q), C);
  const In<Real> k(part(qkv, H), DType::bf16, Shape(T, G, Q), C);
  if (state.range(0) == 0) {
    return run_beside_copy(state, qk_norm_rope,
                           {.q_THQ = q,
                            .k_TGQ = k,
                            .q_gain = gain.in<Real>(),
                            .k_gain = gain.in<Real>(),
                            .cos_SC = cos.in<float>(),
                            .sin_SC = cos.in<float>(),
                            .position_T = position.in<int32_t>(),
                            .q_out_THQ = q_out.out<Real>(),
                            .k_out_TGQ = k_out.out<Real>(),
                            .q_rstd = q_rstd.out<float>(),
                            .k_rstd = k_rstd.out<float>(),
                            .kind = QkNormKind::per_head});
  }
  run_beside_copy(state, qk_norm_rope_backward,
                  {.d_q_out_THQ = q_out.in<Real>(),
                   .d_k_out_TGQ = k_out.in<Real>(),
                   .q_THQ = q,
                   .k_TGQ = k,
                   .q_gain = gain.in<Real>(),
                   .k_gain = gain.in<Real>(),
                   .cos_SC = cos.in<float>(),
                   .sin_SC = cos.in<float>(),
                   .position_T = position.in<int32_t>(),
                   .q_rstd = q_rstd.in<float>(),
                   .k_rstd = k_rstd.in<float>(),
                   .d_q_THQ = {part(d_qkv, 0), DType::bf16, Shape(T, H, Q), C},
                   .d_k_TGQ = {part(d_qkv, H), DType::bf16, Shape(T, G, Q), C},
                   .d_q_gain_leaf_BN = leaf.out<float>(),
                   .d_k_gain_leaf_BN = k_leaf.out<float>(),
                   .block_tokens = kBlockTokens,
                   .kind = QkNormKind::per_head});
}

// 4,096 rows are 1.2 GB of logits. Argument 1: the loss alone.
void bandwidth_cross_entropy(benchmark::State& state) {
  if (!gpu_is_there(state)) return;
  const int64_t rows = 4096;
  DeviceTensor logits = normal(Shape(rows, kVocabulary)), loss(Shape(rows), DType::f32);
  DeviceTensor d_logits(Shape(state.range(0) == 0 ? rows : 1, kVocabulary));
  DeviceTensor target = integers(Shape(rows), 0, kVocabulary - 1);
  CrossEntropyArgs args{.logits_TV = logits.in<Real>(),
                        .target_T = target.in<int32_t>(),
                        .loss_T = loss.out<float>()};
  if (state.range(0) == 0) args.d_logits_TV = d_logits.out<Real>();
  run_beside_copy(state, cross_entropy, args);
}

void bandwidth_embedding(benchmark::State& state) {
  if (!gpu_is_there(state)) return;
  DeviceTensor w = normal(Shape(kVocabulary, D)), x(Shape(T, D));
  DeviceTensor token = integers(Shape(T), 0, kVocabulary - 1);
  run_beside_copy(state, embedding,
                  {.w_VD = w.in<Real>(), .token_T = token.in<int32_t>(), .x_TD = x.out<Real>()});
}

// Argument: distinct ids among the tokens, drawn so that a few take most (squares of uniforms).
void bandwidth_embedding_wgrad(benchmark::State& state) {
  if (!gpu_is_there(state)) return;
  DeviceTensor d_x = normal(Shape(T, D)), d_w(Shape(1, kVocabulary, D), DType::f32);
  d_w.fill_zero();
  test::TestRandom random(5);
  std::vector<int32_t> ids(static_cast<size_t>(T));
  std::vector<bool> is_seen(static_cast<size_t>(kVocabulary));
  int64_t distinct = 0;
  for (int32_t& id : ids) {
    const double u = random.uniform();
    id = static_cast<int32_t>((state.range(0) == 0 ? u : u * u * u * u * u * u) * kVocabulary);
    distinct += is_seen[id] ? 0 : 1;
    is_seen[id] = true;
  }
  DeviceTensor token(Shape(T), DType::i32);
  token.upload(ids.data());
  state.counters["distinct"] = static_cast<double>(distinct);
  run_beside_copy(
      state, embedding_wgrad,
      {.d_x_TD = d_x.in<Real>(), .token_T = token.in<int32_t>(), .d_w_SVD = d_w.inout<float>()},
      static_cast<double>(2 * T * D + 8 * distinct * D));
}

void bandwidth_gather_rows(benchmark::State& state) {
  if (!gpu_is_there(state)) return;
  DeviceTensor x = normal(Shape(T, D)), y(Shape(T * K, D));
  DeviceTensor index = integers(Shape(T * K), 0, T - 1);
  run_beside_copy(state, gather_rows, {x.in<Real>(), index.in<int32_t>(), y.out<Real>()});
}

void bandwidth_combine_rows(benchmark::State& state) {
  if (!gpu_is_there(state)) return;
  DeviceTensor y = normal(Shape(T * K, D)), residual = normal(Shape(T, D)), out(Shape(T, D));
  DeviceTensor index = permutation(Shape(T, K));
  run_beside_copy(state, combine_rows,
                  {y.in<Real>(), index.in<int32_t>(), residual.in<Real>(), out.out<Real>()});
}

void bandwidth_swiglu(benchmark::State& state) {
  if (!gpu_is_there(state)) return;
  DeviceTensor gate_up = normal(Shape(T * K, 2 * F)), h = normal(Shape(T * K, F));
  DeviceTensor d_gate_up(Shape(T * K, 2 * F));
  if (state.range(0) == 0) {
    return run_beside_copy(state, swiglu, {gate_up.in<Real>(), h.out<Real>()});
  }
  run_beside_copy(state, swiglu_backward,
                  {gate_up.in<Real>(), h.in<Real>(), d_gate_up.out<Real>()});
}

// The block table of tensors that fill a flat buffer.
DeviceTensor block_table(int64_t elements) {
  test::TestTensor host = test::whole_tensor_blocks(elements);
  DeviceTensor table(host.shape(), DType::i32);
  table.upload(static_cast<const int32_t*>(host.data()));
  return table;
}

// 512 million parameters with the bf16 copy (15 GB with fp32 moments, 11 with bf16 ones).
void bandwidth_adamw(benchmark::State& state) {
  if (!gpu_is_there(state)) return;
  const int64_t N = 512 << 20;
  const DType moments = state.range(0) == 0 ? DType::f32 : DType::bf16;
  DeviceTensor param = normal(Shape(N), DType::f32), m = normal(Shape(N), moments);
  DeviceTensor v(Shape(N), moments), grad = normal(Shape(N), DType::f32), copy{Shape(N)};
  DeviceTensor table = block_table(N);
  v.fill_zero();
  DeviceTensor scale(Shape(1), DType::f32);
  const float one = 1;
  scale.upload(&one);
  run_beside_copy(state, adamw,
                  {.param_N = param.inout<float>(),
                   .m_N = m.inout<Real>(),
                   .v_N = v.inout<Real>(),
                   .grad_N = grad.in<float>(),
                   .table = {table.in<int32_t>(), N},
                   .scale_1 = scale.in<float>(),
                   .compute_N = copy.out<Real>(),
                   .lr = 1e-4,
                   .beta1 = 0.9,
                   .beta2 = 0.95,
                   .epsilon = 1e-8,
                   .weight_decay = 0.1,
                   .bias_correction1 = 0.1,
                   .bias_correction2 = 0.05});
}

void bandwidth_square_sum(benchmark::State& state) {
  if (!gpu_is_there(state)) return;
  const int64_t N = 512 << 20;
  DeviceTensor grad = normal(Shape(N), DType::f32), partial(Shape(norm_block_count(N)), DType::f32);
  DeviceTensor table = block_table(N);
  run_beside_copy(state, square_sum,
                  {grad.in<float>(), {table.in<int32_t>(), N}, partial.inout<float>()});
}

void bandwidth_param_digest(benchmark::State& state) {
  if (!gpu_is_there(state)) return;
  const int64_t N = 512 << 20;
  DeviceTensor data = normal(Shape(N), DType::f32), sum(Shape(2), DType::i64);
  run_beside_copy(
      state, param_digest,
      {.data_N = data.in<float>(), .tensor_id = 5, .first_block = 0, .sum_2 = sum.out<int64_t>()});
}

void bandwidth_grad_merge(benchmark::State& state) {
  if (!gpu_is_there(state)) return;
  const int64_t N = 2 * F * D;
  DeviceTensor slots = normal(Shape(3, 64, N), DType::f32), present(Shape(3, 64), DType::u8);
  const std::vector<uint8_t> all(3 * 64, 1);
  present.upload(all.data());
  run_beside_copy(state, grad_merge, {slots.inout<float>(), present.inout<uint8_t>(), N, 0, 1, 2});
}

void bandwidth_z_loss(benchmark::State& state) {
  if (!gpu_is_there(state)) return;
  DeviceTensor logits = normal(Shape(T, E), DType::f32), d_logits(Shape(T, E), DType::f32);
  DeviceTensor loss(Shape(T), DType::f32);
  run_beside_copy(state, z_loss,
                  {logits.in<float>(), 0.5f, 0.5f, loss.out<float>(), d_logits.out<float>()});
}

void bandwidth_balance_loss(benchmark::State& state) {
  if (!gpu_is_there(state)) return;
  DeviceTensor probs = normal(Shape(T, E), DType::f32), d_probs(Shape(T, E), DType::f32);
  DeviceTensor index = routing(), leaf(Shape(kBlocks), DType::f32);
  run_beside_copy(state, balance_loss,
                  {.probs_TE = probs.in<float>(),
                   .expert_index_TK = index.in<int32_t>(),
                   .sequence_length = 4096,
                   .positions = 4096,
                   .block_tokens = kBlockTokens,
                   .loss_scale = 1,
                   .gradient_scale = 1,
                   .loss_leaf_B = leaf.out<float>(),
                   .d_probs_TE = d_probs.out<float>()});
}

// Latency rather than bytes decides the small ones below.
void latency_leaf_fold(benchmark::State& state) {
  if (!gpu_is_there(state)) return;
  DeviceTensor leaf = normal(Shape(kBlocks, D), DType::f32), d_w = normal(Shape(1, D), DType::f32);
  run_beside_copy(state, leaf_fold, {.leaf_BN = leaf.in<float>(), .d_w_SN = d_w.inout<float>()});
}

void latency_metric_sum(benchmark::State& state) {
  if (!gpu_is_there(state)) return;
  DeviceTensor value = normal(Shape(T), DType::f32), table = normal(Shape(kBlocks, 4), DType::f32);
  run_beside_copy(state, metric_sum,
                  {.value_N = value.in<float>(), .leaf_BM = table.inout<float>(), .column = 1});
}

void latency_routing_sort(benchmark::State& state) {
  if (!gpu_is_there(state)) return;
  const Shape R(T * K);
  DeviceTensor index = routing(), offset(Shape(E + 1), DType::i32), token(R, DType::i32);
  DeviceTensor slot(R, DType::i32), ordered(R, DType::i32), row(Shape(T, K), DType::i32);
  run_beside_copy(state, routing_sort,
                  {.expert_index_TK = index.in<int32_t>(),
                   .experts = E,
                   .expert_offset_e1 = offset.out<int32_t>(),
                   .row_token_R = token.out<int32_t>(),
                   .row_slot_R = slot.out<int32_t>(),
                   .ordered_row_R = ordered.out<int32_t>(),
                   .slot_row_TK = row.out<int32_t>()});
}

void latency_dispatch_plan(benchmark::State& state) {
  if (!gpu_is_there(state)) return;
  const int64_t P = 8, M = dispatch_capacity(T, K, P);
  DeviceTensor index = routing(), weight = normal(Shape(T, K), DType::f32);
  DeviceTensor count(Shape(P, 2), DType::i32), token(Shape(M), DType::i32);
  DeviceTensor expert(Shape(M, K), DType::i32), sent(Shape(M, K), DType::f32);
  DeviceTensor row(Shape(T, K), DType::i32), part(Shape(T, P), DType::i32);
  run_beside_copy(state, dispatch_plan,
                  {.expert_index_TK = index.in<int32_t>(),
                   .weight_TK = weight.in<float>(),
                   .ranks = P,
                   .experts_per_rank = E / P,
                   .send_count_P2 = count.out<int32_t>(),
                   .send_token_M = token.out<int32_t>(),
                   .send_expert_MK = expert.out<int32_t>(),
                   .send_weight_MK = sent.out<float>(),
                   .return_row_TK = row.out<int32_t>(),
                   .token_part_TP = part.out<int32_t>()});
}

void latency_expert_histogram(benchmark::State& state) {
  if (!gpu_is_there(state)) return;
  DeviceTensor index = routing(), count = integers(Shape(E), 0, 10);
  run_beside_copy(state, expert_histogram, {index.in<int32_t>(), count.inout<int32_t>()});
}

// 3.1 billion parameters in 1,600 tensors.
void latency_clip_scale(benchmark::State& state) {
  if (!gpu_is_there(state)) return;
  const int64_t tensors = 1600, blocks = 480;
  DeviceTensor partial = normal(Shape(tensors * blocks), DType::f32);
  DeviceTensor result(Shape(4), DType::f32), first(Shape(tensors + 1), DType::i32);
  std::vector<int32_t> offsets(static_cast<size_t>(tensors + 1));
  for (int64_t n = 0; n <= tensors; ++n) offsets[n] = static_cast<int32_t>(n * blocks);
  first.upload(offsets.data());
  run_beside_copy(state, clip_scale,
                  {.partial_B = partial.in<float>(),
                   .tensor_first_block_n1 = first.in<int32_t>(),
                   .inverse_tokens = 1e-4,
                   .clip = 1,
                   .result_4 = result.out<float>()});
}

void gpu_once(benchmark::internal::Benchmark* bench) { bench->UseManualTime()->Iterations(1); }

BENCHMARK(bandwidth_rms_norm)->ArgName("residual")->Arg(0)->Arg(1)->Apply(gpu_once);
BENCHMARK(bandwidth_rms_norm_backward)->ArgName("residual")->Arg(0)->Arg(1)->Apply(gpu_once);
BENCHMARK(bandwidth_qk_norm_rope)->ArgName("backward")->Arg(0)->Arg(1)->Apply(gpu_once);
BENCHMARK(bandwidth_cross_entropy)->ArgName("loss_alone")->Arg(0)->Arg(1)->Apply(gpu_once);
BENCHMARK(bandwidth_embedding)->Apply(gpu_once);
BENCHMARK(bandwidth_embedding_wgrad)->ArgName("skewed")->Arg(0)->Arg(1)->Apply(gpu_once);
BENCHMARK(bandwidth_gather_rows)->Apply(gpu_once);
BENCHMARK(bandwidth_combine_rows)->Apply(gpu_once);
BENCHMARK(bandwidth_swiglu)->ArgName("backward")->Arg(0)->Arg(1)->Apply(gpu_once);
BENCHMARK(bandwidth_adamw)->ArgName("bf16_moments")->Arg(0)->Arg(1)->Apply(gpu_once);
BENCHMARK(bandwidth_square_sum)->Apply(gpu_once);
BENCHMARK(bandwidth_param_digest)->Apply(gpu_once);
BENCHMARK(bandwidth_grad_merge)->Apply(gpu_once);
BENCHMARK(bandwidth_z_loss)->Apply(gpu_once);
BENCHMARK(bandwidth_balance_loss)->Apply(gpu_once);
BENCHMARK(latency_leaf_fold)->Apply(gpu_once);
BENCHMARK(latency_metric_sum)->Apply(gpu_once);
BENCHMARK(latency_routing_sort)->Apply(gpu_once);
BENCHMARK(latency_dispatch_plan)->Apply(gpu_once);
BENCHMARK(latency_expert_histogram)->Apply(gpu_once);
BENCHMARK(latency_clip_scale)->Apply(gpu_once);

}  // namespace
}  // namespace cambium::bench
