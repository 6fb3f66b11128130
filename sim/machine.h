// Machine: what a machine file (sim/machines/*.toml) says of a cluster's nodes, in typed units, and
// the time that an op takes there.
//
// Every constant has a source. An op's time is that of the roofline, max(FLOPs / peak, bytes /
// bandwidth), times a measured ratio, interpolated over the logarithms of the op's extents between
// the measured shapes (inverse distance; at a measured shape it is what was measured). Products of
// experts' rows count whole tiles of rows. A shape outside the measured ranges, or an op that was
// not measured, is marked as extrapolated.
#pragma once

#include <array>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "kernels/op.h"
#include "src/train/measurements.h"

namespace cambium::sim {

// Measured shapes of one op.
struct OpTable {
  struct Point {
    std::array<double, 6> log_extent{};
    double log_ratio = 0;  // of measured to roofline time
  };
  TimedOp::Bound bound = TimedOp::Bound::compute;
  int64_t row_tile = 1;     // rows of an expert are multiplied in whole tiles of so many
  double residual = 0;      // mean relative error of each point, predicted from the others
  bool is_measured = true;  // false: scaled from another machine's
  std::vector<Point> points;
  std::array<double, 6> least{}, most{};  // of log_extent
};

// A tier of the network. Sizes below the first row of `efficiency` and above the last one take its
// value and count as extrapolated.
struct LinkModel {
  double latency_ns = 0;       // of a call
  double rank_latency_ns = 0;  // more for every rank of the group
  double bytes_per_s = 0;      // of one rank, in each direction
  std::vector<std::pair<double, double>>
      efficiency;  // log2 of a rank's bytes, share of bytes_per_s
};

// Measured times of one collective within a node, which stand for the link's model where they are:
// between their sizes by interpolation of logarithms; below the first size its time, above the last
// its rate.
struct CollectiveCurve {
  CollectiveKind kind = CollectiveKind::all_reduce;
  int64_t ranks = 0;
  std::vector<std::pair<double, double>> points;  // log2 of the busiest rank's bytes, log of ns
};

struct Machine {
  std::string name;
  std::string device;   // cpu | cuda
  std::string compute;  // fp32 | bf16: what its ops were measured in
  int64_t memory_bytes = 0;
  int64_t reserved_bytes = 0;  // context, libraries, communication buffers
  double peak_flops_per_s = 0;
  double bytes_per_s = 0;  // of memory
  double launch_ns = 0;    // of the host, for one op or call
  double least_op_ns = 0;  // the shortest op
  double wait_ns = 0;      // from an event's end to the waiting host's next line
  double multiprocessors = 1;
  bool is_shared = false;  // all ranks' ops run on one device, one after another
  int64_t node_ranks = 1;
  int64_t nics = 1;                 // of a node
  double comm_multiprocessors = 0;  // that a running transfer takes
  double comm_memory_share = 0;     // of memory-bound ops' rate that a running transfer takes
  LinkModel near, far;              // within a node, and between nodes
  double copy_bytes_per_s = 0;      // a call of one rank alone
  std::map<std::string, OpTable> ops;
  std::vector<CollectiveCurve> collectives;
};

// By name (those built in), or a file's path. An Error with exit code 2 names file, key and unit.
Machine load_machine(const std::string& name_or_path);
std::string machine_source(const std::string& name_or_path);  // its text
Machine parse_machine(const std::string& text, const std::string& path);

struct OpTime {
  int64_t ns = 0;
  TimedOp::Bound bound = TimedOp::Bound::compute;
  bool is_extrapolated = false;
};
// `expert_rows` by local expert; empty for other ops.
OpTime op_time(const Machine& machine, const Cost& cost, std::span<const int64_t> expert_rows);

// Of a collective that was measured, from the curve of the nearest number of ranks:
// another number, or a size more than a factor of two outside, is extrapolated. Else none.
struct CollectiveTime {
  double ns = 0;
  bool is_measured = false;
  bool is_extrapolated = false;
};
struct CollectiveSize {
  CollectiveKind kind = CollectiveKind::all_reduce;
  int64_t ranks = 0;
  double bytes = 0;
};
CollectiveTime collective_time(const Machine& machine, const CollectiveSize& size);

// Roofline time, and the measured points' ratio: what `calibrate` fits.
double roofline_ns(const Machine& machine, const OpTable* table, const Cost& cost,
                   std::span<const int64_t> expert_rows);
double interpolated_log_ratio(const OpTable& table, const std::array<double, 6>& log_extent,
                              int64_t without = -1);
double log2(double value);
std::array<double, 6> log_extents(const std::array<int64_t, 6>& shape_key);

}  // namespace cambium::sim
