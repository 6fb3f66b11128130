#include "src/train/pipeline_pass.h"

namespace cambium {

namespace {

// Messages whose buffers may still be read when the next one is queued.
constexpr size_t kSendsInFlight = 2;

size_t index_of(Payload payload) { return static_cast<size_t>(payload); }

}  // namespace

PipelinePass::PipelinePass(TrainStep& step, const SequenceSource& source, int64_t batch_index)
    : step_(step),
      rank_(step.rank_),
      model_(step.model_),
      source_(source),
      batch_index_(batch_index) {}

void PipelinePass::train(const Schedule& schedule) {
  for (const PipelineAction& action : schedule.ranks[rank_.at.pp_index]) {
    const Place at{action.chunk, action.micro_batch};
    switch (action.kind) {
      case ActionKind::forward:
        forward(schedule, at, Keep::for_backward, nullptr);
        break;
      case ActionKind::backward:
        backward(schedule, at, WeightGradients::now);
        break;
      case ActionKind::backward_input:
        backward(schedule, at, WeightGradients::later);
        break;
      case ActionKind::backward_weight:
        backward_weight(at);
        break;
      case ActionKind::forward_backward:
        forward_backward(schedule, at, {action.backward_chunk, action.backward_micro_batch});
        break;
      case ActionKind::send:
        send(action);
        break;
      case ActionKind::receive:
        receive(action);
        break;
    }
  }
  finish();
}

void PipelinePass::evaluate(const Schedule& schedule, float* logits_TV) {
  for (const PipelineAction& action : schedule.ranks[rank_.at.pp_index]) {
    const Place at{action.chunk, action.micro_batch};
    if (action.kind == ActionKind::send) {
      send(action);
    } else if (action.kind == ActionKind::receive) {
      receive(action);
    } else {
      CHECK(action.kind == ActionKind::forward);
      float* logits = logits_TV;
      if (logits != nullptr) {
        logits += at.micro_batch * micro_batch(at.micro_batch).tokens * model_.config().vocab;
      }
      forward(schedule, at, Keep::nothing, logits);
    }
  }
  finish();
}

// Everything that came was read, everything made was sent.
void PipelinePass::finish() {
  release_sent(0);
  CHECK(batches_.empty() && states_.empty());
  for (const Payload payload : {Payload::activation, Payload::gradient}) {
    CHECK(arrivals_[index_of(payload)].empty() && departures_[index_of(payload)].empty());
  }
}

const MicroBatch& PipelinePass::micro_batch(int64_t index) {
  const auto found = batches_.find(index);
  if (found != batches_.end()) return found->second;
  return batches_.emplace(index, step_.upload_micro_batch(source_, batch_index_, index))
      .first->second;
}

void PipelinePass::finish_chunk(Place at) {
  states_.erase(at);
  if (++chunks_done_[at.micro_batch] == model_.chunks()) batches_.erase(at.micro_batch);
}

void PipelinePass::forward(const Schedule& schedule, Place at, Keep keep, float* logits_TV) {
  const MicroBatch& batch = micro_batch(at.micro_batch);
  ChunkState* state = keep == Keep::for_backward ? &states_[at] : nullptr;
  Buffer x_TD = model_.forward({batch, at.chunk, take(Payload::activation, at), state, logits_TV});
  if (!x_TD.empty()) hand_on(schedule, Payload::activation, at, std::move(x_TD));
  if (keep == Keep::nothing) finish_chunk(at);
}

void PipelinePass::backward(const Schedule& schedule, Place at, WeightGradients weights) {
  const MicroBatch& batch = micro_batch(at.micro_batch);
  Buffer d_x_TD =
      model_.backward({batch, at.chunk, take(Payload::gradient, at), states_.at(at), weights});
  if (!d_x_TD.empty()) hand_on(schedule, Payload::gradient, at, std::move(d_x_TD));
  if (weights == WeightGradients::now) finish_chunk(at);
}

void PipelinePass::forward_backward(const Schedule& schedule, Place ahead, Place back) {
  if (!rank_.config.parallel.overlap) {
    forward(schedule, ahead, Keep::for_backward, nullptr);
    return backward(schedule, back, WeightGradients::now);
  }
  const MicroBatch &ahead_batch = micro_batch(ahead.micro_batch),
                   &back_batch = micro_batch(back.micro_batch);
  auto [x_TD, d_x_TD] = model_.forward_backward(
      {ahead_batch, ahead.chunk, take(Payload::activation, ahead), &states_[ahead]},
      {back_batch, back.chunk, take(Payload::gradient, back), states_.at(back)});
  if (!x_TD.empty()) hand_on(schedule, Payload::activation, ahead, std::move(x_TD));
  if (!d_x_TD.empty()) hand_on(schedule, Payload::gradient, back, std::move(d_x_TD));
  finish_chunk(back);
}

void PipelinePass::backward_weight(Place at) {
  model_.backward_weight(micro_batch(at.micro_batch), at.chunk, states_.at(at));
  finish_chunk(at);
}

void PipelinePass::hand_on(const Schedule& schedule, Payload payload, Place from, Buffer data) {
  const int64_t step = payload == Payload::activation ? 1 : -1;
  const int64_t stage = schedule.stage(rank_.at.pp_index, from.chunk) + step;
  for (int64_t chunk = 0; chunk < schedule.chunks; ++chunk) {
    if (schedule.stage(rank_.at.pp_index, chunk) != stage) continue;
    arrivals_[index_of(payload)][{chunk, from.micro_batch}].data = std::move(data);
    return;
  }
  departures_[index_of(payload)][from] = std::move(data);
}

Buffer PipelinePass::take(Payload payload, Place at) {
  auto arrived = arrivals_[index_of(payload)].extract(at);
  if (arrived.empty()) return {};  // the first stage's input, the last one's gradient
  rank_.compute_waits(arrived.mapped().ticket);
  return std::move(arrived.mapped().data);
}

void PipelinePass::send(const PipelineAction& action) {
  // The fault `swapped_send`: this rank's first two messages to one peer change places.
  if (rank_.has_fault("swapped_send") && !swapped_) {
    if (!delayed_send_.has_value()) {
      delayed_send_ = action;
      return;
    }
    swapped_ = delayed_send_->peer == action.peer && delayed_send_->payload == action.payload;
    if (swapped_) {
      post_send(action);
      return post_send(*delayed_send_);
    }
  }
  post_send(action);
}

void PipelinePass::post_send(const PipelineAction& action) {
  auto made = departures_[index_of(action.payload)].extract({action.chunk, action.micro_batch});
  CHECK(!made.empty());
  release_sent(kSendsInFlight - 1);
  Transit transit{.data = std::move(made.mapped())};
  const Message message{static_cast<int>(action.peer), transit.data.data(),
                        transit.data.size_bytes()};
  rank_.pipe.wait(rank_.compute.record());
  transit.ticket = exchange({.communicator = *rank_.pipeline,
                             .stream = rank_.pipe,
                             .sends = {&message, 1},
                             .dtype = DType::u8});
  sent_.push_back(std::move(transit));
}

void PipelinePass::receive(const PipelineAction& action) {
  const MicroBatch& batch = micro_batch(action.micro_batch);
  Transit transit{.data = model_.real(Shape(batch.tokens, model_.config().hidden), "received")};
  const Message message{static_cast<int>(action.peer), transit.data.data(),
                        transit.data.size_bytes()};
  // What used this memory before, in program order, is done when the message may write it.
  rank_.pipe.wait(rank_.compute.record());
  transit.ticket = exchange({.communicator = *rank_.pipeline,
                             .stream = rank_.pipe,
                             .recvs = {&message, 1},
                             .dtype = DType::u8});
  arrivals_[index_of(action.payload)][{action.chunk, action.micro_batch}] = std::move(transit);
}

void PipelinePass::release_sent(size_t most) {
  while (sent_.size() > most) {
    rank_.compute_waits(sent_.front().ticket);
    sent_.pop_front();
  }
}

}  // namespace cambium
