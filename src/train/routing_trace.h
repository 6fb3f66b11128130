// Routing traces: which experts the tokens of training steps went to, with what weights.
//
// `cambium train --trace-routing FILE` writes them, `balance.routing = "replay"` forces them. An
// HDF5 file: `expert_ids` [layers, sequences, positions, k] int32 and `gate_weights` float32 of the
// same shape. The traced steps' global batches follow one another on the axis of sequences, in
// global order whatever the layout was, so that arrays keep four axes for any number of steps. A
// dense layer holds -1 and 0. Attributes say what the run was: first_step, global_batch_sequences,
// experts. Napkin: 8 bytes for each of L B S K choices of a step.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "src/base/hdf5_file.h"
#include "src/base/io.h"
#include "src/config/config.h"
#include "src/data/batch.h"

namespace cambium {

// Choices of one step, [layer][sequence of the global batch][position][k].
struct TracedRouting {
  std::vector<int32_t> expert_ids;
  std::vector<float> gate_weights;
};

struct TracedSteps {
  int64_t first = 1, steps = 0;
};

// Writes `path`.tmp; the file appears whole by `commit`, or not at all. Errors: exit 31.
class RoutingTraceWriter {
 public:
  RoutingTraceWriter(FileSystem& files, const std::string& path, const Config& config,
                     TracedSteps range);
  ~RoutingTraceWriter();
  const TracedSteps& range() const { return range_; }
  bool is_complete() const { return !writer_.has_value(); }
  // Steps come in order; the last one commits the file.
  void write_step(int64_t step, const TracedRouting& routing);

 private:
  void commit();
  FileSystem& files_;
  std::string path_;
  Config config_;
  TracedSteps range_;
  std::optional<Hdf5Writer> writer_;
};

// A trace that fits the configuration's model and batch. Errors: 2 when it is of another one, with
// both values; 30 when it is damaged or no trace; 31 when it cannot be read.
class RoutingTraceReader {
 public:
  explicit RoutingTraceReader(const Config& config);
  // Experts of sequences `range` of global batch `batch_index` in one layer, [sequence][position]
  // [k]. A trace of fewer steps than the run starts again.
  std::vector<int32_t> read(int64_t batch_index, int64_t layer, SequenceRange range) const;

 private:
  Config config_;
  Hdf5Reader file_;
  TracedSteps range_;
};

// Choices of every expert in every layer of a trace, for `plan.routing`; exit 2 or 30 as above.
std::vector<std::vector<double>> traced_loads(const std::string& path, const Config& config);

// Experts that `balance.routing = "even"` gives position `position`, k = 0 .. top_k - 1: a rotation
// in which a token's experts lie apart, so that expert ranks are loaded alike too.
inline int64_t even_expert(const ModelConfig& model, int64_t position, int64_t k) {
  return (position + k * (model.experts / model.top_k)) % model.experts;
}

}  // namespace cambium
