#include "src/train/train_step.h"

#include <cmath>
#include <limits>

#include "kernels/adamw.h"
#include "kernels/copy.h"
#include "kernels/expert_load.h"
#include "kernels/grad_norm.h"
#include "kernels/metric_sum.h"
#include "kernels/param_digest.h"
#include "src/base/fmath.h"
#include "src/model/context.h"
#include "src/train/pipeline_pass.h"

namespace cambium {

namespace {

// Sum of one column of the canonical metrics table by the canonical tree, in fp64.
double tree_sum(const float* column, int64_t columns, BlockRange range) {
  if (range.count() == 0) return 0;
  if (range.count() == 1) return column[range.first * columns];
  const int64_t middle = range.first + canonical_split(range.count());
  return tree_sum(column, columns, {range.first, middle}) +
         tree_sum(column, columns, {middle, range.end});
}

// Of the values of whole sequences, those of a rank's positions.
void keep_share(const ContextShare& share, int64_t S, std::vector<int32_t>& values) {
  const int64_t local_S = S / share.ranks;
  std::vector<int32_t> kept(values.size() / static_cast<size_t>(share.ranks));
  for (int64_t t = 0; t < std::ssize(kept); ++t) {
    kept[t] = values[t / local_S * S + share.position(t % local_S, S)];
  }
  values = std::move(kept);
}

Schedule config_schedule(const Config& config, int64_t micro_batches, SchedulePass pass) {
  const ParallelConfig& parallel = config.parallel;
  return make_schedule({.kind = parallel.schedule,
                        .pp = parallel.pp,
                        .micro_batches = micro_batches,
                        .virtual_stages = parallel.virtual_stages,
                        .pass = pass});
}

}  // namespace

TrainStep::TrainStep(Rank& rank, const ModelConfig& model)
    : rank_(rank),
      model_(rank, model),
      layout_(rank.config),
      routing_(rank, layout_),
      training_(config_schedule(rank.config, layout_.micro_batches, SchedulePass::training)),
      evaluation_(config_schedule(rank.config, layout_.micro_batches, SchedulePass::forward_only)) {
  const int64_t loads = model.layers * model.experts;
  const int64_t rows = layout_.micro_batches * layout_.local_blocks();
  const int64_t table_bytes = 4 * rows * metric_columns(rank.config);
  metric_table_ = rank.workspace(table_bytes, "metrics table");
  gathered_metrics_ = rank.workspace(table_bytes * rank.world->ranks(), "all ranks' metrics");
  global_count_LE_ = rank.workspace(4 * loads, "global expert loads");
  norm_partial_ = rank.workspace(4 * model_.first_norm_block().back(), "norm partials");
  clip_result_ = rank.workspace(4 * 4, "clip result");
  first_norm_block_ = rank.upload(model_.first_norm_block(), "first norm blocks");
  const int64_t digest_bytes = std::ssize(model_.tensors()) * 16;
  digest_table_ = rank.workspace(digest_bytes, "digests");
  gathered_digests_ = rank.workspace(digest_bytes * rank.world->ranks(), "all ranks' digests");
}

void TrainStep::begin(int64_t batch_index, const SequenceSource& source) {
  targets_ = source.target_count(batch_index);
  rank_.zero(metric_table_);
  rank_.zero(model_.router().count_LE);
}

MicroBatch TrainStep::upload_micro_batch(const SequenceSource& source, int64_t batch_index,
                                         int64_t micro_batch) {
  const Config& config = rank_.config;
  const int64_t dp_index = rank_.at.dp_index;
  Batch batch;
  source.fill(batch_index,
              {layout_.first_sequence(dp_index, micro_batch), layout_.micro_batch_sequences},
              batch);
  // The fault `missing_micro_batch`: nothing of this rank's last micro-batch is learnt.
  if (rank_.has_fault("missing_micro_batch") && micro_batch + 1 == layout_.micro_batches) {
    std::ranges::fill(batch.target_T, kIgnoredTarget);
  }
  // A window is a mask whose first token moves along.
  const int64_t window = config.model.sliding_window;
  const bool masks = config.data.document_mask || window > 0;
  for (int64_t t = window; window > 0 && t < std::ssize(batch.document_start_T); ++t) {
    int32_t& start = batch.document_start_T[static_cast<size_t>(t)];
    start = std::max(start, static_cast<int32_t>(t - window + 1));
  }
  const std::vector<int32_t> document_start_S = batch.document_start_T;
  const ContextShare share = context_share(rank_);
  if (share.ranks > 1) {
    // The fault `zigzag_half`: this rank takes the next one's tokens.
    ContextShare of_tokens = share;
    if (rank_.has_fault("zigzag_half")) of_tokens.index = (share.index + 1) % share.ranks;
    const int64_t S = config.train.sequence_length;
    for (auto* values : {&batch.token_T, &batch.target_T}) keep_share(of_tokens, S, *values);
    for (auto* values : {&batch.position_T, &batch.document_start_T}) keep_share(share, S, *values);
  }
  const int64_t columns = metric_columns(config), blocks = layout_.local_blocks();
  const double sequences = static_cast<double>(config.train.global_batch_sequences);
  const double positions = sequences * static_cast<double>(config.train.sequence_length);
  const double count = static_cast<double>(targets_);
  MicroBatch made =
      model_.upload({.token_T = &batch.token_T,
                     .target_T = &batch.target_T,
                     .position_T = &batch.position_T,
                     .document_start_T = masks ? &batch.document_start_T : nullptr,
                     .document_start_S = masks ? &document_start_S : nullptr,
                     .sequence_length = config.train.sequence_length,
                     .index = micro_batch,
                     .balance_gradient_scale = config.balance.loss_weight * count / sequences,
                     .z_gradient_scale = config.balance.z_loss_weight * count / positions},
                    {metric_table_.f32() + micro_batch * blocks * columns, Shape(blocks, columns)});
  if (pass_ == SchedulePass::training) routing_.attach(batch_index, made);
  return made;
}

void TrainStep::accumulate(const SequenceSource& source, int64_t batch_index) {
  begin(batch_index, source);
  // The fault `out_of_memory`: allocation #k of this step fails. `bit_flip`: a weight's sign.
  if (rank_.has_fault("out_of_memory")) {
    rank_.arena.fail_at(rank_.fault_number("out_of_memory", 0));
  }
  if (rank_.has_fault("bit_flip")) model_.groups().front()->flip_weight();
  for (const auto& group : model_.groups()) group->begin_step();
  PipelinePass(*this, source, batch_index).train(training_);
  rank_.enter({.stage = WorkStage::reduce});
  for (const auto& group : model_.groups()) {
    group->reduce_gradients();
    // The fault `expert_gradient_scale`: this rank's expert gradients times the size of its group.
    if (group->kind() == GroupKind::expert && rank_.has_fault("expert_gradient_scale")) {
      rank_.compute_waits(rank_.comm.record());
      group->scale_gradient(static_cast<float>(rank_.mesh.ep));
    }
  }
  // The fault `nan_gradient`.
  if (rank_.has_fault("nan_gradient")) {
    rank_.compute_waits(rank_.comm.record());
    model_.groups().front()->scale_gradient(std::numeric_limits<float>::quiet_NaN());
  }
  reduce_metrics();
  compute_norm();
}

// `compute` may use the gradients and the metrics from here on: the last ticket of `comm` implies
// the ones before. Loads are integers and gathered metrics are not summed: nothing here depends on
// an order.
void TrainStep::reduce_metrics() {
  const int64_t loads = model_.config().layers * model_.config().experts;
  rank_.comm_waits_for_compute();
  all_gather({.communicator = *rank_.world,
              .stream = rank_.comm,
              .send = metric_table_.data(),
              .recv = gathered_metrics_.data(),
              .count = metric_table_.size_bytes() / 4});
  rank_.compute_waits(all_reduce({.communicator = *rank_.world,
                                  .stream = rank_.comm,
                                  .send = model_.router().count_LE.data(),
                                  .recv = global_count_LE_.data(),
                                  .count = loads,
                                  .dtype = DType::i32}));
}

// All ranks' rows in canonical order, [block][column]. In exact mode an entry has one contributor.
std::vector<float> TrainStep::canonical_metrics() const {
  const int64_t columns = metric_columns(rank_.config);
  std::vector<float> table(static_cast<size_t>(layout_.total_blocks * columns), 0.0f);
  const float* from = host_metrics_;
  for (int64_t rank = 0; rank < rank_.mesh.ranks(); ++rank) {
    for (int64_t micro = 0; micro < layout_.micro_batches; ++micro) {
      for (const BlockRange& range : layout_.blocks(rank, micro)) {
        float* to = table.data() + range.first * columns;
        for (int64_t i = 0; i < range.count() * columns; ++i) to[i] += *from++;
      }
    }
  }
  return table;
}

void TrainStep::compute_norm() {
  const int64_t blocks = model_.first_norm_block().back();
  rank_.zero(norm_partial_);
  for (const auto& group : model_.groups()) {
    const int64_t first = group->owned_first(), elements = group->owned_elements();
    square_sum({.grad_N = {group->gradient(first), Shape(elements)},
                .table = group->block_table(first, elements),
                .partial_M = {norm_partial_.f32(), Shape(blocks)}},
               rank_.ops);
  }
  rank_.comm_waits_for_compute();
  rank_.compute_waits(all_reduce({.communicator = *rank_.world,
                                  .stream = rank_.comm,
                                  .send = norm_partial_.data(),
                                  .recv = norm_partial_.data(),
                                  .count = blocks}));
  const int64_t tensors = std::ssize(model_.tensors());
  clip_scale({.partial_B = {norm_partial_.f32(), Shape(blocks)},
              .tensor_first_block_n1 = {first_norm_block_.as<int32_t>(), Shape(tensors + 1)},
              .inverse_tokens = 1.0 / static_cast<double>(std::max<int64_t>(1, targets_)),
              .clip = rank_.config.optimizer.clip,
              .result_4 = {clip_result_.f32(), Shape(4)}},
             rank_.ops);
}

void TrainStep::apply_adamw(int64_t step, double learning_rate) {
  const OptimizerConfig& optimizer = rank_.config.optimizer;
  const double count = static_cast<double>(step);
  const double correction1 = 1.0 - fmath::pow(optimizer.beta1, count);
  const double correction2 = 1.0 - fmath::pow(optimizer.beta2, count);
  for (const auto& group : model_.groups()) {
    const int64_t first = group->state_first(), elements = group->state_elements();
    const Shape shape(elements);
    Out<Real> compute;
    if (uint16_t* copy = group->compute_copy(first)) compute = {copy, DType::bf16, shape};
    adamw({.param_N = {group->weights(first), shape},
           .m_N = group->moment(ParamGroup::first_moment, first, elements),
           .v_N = group->moment(ParamGroup::second_moment, first, elements),
           .grad_N = {group->gradient(first), shape},
           .table = group->block_table(first, elements),
           .scale_1 = {clip_result_.f32() + kClipScale, Shape(1)},
           .compute_N = compute,
           .step = step,
           .lr = learning_rate,
           .beta1 = optimizer.beta1,
           .beta2 = optimizer.beta2,
           .epsilon = optimizer.epsilon,
           .weight_decay = optimizer.weight_decay,
           .bias_correction1 = correction1,
           .bias_correction2 = correction2},
          rank_.ops);
    group->gather_weights();
  }
}

void TrainStep::update_router_state() {
  const int64_t layers = model_.config().layers, experts = model_.config().experts;
  RouterState& router = model_.router();
  for (int64_t layer = 0; layer < layers; ++layer) {
    if (model_.config().is_dense(layer)) continue;
    const In<int32_t> count(global_count_LE_.as<int32_t>() + layer * experts, Shape(experts));
    if (!router.select_bias_LE.empty()) {
      router_bias_update({.count_E = count,
                          .bias_E = {router.select_bias_LE.f32() + layer * experts, Shape(experts)},
                          .rate = static_cast<float>(rank_.config.balance.bias_update_rate)},
                         rank_.ops);
    }
    if (!router.fraction_LE.empty()) {
      count_fraction({.count_E = count,
                      .fraction_E = {router.fraction_LE.f32() + layer * experts, Shape(experts)}},
                     rank_.ops);
    }
  }
}

void TrainStep::enqueue_digests() {
  rank_.zero(digest_table_);
  for (const auto& group : model_.groups()) {
    for (const ParamPiece& piece : group->owned_pieces()) {
      const CanonicalTensor& canonical = piece.tensor->canonical;
      param_digest({.data_N = {group->weights(piece.flat_offset()), Shape(piece.elements)},
                    .tensor_id = tensor_id(canonical.name),
                    .first_block = piece.first_element / kDigestBlockElements,
                    .sum_2 = {digest_table_.as<int64_t>() + 2 * canonical.id, Shape(2)}},
                   rank_.ops);
    }
  }
  rank_.comm_waits_for_compute();
  rank_.compute_waits(all_gather({.communicator = *rank_.world,
                                  .stream = rank_.comm,
                                  .send = digest_table_.data(),
                                  .recv = gathered_digests_.data(),
                                  .count = digest_table_.size_bytes(),
                                  .dtype = DType::u8}));
  host_digests_ = rank_.download<uint64_t>(gathered_digests_);
}

void TrainStep::download_results() {
  host_metrics_ = rank_.download<float>(gathered_metrics_);
  host_counts_ = rank_.download<int32_t>(global_count_LE_);
  host_clip_ = rank_.download<float>(clip_result_);
}

std::map<std::string, Digest128> TrainStep::read_digests() {
  const int64_t tensors = std::ssize(model_.tensors());
  std::map<std::string, Digest128> digests;
  for (int64_t tensor = 0; tensor < tensors; ++tensor) {
    Digest128& digest = digests[model_.tensors()[tensor].name];
    for (int64_t rank = 0; rank < rank_.world->ranks(); ++rank) {
      const uint64_t* sum = host_digests_ + 2 * (rank * tensors + tensor);
      digest += Digest128{sum[0], sum[1]};
    }
  }
  return digests;
}

std::map<std::string, Digest128> TrainStep::digests() {
  enqueue_digests();
  rank_.finish_step();
  return read_digests();
}

void TrainStep::check_finite(int64_t step) const {
  const float* result = host_clip_;
  const char* next = "next: look at the last finite steps in metrics.jsonl, lower optimizer.lr";
  if (result[kClipNonFinite] != 0.0f) {
    const int64_t tensor = static_cast<int64_t>(result[kClipFirstTensor]);
    const char* name = tensor >= 0 ? model_.tensors()[tensor].name.c_str() : "(sum overflows)";
    fail(ExitCode::non_finite,
         "gradient of '{}' is not finite at step {} (rank {}); the optimizer did not run; {}", name,
         step, rank_.at.rank, next);
  }
  if (!std::isfinite(read_result().loss)) {
    fail(ExitCode::non_finite, "the loss is not finite at step {} (rank {}); {}", step,
         rank_.at.rank, next);
  }
}

StepResult TrainStep::read_result() const {
  const BlockRange all{0, layout_.total_blocks};
  const int64_t columns = metric_columns(rank_.config);
  const std::vector<float> table = canonical_metrics();
  const double sequences = static_cast<double>(rank_.config.train.global_batch_sequences);
  const double positions = sequences * static_cast<double>(rank_.config.train.sequence_length);
  StepResult result;
  result.tokens = targets_;
  const float* first = table.data();
  result.loss = tree_sum(first + kMetricLoss, columns, all) / static_cast<double>(targets_);
  for (int64_t at = kLayerMetrics - 1; at + kLayerMetrics <= columns; at += kLayerMetrics) {
    result.balance_loss += tree_sum(first + at, columns, all) / sequences;
    result.z_loss += tree_sum(first + at + 1, columns, all) / positions;
  }
  result.grad_norm = host_clip_[kClipNorm];
  const int64_t layers = model_.config().layers, experts = model_.config().experts;
  const int32_t* count = host_counts_;
  for (int64_t layer = 0; layer < layers; ++layer) {
    result.expert_load.emplace_back(count + layer * experts, count + (layer + 1) * experts);
  }
  return result;
}

StepResult TrainStep::update(int64_t step, double learning_rate, WithDigests with_digests) {
  rank_.enter({.stage = WorkStage::update});
  apply_adamw(step, learning_rate);
  update_router_state();
  if (with_digests == WithDigests::yes) enqueue_digests();
  download_results();
  rank_.finish_step();
  if (rank_.is_shape_only()) return {.learning_rate = learning_rate, .tokens = targets_};
  check_finite(step);
  StepResult result = read_result();
  result.learning_rate = learning_rate;
  if (with_digests == WithDigests::yes) result.digests = read_digests();
  return result;
}

TrainStep::Evaluation TrainStep::evaluate(const SequenceSource& source, int64_t batch_index,
                                          float* logits_TV) {
  begin(batch_index, source);
  pass_ = SchedulePass::forward_only;
  PipelinePass(*this, source, batch_index).evaluate(evaluation_, logits_TV);
  pass_ = SchedulePass::training;
  reduce_metrics();
  host_metrics_ = rank_.download<float>(gathered_metrics_);
  rank_.finish_step();
  const std::vector<float> table = canonical_metrics();
  const double loss =
      tree_sum(table.data() + kMetricLoss, metric_columns(rank_.config), {0, layout_.total_blocks});
  return {loss, targets_};
}

std::map<std::string, std::vector<float>> TrainStep::owned_gradients() {
  rank_.finish_step();
  std::map<std::string, std::vector<float>> gradients;
  for (const auto& group : model_.groups()) {
    for (const ParamPiece& piece : group->owned_pieces()) {
      std::vector<float>& whole = gradients[piece.tensor->canonical.name];
      whole.resize(static_cast<size_t>(piece.tensor->elements));
      const std::vector<float> from =
          rank_.read<float>(group->gradient(piece.flat_offset()), piece.elements);
      for (int64_t i = 0; i < piece.elements; ++i) {
        whole[piece.first_element + i] = from[i] / static_cast<float>(targets_);
      }
      rank_.finish_step();
    }
  }
  return gradients;
}

}  // namespace cambium
