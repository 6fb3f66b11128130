// PlanReport: what a shape-only run of one training step says of a layout on a machine.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "src/base/arena.h"
#include "src/base/trace.h"
#include "src/config/config.h"
#include "src/config/derive.h"
#include "src/train/train_step.h"

namespace cambium {

// One simulated rank. With folding it stands for all ranks of its pipeline stage.
struct RankPlan {
  int64_t rank = 0;
  int64_t step_ns = 0;  // from the same instant on every rank
  // Of the compute stream: it works, or waits for a transfer that moves, for its peers, for another
  // pipeline rank, for the host.
  int64_t busy_ns = 0, exposed_ns = 0, peers_ns = 0, pipeline_ns = 0, host_ns = 0;
  int64_t transfer_ns = 0;                     // transfers moving, overlapped or not
  int64_t extrapolated_ns = 0;                 // of ops outside the measured shapes
  int64_t peak_bytes = 0, reserved_bytes = 0;  // allocated; and with the holes between
  std::array<int64_t, kMemoryClasses> peak_by_class{};
  WorkPlace peak_place;
  std::string peak_what;
  std::map<std::string, OpTotals> ops;
  std::map<std::string, int64_t> op_ns;     // by op, on the machine
  std::map<std::string, CommTotals> calls;  // by communicator and kind: "expert all_to_all_v"
};

// What all simulated ranks spend in one op in a step.
struct OpShare {
  std::string op;
  OpTotals totals;
  int64_t time_ns = 0;
};

struct PlanReport {
  std::string machine;
  int64_t ranks = 0;
  int64_t step_ns = 0;
  double tokens_per_s_per_rank = 0;
  double mfu = 0;
  double exposed_share = 0, pipeline_share = 0;  // means over ranks, of the step
  double extrapolated_share = 0;                 // of busy time
  bool links_extrapolated = false;
  int64_t device_bytes = 0, device_reserved_bytes = 0;  // the machine's
  std::vector<RankPlan> by_rank;
  bool fits() const;
  const RankPlan& fullest() const;
  std::vector<OpShare> ops() const;  // the most expensive one first
};

enum class Folding { off, on };

struct PlanRun {
  Config config;
  std::string machine;  // name or path
  Folding folding = Folding::off;
  Trace* trace = nullptr;
};

// Sequences whose values nobody reads.
class ShapeOnlySequences : public SequenceSource {
 public:
  explicit ShapeOnlySequences(const Config& config) : config_(config) {}
  void fill(int64_t batch_index, SequenceRange range, Batch& batch) const override;
  int64_t target_count(int64_t batch_index) const override;

 private:
  const Config& config_;
};

// What a rank's step left in its counters: the same for runs that compute and runs that do not.
void count_calls(const Rank& rank, RankPlan& plan);

}  // namespace cambium
