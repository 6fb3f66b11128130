#include "src/train/metrics_writer.h"

#include <fcntl.h>

#include <cerrno>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <utility>
#include <vector>

#include "src/base/check.h"
#include "src/base/io.h"
#include "src/train/event_file.h"
#include "src/train/progress.h"

namespace cambium {
namespace {

using Json = nlohmann::ordered_json;

constexpr int64_t kMostBytes = int64_t{8} << 30;  // of a metrics file that is read back

// NOTE: JSON has no NaN and no infinities; a null with its spelling beside it keeps them apart from
// an absent number.
void put_number(Json& object, const char* key, double value) {
  if (std::isfinite(value)) {
    object[key] = value;
    return;
  }
  object[key] = nullptr;
  object["non_finite"][key] = std::isnan(value) ? "nan" : value > 0 ? "inf" : "-inf";
}

void put_optional(Json& object, const char* key, const std::optional<double>& value) {
  if (value.has_value()) put_number(object, key, *value);
}

void put_text(Json& object, const char* key, const std::string& value) {
  if (!value.empty()) object[key] = value;
}

Json step_json(const StepMetrics& metrics) {
  Json object;
  object["step"] = metrics.step;
  put_number(object, "loss", metrics.loss);
  object["tokens"] = metrics.tokens;
  put_number(object, "grad_norm", metrics.grad_norm);
  put_number(object, "lr", metrics.lr);
  put_number(object, "step_ms", metrics.step_ms);
  put_number(object, "tokens_per_s", metrics.tokens_per_s);
  put_optional(object, "mfu", metrics.mfu);
  if (metrics.peak_memory_bytes.has_value()) {
    object["peak_memory_bytes"] = *metrics.peak_memory_bytes;
  }
  put_text(object, "digest", metrics.digest);
  put_optional(object, "validation_loss", metrics.validation_loss);
  put_optional(object, "balance_loss", metrics.balance_loss);
  put_optional(object, "z_loss", metrics.z_loss);
  object["expert_load"] = metrics.expert_load;
  return object;
}

std::vector<Scalar> step_scalars(const StepMetrics& metrics) {
  std::vector<Scalar> scalars = {
      {"train/loss", metrics.loss},
      {"train/grad_norm", metrics.grad_norm},
      {"train/lr", metrics.lr},
      {"speed/step_ms", metrics.step_ms},
      {"speed/tokens_per_s", metrics.tokens_per_s},
  };
  const auto add = [&](const char* tag, const std::optional<double>& value) {
    if (value.has_value()) scalars.push_back({tag, *value});
  };
  add("speed/mfu", metrics.mfu);
  add("validation/loss", metrics.validation_loss);
  add("train/balance_loss", metrics.balance_loss);
  add("train/z_loss", metrics.z_loss);
  for (size_t layer = 0; layer < metrics.expert_load.size(); ++layer) {
    if (metrics.expert_load[layer].empty()) continue;
    scalars.push_back({fmt::format("expert_imbalance/layer_{}", layer),
                       expert_imbalance({metrics.expert_load[layer]})});
  }
  return scalars;
}

// The step of a line; -1 for an exit event and for a line that is torn or damaged.
int64_t line_step(const std::string& line, Json& object) {
  object = Json::parse(line, nullptr, /*allow_exceptions=*/false);
  if (!object.is_object() || !object.contains("step")) return -1;
  const Json& step = object["step"];
  return step.is_number_integer() ? step.get<int64_t>() : -1;
}

// The whole lines of `text` with 0 <= step <= last_step, in order; `last` becomes the last of them.
std::string kept_lines(const std::string& text, int64_t last_step, Json& last) {
  std::string kept;
  size_t start = 0;
  for (size_t end = text.find('\n'); end != std::string::npos; end = text.find('\n', start)) {
    const std::string line = text.substr(start, end - start);
    start = end + 1;
    Json object;
    const int64_t step = line_step(line, object);
    if (step < 0 || step > last_step) continue;
    kept += line + '\n';
    last = std::move(object);
  }
  return kept;
}

// Cuts `path` back to the lines up to `last_step` and opens it for appending.
File reopen(FileSystem& files, const std::string& path, int64_t last_step, Json& last) {
  if (files.kind(path) == EntryKind::missing) return files.create(path);
  const std::string text = files.read_file(path, kMostBytes, Symlinks::follow);
  const std::string kept = kept_lines(text, last_step, last);
  if (kept != text) files.write_file_atomic(path, kept);
  const int descriptor = ::open(path.c_str(), O_WRONLY | O_APPEND | O_CLOEXEC);
  if (descriptor < 0) {
    fail(ExitCode::io, "{}: cannot open for appending: {}", path, std::strerror(errno));
  }
  return File(descriptor, path);
}

void append_line(FileSystem& files, File& file, const Json& object) {
  const std::string line = object.dump() + '\n';
  files.write(file, std::as_bytes(std::span(line)));
}

}  // namespace

struct MetricsWriter::State {
  FileSystem files;
  File metrics;
  File digests;
  std::unique_ptr<EventFile> events;
  Json last_digests;  // the last line kept from an earlier attempt; null without one
  int64_t last_step = 0;
};

MetricsWriter::MetricsWriter(const std::string& run_directory, int64_t resume_step,
                             EventFiles event_files)
    : state_(std::make_unique<State>()) {
  CHECK_GE(resume_step, 0);
  State& state = *state_;
  Json last_metrics;
  // Step lines begin at 1, so that a resume at 0 keeps none; digests begin at 0.
  state.metrics = reopen(state.files, run_directory + "/metrics.jsonl", resume_step, last_metrics);
  state.digests =
      reopen(state.files, run_directory + "/digests.jsonl", resume_step, state.last_digests);
  state.last_step = resume_step;
  if (event_files == EventFiles::on) {
    state.events = std::make_unique<EventFile>(state.files, run_directory, resume_step + 1);
  }
}

MetricsWriter::~MetricsWriter() = default;

void MetricsWriter::write_step(const StepMetrics& metrics) {
  CHECK_GT(metrics.step, state_->last_step);
  state_->last_step = metrics.step;
  append_line(state_->files, state_->metrics, step_json(metrics));
  if (state_->events != nullptr) state_->events->write(metrics.step, step_scalars(metrics));
}

void MetricsWriter::write_digests(const StepDigests& digests) {
  Json object;
  object["step"] = digests.step;
  object["digests"] = digests.digests;
  const Json& last = state_->last_digests;
  if (last.is_object() && last["step"] == digests.step) {
    if (last == object) return;
    fail(ExitCode::verification_mismatch,
         "{}: step {} has other parameter digests than when it was saved: the loaded state is not "
         "the saved one; `cambium checkpoint verify` names the damaged file",
         state_->digests.path(), digests.step);
  }
  append_line(state_->files, state_->digests, object);
}

void MetricsWriter::write_exit(const ExitEvent& event) {
  Json object;
  object["event"] = "exit";
  object["code"] = event.code;
  object["reason"] = event.reason;
  if (event.resume.empty()) {
    object["resume"] = nullptr;
  } else {
    object["resume"] = event.resume;
  }
  append_line(state_->files, state_->metrics, object);
}

void write_run_record(const std::string& run_directory, const RunRecord& record) {
  Json object;
  put_text(object, "name", record.name);
  put_text(object, "build", record.build);
  put_text(object, "machine", record.machine);
  put_text(object, "config_hash", record.config_hash);
  put_text(object, "layout", record.layout);
  put_text(object, "transport", record.transport);
  put_text(object, "device", record.device);
  put_text(object, "reduction", record.reduction);
  put_text(object, "start_time", record.start_time);
  object["seed"] = record.seed;
  object["ranks"] = record.ranks;
  object["workers"] = record.workers;
  object["steps"] = record.steps;
  object["parameters"] = record.parameters;
  object["active_parameters"] = record.active_parameters;
  put_optional(object, "unigram_loss", record.unigram_loss);
  put_optional(object, "bigram_loss", record.bigram_loss);
  FileSystem files;
  files.write_file_atomic(run_directory + "/run.json", object.dump(2) + '\n');
}

}  // namespace cambium
