// The passes of one chunk: its layers one by one, or a forward's and a backward's in pairs.
#include "src/model/model.h"

namespace cambium {

bool Model::recomputes() const { return rank_.config.recompute.mode == RecomputeMode::full_layer; }

// A forward pass that stands before layer `layer()`.
class Model::ForwardPass {
 public:
  ForwardPass(Model& model, ForwardCall call)
      : model_(model), call_(std::move(call)), here_(model.chunks_[call_.chunk]) {
    layer_ = here_.layers.first;
    x_TD = here_.embeds ? model_.embed(call_.batch) : std::move(call_.x_TD);
    if (call_.state != nullptr) {
      call_.state->layers.resize(static_cast<size_t>(here_.layers.count()));
    }
  }
  bool has_layer() const { return layer_ < here_.layers.end; }
  int64_t layer() const { return layer_; }
  const MicroBatch& batch() const { return call_.batch; }
  Keep keep() const {
    return call_.state != nullptr && !model_.recomputes() ? Keep::for_backward : Keep::nothing;
  }

  LayerState& begin_layer() {
    model_.hold_layer(layer_);
    if (layer_ + 1 < here_.layers.end) model_.prefetch_layer(layer_ + 1);
    passing_ = LayerState{};
    return call_.state == nullptr ? passing_ : call_.state->layers[layer_ - here_.layers.first];
  }
  void end_layer() {
    if (call_.state != nullptr && model_.recomputes()) {
      LayerState& saved = call_.state->layers[layer_ - here_.layers.first];
      LayerState kept;
      kept.x_TD = std::move(saved.x_TD);
      kept.expert_index_TK = std::move(saved.expert_index_TK);
      // Loads of the batch so far, which grow: their loss is not computed a second time.
      if (model_.rank_.config.balance.loss == BalanceLoss::global_batch) {
        kept.d_probs_TE = std::move(saved.d_probs_TE);
      }
      saved = std::move(kept);
    } else if (call_.state != nullptr) {
      release_recomputed(model_.layer_context(layer_),
                         call_.state->layers[layer_ - here_.layers.first]);
    }
    passing_ = LayerState{};
    model_.drop_layer(layer_);
    ++layer_;
  }
  Buffer finish() {
    if (!here_.ends) return std::move(x_TD);
    model_.run_head(call_, x_TD);
    x_TD.reset();
    return {};
  }

  Buffer x_TD;  // the input of the layer, then its output

 private:
  Model& model_;
  ForwardCall call_;
  const Chunk& here_;
  LayerState passing_;
  int64_t layer_ = 0;
};

// A backward pass whose next layer is `layer()`.
class Model::BackwardPass {
 public:
  BackwardPass(Model& model, BackwardCall call)
      : model_(model), call_(std::move(call)), here_(model.chunks_[call_.chunk]) {
    layer_ = here_.layers.end - 1;
    d_out_TD = std::move(here_.ends ? call_.state.d_output_TD : call_.d_out_TD);
    call_.state.gradients.resize(call_.state.layers.size());
  }
  bool has_layer() const { return layer_ >= here_.layers.first; }
  int64_t layer() const { return layer_; }
  const MicroBatch& batch() const { return call_.batch; }
  LayerState& saved() { return call_.state.layers[layer_ - here_.layers.first]; }
  LayerGradients& gradients() { return call_.state.gradients[layer_ - here_.layers.first]; }

  void begin_layer() {
    gradients().weights = call_.weights;
    gradients().d_out_TD = std::move(d_out_TD);
    model_.hold_layer(layer_);
    if (layer_ > here_.layers.first) model_.prefetch_layer(layer_ - 1);
    if (model_.recomputes()) {
      Buffer input_TD = std::move(saved().x_TD);
      model_.layer_forward(batch(), layer_, std::move(input_TD), saved(), Keep::recomputing);
    }
    recompute_norms(model_.layer_context(layer_), batch(), saved());
    if (call_.weights == WeightGradients::now) model_.begin_layer(layer_, batch());
  }
  void end_layer() {
    if (call_.weights == WeightGradients::now) {
      model_.end_layer(layer_);
      saved() = LayerState{};
      gradients() = LayerGradients{};
    } else {
      release_for_weights(saved(), gradients());
    }
    model_.drop_layer(layer_);
    --layer_;
  }
  Buffer finish() {
    if (!here_.embeds) return std::move(d_out_TD);
    if (call_.weights == WeightGradients::now) {
      model_.embed_backward(batch(), d_out_TD);
      d_out_TD.reset();
    } else {
      call_.state.d_embedding_TD = std::move(d_out_TD);
    }
    return {};
  }

  Buffer d_out_TD;  // the gradient of the layer's output, then of its input

