// PipelinePass: one rank's walk through its list of a schedule (src/parallel/schedule.h).
//
// Every action is queued when the list says so; waits stand where data is consumed. A message goes
// on the stream `pipe`: a send waits for what computed its data, and its buffer is freed in program
// order behind a wait for the message; a receive is awaited by the action that reads it. With
// pp = 1 the list has no messages and this is the plain loop over micro-batches.
#pragma once

#include <deque>
#include <map>
#include <optional>
#include <vector>

#include "src/train/train_step.h"

namespace cambium {

class PipelinePass {
 public:
  PipelinePass(TrainStep& step, const SequenceSource& source, int64_t batch_index);
  void train(const Schedule& schedule);
  // `logits_TV` (optional): this rank's, micro-batch by micro-batch.
  void evaluate(const Schedule& schedule, float* logits_TV);

 private:
  struct Place {  // one micro-batch's data for one chunk
    int64_t chunk = 0, micro_batch = 0;
    auto operator<=>(const Place&) const = default;
  };
  struct Transit {
    Buffer data;
    Ticket ticket;
  };
  void forward(const Schedule& schedule, Place at, Keep keep, float* logits_TV);
  void backward(const Schedule& schedule, Place at, WeightGradients weights);
  void forward_backward(const Schedule& schedule, Place ahead, Place back);
  void backward_weight(Place at);
  void send(const PipelineAction& action);
  void post_send(const PipelineAction& action);
  void receive(const PipelineAction& action);
  // What a stage hands on: to this rank's own chunk, or kept for the message that follows.
  void hand_on(const Schedule& schedule, Payload payload, Place from, Buffer data);
  Buffer take(Payload payload, Place at);
  void release_sent(size_t most);
  const MicroBatch& micro_batch(int64_t index);
  void finish_chunk(Place at);
  void finish();

  TrainStep& step_;
  Rank& rank_;
  Model& model_;
  const SequenceSource& source_;
  int64_t batch_index_;
  std::map<int64_t, MicroBatch> batches_;
  std::map<int64_t, int64_t> chunks_done_;
  std::map<Place, ChunkState> states_;
  // By payload: what chunks of this rank will read, and what messages will send.
  std::map<Place, Transit> arrivals_[2];
  std::map<Place, Buffer> departures_[2];
  std::deque<Transit> sent_;
  std::optional<PipelineAction> delayed_send_;  // the fault `swapped_send`
  bool swapped_ = false;
};

}  // namespace cambium
