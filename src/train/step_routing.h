// StepRouting: one rank's part in forcing and in tracing the routing of training steps.
//
// `balance.routing` even and replay give router_topk its `forced_index_TK`, micro-batch by
// micro-batch; a traced step leaves every layer's choices in a table, whose rows go to rank 0
// through the communicator and lie there in global order. Evaluation is neither forced nor traced.
#pragma once

#include <optional>
#include <vector>

#include "src/model/qwen3_moe.h"
#include "src/parallel/batch_layout.h"
#include "src/train/routing_trace.h"

namespace cambium {

class StepRouting {
 public:
  StepRouting(Rank& rank, const BatchLayout& layout) : rank_(rank), layout_(layout) {}
  // The steps that follow leave their choices.
  void start_trace();
  // Gives a micro-batch of a training step its forced experts, and room for its choices.
  void attach(int64_t batch_index, MicroBatch& batch);
  // The choices of the step that ended, on rank 0; empty elsewhere. A collective call.
  TracedRouting collect();

 private:
  std::vector<int32_t> forced_ids(int64_t batch_index, int64_t micro_batch, int64_t layer);
  int64_t micro_batch_choices() const;
  std::vector<Message> messages(const Buffer& table, const MeshCoordinates& at) const;
  void place(const Buffer& table, const MeshCoordinates& from, TracedRouting& routing);

  Rank& rank_;
  const BatchLayout& layout_;
  std::optional<RoutingTraceReader> replayed_;
  Buffer table_;  // [ids, weights][layer][micro-batch][token][k]; of the layers here
};

}  // namespace cambium
