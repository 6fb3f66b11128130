// cambium train: run directory, data, ranks, and what a finished run leaves behind.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <ctime>
#include <filesystem>
#include <optional>

#include "src/cli/commands.h"
#include "src/cli/launch.h"
#include "src/cli/model_source.h"
#include "src/config/faults.h"
#include "src/data/ngram.h"
#include "src/train/generate.h"
#include "src/train/report.h"
#include "src/train/train_run.h"

namespace cambium {

namespace {

// NOTE: a signal handler can reach nothing but a global.
volatile std::sig_atomic_t stop_signal_received = 0;  // tidy: allow global: the only one

void on_stop_signal(int signal_number) { stop_signal_received = signal_number; }

void install_signal_handlers() {
  struct sigaction action {};
  action.sa_handler = on_stop_signal;
  action.sa_flags = SA_RESTART;
  sigaction(SIGTERM, &action, nullptr);
  sigaction(SIGINT, &action, nullptr);
}

std::string utc_now(const char* format) {
  const std::time_t now = std::time(nullptr);
  std::tm parts{};
  gmtime_r(&now, &parts);
  char text[64];
  std::strftime(text, sizeof text, format, &parts);
  return text;
}

std::string run_directory(const TrainOptions& options, const Config& config) {
  if (!options.out.empty()) return options.out;
  if (!config.run.out.empty()) return config.run.out;
  return fmt::format("runs/{}-{}", config.name, utc_now("%Y%m%d-%H%M%S"));
}

void refuse_faults(const Config& config) {
  for (const FaultConfig& fault : config.faults) {
    if (fault.kind != "missing_wait") continue;
    fail(ExitCode::usage, "faults.kind = missing_wait needs race detection; next: `cambium check`");
  }
  if (config.faults.empty() || config.run.allow_faults) return;
  fail(ExitCode::usage,
       "[[faults]] injects '{}': train refuses it unless run.allow_faults = true; next: "
       "`cambium check` shows what a fault does",
       config.faults.front().kind);
}

// The run directory, held: new and empty, or an existing one to resume.
struct RunDirectory {
  RunDirectory(FileSystem& files, const std::string& path, ResumeChoice resume) {
    const bool exists = files.kind(path) != EntryKind::missing;
    if (exists && resume == ResumeChoice::fresh) {
      fail(ExitCode::directory_in_use,
           "run directory '{}' exists; next: --resume to go on, or another --out", path);
    }
    files.make_directories(path);
    lock.emplace(files, path);
    prepare_checkpoints(files, checkpoint_directory(path));
    if (resume == ResumeChoice::fresh) return;
    NewestCheckpoint newest = open_newest_checkpoint(files, checkpoint_directory(path));
    for (const std::string& warning : newest.warnings) fmt::print(stderr, "{}\n", warning);
    reader = std::move(newest.reader);
    if (reader == nullptr) {
      fmt::print(stderr, "resume: '{}' has no completed checkpoint; starting at step 0\n", path);
    } else {
      fmt::print(stderr, "resume: from step {}\n", reader->state().step);
    }
  }
  std::optional<DirectoryLock> lock;
  std::unique_ptr<CheckpointReader> reader;
};

void check_resume(const CheckpointReader& reader, const Config& config) {
  const Config saved = parse_config(reader.state().config, reader.path(), {});
  const std::vector<std::string> differing = resume_differences(saved, config);
  if (!differing.empty()) {
    fail(ExitCode::usage,
         "--resume: {} differs from the saved run's; next: the saved value, or a new --out",
         differing.front());
  }
  if (reader.state().step > config.train.steps) {
    fail(ExitCode::usage, "--resume: the checkpoint is at step {}, beyond train.steps = {}",
         reader.state().step, config.train.steps);
  }
}

std::string processor_name() {
  std::string model = "unknown";
  if (std::FILE* file = std::fopen("/proc/cpuinfo", "r"); file != nullptr) {
    char line[256];
    while (std::fgets(line, sizeof line, file) != nullptr) {
      const std::string text = line;
      if (text.starts_with("model name")) {
        model = text.substr(text.find(':') + 2);
        model.pop_back();
        break;
      }
    }
    std::fclose(file);
  }
  return model;
}

RunRecord run_record(const Config& config, const Derived& derived, Transport transport,
                     const std::string& resolved) {
  RunRecord record;
  record.name = config.name;
  record.build = fmt::format("g++ {}, {}", __VERSION__, kHasCuda ? "cuda" : "cpu");
  record.machine = fmt::format("{}, {} cores", processor_name(), worker_threads(0));
  record.config_hash = xxh3_128(resolved.data(), resolved.size()).hex();
  record.layout = layout_text(config);
  record.transport = choice_name(transport);
  record.device = choice_name(config.run.device);
  record.reduction = config.numerics.reduction == ReductionMode::exact ? "exact" : "fast";
  record.start_time = utc_now("%Y-%m-%dT%H:%M:%SZ");
  record.seed = config.run.seed;
  record.ranks = derived.ranks;
  record.workers = worker_threads(config.run.workers);
  record.steps = config.train.steps;
  record.parameters = derived.parameters;
  record.active_parameters = derived.active_parameters;
  return record;
}

struct LoadedData {
  TrainingData data;
  std::unique_ptr<CorpusSequences> train, validation;
  int64_t validation_batches = 0;
};

LoadedData load_data(const Config& config) {
  LoadedData loaded{open_data(data_options(config)), nullptr, nullptr, 0};
  BatchOptions options;
  options.sequence_length = config.train.sequence_length;
  options.global_batch_sequences = config.train.global_batch_sequences;
  options.document_mask = config.data.document_mask ? DocumentMask::on : DocumentMask::off;
  options.seed = config.run.seed;
  loaded.train = std::make_unique<CorpusSequences>(BatchSource(loaded.data.train, options));
  if (loaded.data.validation.token_count() > config.train.sequence_length) {
    options.order = BatchOrder::spread;
    options.sequence_limit = config.train.eval_sequences;
    loaded.validation =
        std::make_unique<CorpusSequences>(BatchSource(loaded.data.validation, options));
    loaded.validation_batches = loaded.validation->source().spread_batches();
  }
  return loaded;
}

// Samples, baselines and the report, from the newest checkpoint: also what --resume of a finished
// run completes.
void finish_outputs(const Config& config, const std::string& directory, FileSystem& files,
                    const LoadedData& data, const TrainOutcome& outcome, RunRecord record) {
  if (config.train.sample_tokens > 0) {
    NewestCheckpoint newest = open_newest_checkpoint(files, checkpoint_directory(directory));
    CHECK(newest.reader != nullptr);
    GenerateRequest request;
    request.tokens = config.train.sample_tokens;
    request.seed = config.run.seed;
    request.at_document_end = DocumentEnd::go_on;
    const std::string text = generate_text(config, *newest.reader, data.data.tokenizer, request);
    files.write_file_atomic(directory + "/samples.txt",
                            fmt::format("step {}:\n{}\n", outcome.step, text));
    fmt::print("sample: {}\n", text);
  }
  if (data.validation != nullptr && outcome.reason == StopReason::finished) {
    const NgramBaselines baselines =
        ngram_baselines(data.data.train, data.validation->source(), data.data.tokenizer.vocab());
    record.unigram_loss = baselines.unigram_nats;
    record.bigram_loss = baselines.bigram_nats;
    if (!std::isnan(outcome.validation_loss)) {
      fmt::print("validation loss: {:.4f} nats/token; smoothed unigram {:.4f}, bigram {:.4f}\n",
                 outcome.validation_loss, baselines.unigram_nats, baselines.bigram_nats);
    }
  }
  write_run_record(directory, record);
}

// The exit event, then the report, which shows it. Returns the exit code.
int end_run(MetricsWriter& metrics, const std::string& directory, const TrainOutcome& outcome,
            const std::string& resume) {
  const bool stopped = outcome.reason == StopReason::signal;
  const bool finished = outcome.reason == StopReason::finished;
  const ExitCode code = stopped ? ExitCode::stopped_by_signal : ExitCode::done;
  metrics.write_exit({static_cast<int>(code),
                      stopped    ? "stopped by signal"
                      : finished ? "finished"
                                 : "stopped after step",
                      finished ? "" : resume});
  write_report(directory);
  fmt::print("report: {}/report.html\n", directory);
  if (stopped) {
    fmt::print(stderr, "stopped by signal after step {}; resume: {}\n", outcome.step, resume);
  }
  return static_cast<int>(code);
}

void print_drawn_faults(const Config& given, const Config& drawn) {
  const auto may_strike = [](const FaultConfig& fault) { return fault.probability > 0; };
  if (std::ranges::none_of(given.faults, may_strike)) return;
  fmt::print(stderr, "faults drawn from seed {}: {} strike\n", given.run.seed, drawn.faults.size());
  for (const FaultConfig& fault : drawn.faults) {
    fmt::print(stderr, "  {}\n", describe_fault(fault));
  }
}

// What a run of this process is made of, on every rank.
struct TrainPlan {
  const TrainOptions& options;
  const Config& config;
  const Derived& derived;
  Job* job;  // null = all ranks are simulated here
  int64_t last_step() const {
    const int64_t steps = config.train.steps;
    return options.stop_after_step > 0 ? std::min(options.stop_after_step, steps) : steps;
  }
  // Steps whose routing is traced, of a run that has done `done`.
  TracedSteps traced_steps(int64_t done) const {
    const int64_t steps = std::min(options.trace_steps, last_step() - done);
    return {last_step() - steps + 1, steps};
  }
};

// Runs this process's ranks, and returns what rank 0, or this one, ended with.
TrainOutcome run_ranks(const TrainPlan& plan, const LoadedData& data, TrainRun run) {
  install_signal_handlers();
  const int64_t first_step = run.resume == nullptr ? 0 : run.resume->state().step;
  Config config = plan.config;
  config.faults = drawn_faults(config, {first_step, plan.last_step()});
  print_drawn_faults(plan.config, config);
  run.config = &config;
  run.derived = &plan.derived;
  run.train = data.train.get();
  run.validation = data.validation.get();
  run.validation_batches = data.validation_batches;
  run.last_step = plan.last_step();
  run.profile_step = plan.options.profile_step;
  if (!plan.options.trace_routing.empty()) {
    run.trace_from = plan.traced_steps(run.resume == nullptr ? 0 : run.resume->state().step).first;
  }
  run.stop_signal = &stop_signal_received;
  const auto gpus = static_cast<double>(plan.job == nullptr ? 1 : plan.job->ranks());
  run.peak_flops_per_s = gpus * peak_flops_per_s(plan.config.run.device);
  TrainOutcome outcome;
  launch_ranks({.job = plan.job,
                .ranks = plan.derived.ranks,
                .device = plan.config.run.device,
                .workers = plan.config.run.workers,
                .faults = config.faults,
                .fast_order = config.numerics.fast_order,
                .watchdog_s = plan.config.run.watchdog_s,
                // A profile names each op's launch.
                .cuda_graphs = plan.config.run.cuda_graphs && run.profile_step == 0},
               [&](RankEnvironment& environment) {
                 const TrainOutcome own = train_rank(environment, run);
                 if (plan.job != nullptr || environment.rank() == 0) outcome = own;
               });
  return outcome;
}

// Names under which rank 0 publishes what it found, once the corpus is built and the run directory
// is its own: the directory, and the checkpoint to go on from.
constexpr const char* kDirectoryName = "run directory";
constexpr const char* kCheckpointName = "checkpoint";

// A process whose rank is not 0: it writes its shards of checkpoints and nothing else.
int train_other_rank(const TrainPlan& plan) {
  const std::string directory = plan.job->await(kDirectoryName);
  const std::string checkpoint = plan.job->await(kCheckpointName);
  FileSystem files;
  const LoadedData data = load_data(plan.config);
  std::unique_ptr<CheckpointReader> reader;
  if (!checkpoint.empty()) {
    reader = std::make_unique<CheckpointReader>(files, checkpoint, ShardCheck::at_first_read);
  }
  const TrainOutcome outcome = run_ranks(plan, data,
                                         {.resolved_config = resolved_toml(plan.config),
                                          .directory = directory,
                                          .files = &files,
                                          .resume = reader.get()});
  return static_cast<int>(outcome.reason == StopReason::signal ? ExitCode::stopped_by_signal
                                                               : ExitCode::done);
}

void print_trace(const RoutingTraceWriter& trace, const std::string& path,
                 const TrainOutcome& outcome) {
  const int64_t first = trace.range().first, last = first + trace.range().steps - 1;
  if (trace.is_complete()) {
    fmt::print("routing trace: {}, steps {} to {}\n", path, first, last);
  } else {
    fmt::print(stderr, "routing trace: stopped after step {} of {} to {}: '{}' is not written\n",
               outcome.step, first, last, path);
  }
}

int train_first_rank(const TrainPlan& plan) {
  const Config& config = plan.config;
  const TrainOptions& options = plan.options;
  const Transport transport = plan.job == nullptr ? Transport::sim : Transport::nccl;
  const std::string directory = run_directory(options, config);
  fmt::print("transport: {}, {} ranks ({}) on {}\nrun: {}\n", choice_name(transport),
             plan.derived.ranks, layout_text(config), device_name(config.run.device), directory);
  std::fflush(stdout);
  const LoadedData data = load_data(config);
  FileSystem files;
  RunDirectory run_files(files, directory, options.resume);
  CheckpointReader* const reader = run_files.reader.get();
  if (reader != nullptr) check_resume(*reader, config);
  if (plan.job != nullptr) {
    plan.job->publish(kDirectoryName, directory);
    plan.job->publish(kCheckpointName, reader == nullptr ? "" : reader->path());
  }
  const std::string resolved = resolved_toml(config);
  files.write_file_atomic(directory + "/config.resolved.toml", resolved);
  const RunRecord record = run_record(config, plan.derived, transport, resolved);
  write_run_record(directory, record);
  const int64_t first_step = reader == nullptr ? 0 : reader->state().step;
  std::optional<RoutingTraceWriter> trace;
  if (!options.trace_routing.empty()) {
    const TracedSteps range = plan.traced_steps(first_step);
    if (range.steps < 1) {
      fail(ExitCode::usage, "--trace-routing: the run is at step {} of {}: none is left to trace",
           first_step, plan.last_step());
    }
    trace.emplace(files, options.trace_routing, config, range);
  }
  MetricsWriter metrics(directory, first_step,
                        config.logging.tensorboard ? EventFiles::on : EventFiles::off);
  Progress progress(
      {.first_step = first_step,
       .total_steps = plan.last_step(),
       .style = stderr_progress_style(),
       .color = options.environment.get("NO_COLOR").empty() ? Color::on : Color::off});
  const std::string resume =
      fmt::format("cambium train {} --out {} --resume", options.config.path, directory);
  TrainOutcome outcome;
  try {
    outcome = run_ranks(plan, data,
                        {.resolved_config = resolved,
                         .directory = directory,
                         .files = &files,
                         .resume = reader,
                         .routing_trace = trace.has_value() ? &*trace : nullptr,
                         .metrics = &metrics,
                         .progress = &progress});
    progress.finish();
    if (trace.has_value()) print_trace(*trace, options.trace_routing, outcome);
    if (outcome.reason != StopReason::signal) {
      finish_outputs(config, directory, files, data, outcome, record);
    }
  } catch (const Error& error) {
    metrics.write_exit({static_cast<int>(error.exit_code()), error.what(), resume});
    throw;
  }
  return end_run(metrics, directory, outcome, resume);
}

}  // namespace

int command_train(const TrainOptions& options) {
  const Config config = load_config(options.config.path, options.config.sets);
  const Derived derived = derive(config);
  refuse_faults(config);
  if (config.balance.routing == RoutingChoice::replay) RoutingTraceReader{config};
  if (options.profile_step > 0 && config.run.device != DeviceKind::cuda) {
    fail(ExitCode::usage,
         "--profile brackets a step for a GPU profiler, but run.device = cpu; next: run.device = "
         "cuda, under `nsys profile --capture-range=cudaProfilerApi`");
  }
  const int ranks = static_cast<int>(derived.ranks);
  const Transport transport = resolve_transport(options.environment, config, ranks);
  std::unique_ptr<Job> job;
  if (transport == Transport::nccl) job = join_job(options.environment, config, ranks);
  const TrainPlan plan{options, config, derived, job.get()};
  try {
    require_device(config.run.device, derived.state_bytes / (job == nullptr ? 1 : ranks));
    return job == nullptr || job->rank() == 0 ? train_first_rank(plan) : train_other_rank(plan);
  } catch (const Error& error) {
    if (job != nullptr) job->announce_failure(error.exit_code(), error.what());
    throw;
  }
}

}  // namespace cambium
