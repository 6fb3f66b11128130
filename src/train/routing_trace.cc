#include "src/train/routing_trace.h"

#include <algorithm>
#include <array>

#include "fmt/format.h"
#include "src/base/check.h"

namespace cambium {

namespace {

constexpr const char* kTraceFormat = "cambium routing trace";
constexpr uint64_t kTraceVersion = 1;
constexpr const char* kTracedIds = "expert_ids";
constexpr const char* kTracedWeights = "gate_weights";
enum TraceAxis { kLayerAxis, kSequenceAxis, kPositionAxis, kChoiceAxis, kTraceAxes };
using TraceExtents = std::array<uint64_t, kTraceAxes>;

TraceExtents trace_extents(const Config& config, int64_t steps) {
  const auto count = [](int64_t value) { return static_cast<uint64_t>(value); };
  return {count(config.model.layers), count(steps * config.train.global_batch_sequences),
          count(config.train.sequence_length), count(config.model.top_k)};
}

// Choices of one sequence in one layer.
int64_t sequence_choices(const Config& config) {
  return config.train.sequence_length * config.model.top_k;
}

std::string extents_text(const Hdf5DatasetInfo& info) {
  std::string text;
  for (const uint64_t extent : info.extents) {
    text += (text.empty() ? "[" : ", ") + std::to_string(extent);
  }
  return text + "]";
}

struct TraceRule {
  const char* key;
  int64_t configured;
  int64_t traced;
};

void check_rules(const std::string& path, std::initializer_list<TraceRule> rules) {
  for (const TraceRule& rule : rules) {
    if (rule.configured == rule.traced) continue;
    fail(ExitCode::usage, "routing trace '{}' is of a run with {} = {}, not {}", path, rule.key,
         rule.traced, rule.configured);
  }
}

// What a file says of itself: both arrays are there and alike.
struct TraceHeader {
  int64_t layers = 0, sequences = 0, positions = 0, top_k = 0;
  int64_t experts = 0, global_batch_sequences = 0, first_step = 0;
};

TraceHeader read_header(const Hdf5Reader& file) {
  const auto damaged = [&](const std::string& what) {
    fail(ExitCode::corrupt_file, "{}: no routing trace: {}; next: cambium train --trace-routing",
         file.path(), what);
  };
  if (file.attribute_presence("format") == Hdf5Reader::Presence::absent ||
      file.string_attribute("format") != kTraceFormat ||
      file.u64_attribute("version") != kTraceVersion) {
    damaged(fmt::format("its format is not '{}' {}", kTraceFormat, kTraceVersion));
  }
  const Hdf5DatasetInfo ids = file.dataset_info(kTracedIds, kTraceAxes);
  const Hdf5DatasetInfo weights = file.dataset_info(kTracedWeights, kTraceAxes);
  if (ids.type != Hdf5Type::i32 || weights.type != Hdf5Type::f32) {
    damaged(fmt::format("{} holds {} and {} holds {}, not i32 and f32", kTracedIds,
                        hdf5_type_name(ids.type), kTracedWeights, hdf5_type_name(weights.type)));
  }
  if (ids.extents != weights.extents) {
    damaged(fmt::format("{} has {} values, {} has {}", kTracedIds, extents_text(ids),
                        kTracedWeights, extents_text(weights)));
  }
  const auto extent = [&](TraceAxis axis) { return static_cast<int64_t>(ids.extents[axis]); };
  const auto number = [&](const char* name) {
    return static_cast<int64_t>(std::min<uint64_t>(file.u64_attribute(name), INT64_MAX));
  };
  const TraceHeader header{extent(kLayerAxis),    extent(kSequenceAxis),
                           extent(kPositionAxis), extent(kChoiceAxis),
                           number("experts"),     number("global_batch_sequences"),
                           number("first_step")};
  const int64_t batch = std::max<int64_t>(1, header.global_batch_sequences);
  if (ids.element_count == 0 || header.sequences % batch != 0) {
    damaged(fmt::format("{} sequences are no whole steps of {}", header.sequences, batch));
  }
  return header;
}

// K distinct experts for each token of an expert layer.
void check_choices(const std::string& path, const Config& config, int64_t layer,
                   const std::vector<int32_t>& ids) {
  if (config.model.is_dense(layer)) return;
  const int64_t K = config.model.top_k;
  for (int64_t i = 0; i < std::ssize(ids); ++i) {
    const auto token = ids.begin() + i / K * K;
    const bool twice = std::find(token, ids.begin() + i, ids[i]) != ids.begin() + i;
    if (ids[i] >= 0 && ids[i] < config.model.experts && !twice) continue;
    fail(ExitCode::corrupt_file,
         "{}: expert {} of a token of layer {} is {}: not one of {} experts, each once", path,
         i % K, layer, ids[i], config.model.experts);
  }
}

}  // namespace

RoutingTraceWriter::RoutingTraceWriter(FileSystem& files, const std::string& path,
                                       const Config& config, TracedSteps range)
    : files_(files), path_(path), config_(config), range_(range) {
  files.make_directories(parent_directory(path));
  const std::string temporary = path + ".tmp";
  if (files.kind(temporary) != EntryKind::missing) files.remove_file(temporary);
  writer_.emplace(temporary);
  writer_->write_attribute("format", kTraceFormat);
  writer_->write_attribute("version", kTraceVersion);
  writer_->write_attribute("first_step", static_cast<uint64_t>(range.first));
  writer_->write_attribute("global_batch_sequences",
                           static_cast<uint64_t>(config.train.global_batch_sequences));
  writer_->write_attribute("experts", static_cast<uint64_t>(config.model.experts));
  const TraceExtents extents = trace_extents(config, range.steps);
  writer_->create_dataset(kTracedIds, Hdf5Type::i32, Hdf5Storage::checked, extents);
  writer_->create_dataset(kTracedWeights, Hdf5Type::f32, Hdf5Storage::checked, extents);
}

RoutingTraceWriter::~RoutingTraceWriter() {
  if (is_complete()) return;
  writer_.reset();
  std::remove((path_ + ".tmp").c_str());
}

void RoutingTraceWriter::write_step(int64_t step, const TracedRouting& routing) {
  CHECK(step >= range_.first && step < range_.first + range_.steps && !is_complete());
  const int64_t B = config_.train.global_batch_sequences, each = sequence_choices(config_);
  CHECK_EQ(std::ssize(routing.expert_ids), config_.model.layers * B * each);
  CHECK_EQ(std::ssize(routing.gate_weights), config_.model.layers * B * each);
  for (int64_t layer = 0; layer < config_.model.layers; ++layer) {
    const int64_t row = layer * range_.steps + step - range_.first;
    const Hdf5Range to{static_cast<uint64_t>(row * B * each), static_cast<uint64_t>(B * each)};
    writer_->write_range(kTracedIds, Hdf5Type::i32, to,
                         routing.expert_ids.data() + layer * B * each);
    writer_->write_range(kTracedWeights, Hdf5Type::f32, to,
                         routing.gate_weights.data() + layer * B * each);
  }
  if (step + 1 == range_.first + range_.steps) commit();
}

void RoutingTraceWriter::commit() {
  writer_->close();
  const std::string temporary = path_ + ".tmp";
  File file = files_.open(temporary, Symlinks::refuse);
  files_.sync(file);
  files_.close(file);
  files_.rename(temporary, path_);
  files_.sync_directory(parent_directory(path_));
  writer_.reset();
}

RoutingTraceReader::RoutingTraceReader(const Config& config)
    : config_(config), file_(config.balance.routing_file) {
  const TraceHeader header = read_header(file_);
  const TrainConfig& train = config.train;
  check_rules(file_.path(), {{"model.layers", config.model.layers, header.layers},
                             {"model.experts", config.model.experts, header.experts},
                             {"model.top_k", config.model.top_k, header.top_k},
                             {"train.sequence_length", train.sequence_length, header.positions},
                             {"train.global_batch_sequences", train.global_batch_sequences,
                              header.global_batch_sequences}});
  range_ = {header.first_step, header.sequences / header.global_batch_sequences};
}

std::vector<int32_t> RoutingTraceReader::read(int64_t batch_index, int64_t layer,
                                              SequenceRange range) const {
  const int64_t B = config_.train.global_batch_sequences, each = sequence_choices(config_);
  const int64_t offset = (batch_index + 1 - range_.first) % range_.steps;
  const int64_t step = offset < 0 ? offset + range_.steps : offset;
  const int64_t first = (layer * range_.steps + step) * B + range.first_sequence;
  std::vector<int32_t> ids(static_cast<size_t>(range.sequence_count * each));
  file_.read_range(kTracedIds, Hdf5Type::i32,
                   {static_cast<uint64_t>(first * each), static_cast<uint64_t>(ids.size())},
                   ids.data());
  check_choices(file_.path(), config_, layer, ids);
  return ids;
}

std::vector<std::vector<double>> traced_loads(const std::string& path, const Config& config) {
  const Hdf5Reader file(path);
  const TraceHeader header = read_header(file);
  const ModelConfig& model = config.model;
  check_rules(path, {{"model.layers", model.layers, header.layers},
                     {"model.experts", model.experts, header.experts},
                     {"model.top_k", model.top_k, header.top_k}});
  std::vector<std::vector<double>> loads(
      static_cast<size_t>(model.layers),
      std::vector<double>(static_cast<size_t>(model.experts), 0.0));
  const auto row = static_cast<uint64_t>(header.sequences * header.positions * header.top_k);
  std::vector<int32_t> ids(row);
  for (int64_t layer = 0; layer < model.layers; ++layer) {
    if (model.is_dense(layer)) continue;
    file.read_range(kTracedIds, Hdf5Type::i32, {static_cast<uint64_t>(layer) * row, row},
                    ids.data());
    check_choices(path, config, layer, ids);
    for (const int32_t id : ids) ++loads[static_cast<size_t>(layer)][static_cast<size_t>(id)];
  }
  return loads;
}

}  // namespace cambium