 private:
  Model& model_;
  BackwardCall call_;
  const Chunk& here_;
  int64_t layer_ = 0;
};

Buffer Model::layer_forward(const MicroBatch& batch, int64_t layer, Buffer x_TD, LayerState& state,
                            Keep keep) {
  const LayerContext c = layer_context(layer, keep);
  attend_forward(c, batch, std::move(x_TD), state);
  if (c.is_dense()) return mlp_forward(c, batch, state);
  dispatch_forward(c, batch, state);
  expert_forward(c, batch, state);
  if (keep == Keep::recomputing) return {};
  combine_forward(c, batch, state);
  return aggregate_forward(c, batch, state);
}

Buffer Model::layer_backward(const MicroBatch& batch, int64_t layer, LayerState& state,
                             LayerGradients& gradients) {
  const LayerContext c = layer_context(layer);
  if (c.is_dense()) return attend_backward(c, batch, state, gradients);
  aggregate_backward(c, batch, state, gradients);
  expert_backward_input(c, state, gradients);
  dispatch_backward(c, state, gradients);
  if (gradients.weights == WeightGradients::now) expert_backward_weight(c, state, gradients);
  return attend_backward(c, batch, state, gradients);
}

// What travels of one pass is hidden behind what the other computes:
//   comm     | B combine | F dispatch | B dispatch            | F combine |
//   compute  | F attend  | B expert   | B weights, F expert   | B attend  | F aggregate
void Model::layer_pair(ForwardPass& f, BackwardPass& b) {
  LayerState& state = f.begin_layer();
  b.begin_layer();
  const LayerContext cf = layer_context(f.layer(), f.keep()), cb = layer_context(b.layer());
  LayerState& saved = b.saved();
  LayerGradients& gradients = b.gradients();
  if (!cb.is_dense()) aggregate_backward(cb, b.batch(), saved, gradients);
  attend_forward(cf, f.batch(), std::move(f.x_TD), state);
  if (!cf.is_dense()) dispatch_forward(cf, f.batch(), state);
  if (!cb.is_dense()) {
    expert_backward_input(cb, saved, gradients);
    dispatch_backward(cb, saved, gradients);
    if (gradients.weights == WeightGradients::now) expert_backward_weight(cb, saved, gradients);
  }
  if (!cf.is_dense()) {
    expert_forward(cf, f.batch(), state);
    combine_forward(cf, f.batch(), state);
  }
  b.d_out_TD = attend_backward(cb, b.batch(), saved, gradients);
  f.x_TD =
      cf.is_dense() ? mlp_forward(cf, f.batch(), state) : aggregate_forward(cf, f.batch(), state);
  f.end_layer();
  b.end_layer();
}

void Model::layer_alone(ForwardPass& f) {
  LayerState& state = f.begin_layer();
  f.x_TD = layer_forward(f.batch(), f.layer(), std::move(f.x_TD), state, f.keep());
  f.end_layer();
}

void Model::layer_alone(BackwardPass& b) {
  b.begin_layer();
  b.d_out_TD = layer_backward(b.batch(), b.layer(), b.saved(), b.gradients());
  b.end_layer();
}

void Model::run_head(const ForwardCall& call, const Buffer& x_TD) {
  enter(WorkStage::head, WorkPass::forward, call.batch);
  head_->hold_weights();
  head_weights_.group->hold_weights();
  if (call.state == nullptr) {
    head_evaluate(call.batch, x_TD, call.logits_TV);
  } else {
    head_->begin_micro_batch(call.batch.index);
    if (tied_head_ != nullptr) tied_head_->begin_micro_batch(call.batch.index);
    call.state->d_output_TD = head_forward_backward(call.batch, x_TD);
    std::vector<ParamGroup*> groups{head_};
    if (tied_head_ != nullptr) groups.push_back(tied_head_.get());
    end_groups(std::move(groups));
  }
  head_weights_.group->drop_weights();
  head_->drop_weights();
}

Buffer Model::forward(ForwardCall call) {
  ForwardPass f(*this, std::move(call));
  while (f.has_layer()) layer_alone(f);
  return f.finish();
}

Buffer Model::backward(BackwardCall call) {
  BackwardPass b(*this, std::move(call));
  while (b.has_layer()) layer_alone(b);
  return b.finish();
}

Model::PairResult Model::forward_backward(ForwardCall forward, BackwardCall backward) {
  ForwardPass f(*this, std::move(forward));
  BackwardPass b(*this, std::move(backward));
  while (f.has_layer() && b.has_layer()) layer_pair(f, b);
  while (f.has_layer()) layer_alone(f);
  while (b.has_layer()) layer_alone(b);
  // NOTE: the head opens gradient slots for its own micro-batch, so no layer's may be open.
  Buffer x_TD = f.finish();
  return {std::move(x_TD), b.finish()};
}

void Model::backward_weight(const MicroBatch& batch, int64_t chunk, ChunkState& state) {
  const Chunk& here = chunks_[chunk];
  for (int64_t layer = here.layers.end - 1; layer >= here.layers.first; --layer) {
    const int64_t index = layer - here.layers.first;
    begin_layer(layer, batch);
    layer_backward_weight(layer_context(layer), state.layers[index], state.gradients[index]);
    end_layer(layer);
    state.layers[index] = LayerState{};
    state.gradients[index] = LayerGradients{};
  }
  if (here.embeds) embed_backward(batch, state.d_embedding_TD);
}

}  // namespace cambium
