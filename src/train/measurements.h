// Measurements: what `cambium calibrate` found out about a machine, for its machine file.
#pragma once

#include <string>
#include <vector>

#include "kernels/op.h"
#include "src/comm/comm.h"
#include "src/config/config.h"

namespace cambium {

// The median of an op's calls of one shape.
struct MeasuredOp {
  Cost cost;
  double ns = 0;
};

// A collective of `ranks` ranks of one node, of which the busiest moves `bytes` each way.
struct MeasuredCollective {
  CollectiveKind kind = CollectiveKind::all_reduce;
  int64_t ranks = 0;
  double bytes = 0;
  double ns = 0;
};
constexpr CollectiveKind kMeasuredCollectives[] = {
    CollectiveKind::all_to_all_v, CollectiveKind::all_gather, CollectiveKind::reduce_scatter,
    CollectiveKind::all_reduce};

struct Measurements {
  std::string name;     // of the machine
  std::string command;  // the source of every figure that was measured
  DeviceKind device = DeviceKind::cpu;
  ComputeType compute = ComputeType::fp32;
  double memory_bytes = 0;
  double peak_flops_per_s = 0;  // of the data sheet; 0 = the fastest product measured
  int multiprocessors = 1;
  double launch_ns = 0, host_wait_ns = 0;
  // Of transfers; 0 = not measured, and taken from dgx-h200.
  double call_ns = 0, call_rank_ns = 0, copy_bytes_per_s = 0;
  std::vector<MeasuredOp> ops;
};

}  // namespace cambium
