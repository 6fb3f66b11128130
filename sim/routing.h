// Routing of a shape-only run: how many rows each rank sends to each expert.
//
// A pure function of (step, layer, micro-batch, source rank), so both ends of a dispatch agree:
//   uniform  every expert gets the same number of rows from every rank: no draw at all
//   concentrated  all tokens choose the same top_k experts of a layer: no draw, idle ranks
//   zipf     expert i of a layer's own order is chosen with a weight of (i + 1)^-exponent
//   a file   metrics.jsonl of a run: the loads of its last step, layer by layer; or a routing trace
// Those with weights add what chance adds: the counts of T tokens scatter as independent draws
// would. A rank's tokens (each once, however many of its experts they go to) follow from the rows
// by the layer's ratio of the two, measured on tokens drawn by weight without replacement.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "src/comm/rank_environment.h"
#include "src/config/config.h"
#include "src/parallel/mesh.h"

namespace cambium::sim {

class RoutingModel {
 public:
  RoutingModel(const Config& config, int64_t tokens);

  // Rows of `source`'s T tokens for every expert; their sum is T * top_k.
  const std::vector<int32_t>& expert_rows(int64_t layer, int64_t micro_batch, int64_t source);
  // What `rank` sends to and gets from the ranks of its expert group.
  DispatchCounts dispatch_counts(int rank, const WorkPlace& place);
  // Tokens among `rows` rows that go to expert rank `index` of the group.
  int64_t tokens_of(int64_t rows, int64_t layer, int64_t index) const;
  // Every rank sends every expert the same: what folding needs.
  bool is_symmetric() const { return is_uniform_ && tokens_ * top_k_ % experts_ == 0; }

 private:
  void read_shares(const std::string& path);
  void sample_tokens(int64_t layer);
  std::vector<int32_t> draw(int64_t layer, int64_t micro_batch, int64_t source) const;

  bool is_uniform_ = false, is_concentrated_ = false;
  Mesh mesh_;
  uint64_t seed_ = 0;
  int64_t tokens_ = 0, top_k_ = 0, experts_ = 0, ranks_ = 1, layers_ = 0;
  std::vector<std::vector<double>> share_;          // [layer][expert], sums to top_k
  std::vector<std::vector<double>> tokens_by_row_;  // [layer][expert rank]
  std::map<std::array<int64_t, 3>, std::vector<int32_t>> drawn_;
};

}  // namespace cambium::sim
