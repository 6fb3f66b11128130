// The subcommands: plain options in, exit code out. cli.cc fills the options from the arguments.
//
// Results go to stdout, progress to stderr. A command that fails throws Error (error.h).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "src/cli/environment.h"
#include "src/train/plan_report.h"

namespace cambium {

enum class OutputFormat { text, json };
enum class ResumeChoice { fresh, resume };
enum class CheckpointAction { inspect, verify, export_hf, import_hf };

// CONFIG.toml and the --set texts over it, in order: for load_config (config.h).
struct ConfigSource {
  std::string path;
  std::vector<std::string> sets;
};

// cambium train CONFIG.toml [--set a.b=c]... [--out DIR] [--resume] [--stop-after-step N]
// [--profile STEP] [--trace-routing FILE [--trace-steps N]]
struct TrainOptions {
  ConfigSource config;
  std::string out;  // overrides run.out when not empty
  ResumeChoice resume = ResumeChoice::fresh;
  int64_t stop_after_step = 0;  // 0 = train.steps
  int64_t profile_step = 0;     // 0 = none
  std::string trace_routing;    // file; empty = none
  int64_t trace_steps = 1;      // the last ones of the run
  Environment environment;
};
int command_train(const TrainOptions& options);

// cambium check CONFIG.toml [--set a.b=c]... [--seeds N] [--json]
struct CheckOptions {
  ConfigSource config;
  int64_t seeds = 4;     // schedules to explore
  std::string schedule;  // not empty: this one instead, as a REPRO line has it
  OutputFormat format = OutputFormat::text;
  Environment environment;
};
int command_check(const CheckOptions& options);

// cambium plan CONFIG.toml --machine NAME|FILE [--ranks N] [--fold] [--trace FILE] [--timeline
// FILE.svg] [--set a.b=c]...
struct PlanOptions {
  ConfigSource config;
  std::string machine;
  int64_t ranks = 0;  // 0 = the configuration's
  Folding folding = Folding::off;
  std::string trace;     // file for the timeline; empty = none
  std::string timeline;  // file for its picture; empty = none
  OutputFormat format = OutputFormat::text;
};
int command_plan(const PlanOptions& options);

// cambium calibrate --out FILE [--device cpu|cuda]: measures this machine.
// cambium calibrate --links BASE --out FILE [--ranks N]: machine BASE with the times of collectives
// here, between this job's processes, or between N simulated ranks without a launcher.
// cambium calibrate --check FILE: its predictions against configurations that it was not fitted to.
struct CalibrateOptions {
  std::string out;
  std::string check;
  std::string device;  // "cpu" or "cuda"; empty = a GPU where there is one
  std::string links;   // a machine's name or file
  int64_t ranks = 4;
  Environment environment;
};
int command_calibrate(const CalibrateOptions& options);
int calibrate_links(const CalibrateOptions& options);  // src/cli/calibrate_links.cc

// Where a trained model lies: a run directory, a checkpoint (step-%08d), or a Hugging Face
// directory; the latter two take --tokenizer.
struct ModelSource {
  std::string path;
  std::string tokenizer;  // "bytes" or a SentencePiece .model; empty = the run's own
  std::string device;     // "cpu" or "cuda"; empty = the run's own
};

// cambium eval MODEL [--data FILE]... [--sequences N] [--sequence-length S] [--json]
struct EvalOptions {
  ModelSource model;
  std::vector<std::string> data;  // empty = the run's validation corpus
  int64_t sequences = 0;          // 0 = all
  int64_t sequence_length = 0;    // 0 = the run's
  int64_t workers = 0;            // 0 = the machine's cores
  OutputFormat format = OutputFormat::text;
};
int command_eval(const EvalOptions& options);

// cambium generate MODEL [--prompt TEXT] [--tokens N] [--temperature T] [--top-k K] [--seed N]
struct GenerateOptions {
  ModelSource model;
  std::string prompt;
  int64_t tokens = 200;
  double temperature = 0.8;  // 0 = the likeliest token
  int64_t top_k = 0;         // 0 = the whole vocabulary
  uint64_t seed = 1;
  int64_t workers = 0;
  OutputFormat format = OutputFormat::text;
};
int command_generate(const GenerateOptions& options);

// cambium data build INPUT... --out FILE.h5 [--tokenizer bytes|FILE.model]
struct DataBuildOptions {
  std::vector<std::string> inputs;
  std::string out;
  std::string tokenizer = "bytes";
  OutputFormat format = OutputFormat::text;
};
int command_data_build(const DataBuildOptions& options);

// cambium data inspect FILE.h5, cambium tokenizer inspect FILE.model, cambium report RUN, ...
struct InspectOptions {
  std::string path;
  OutputFormat format = OutputFormat::text;
};
int command_data_inspect(const InspectOptions& options);

// cambium tokenizer train INPUT... --out FILE.model [--vocab N]
struct TokenizerTrainOptions {
  std::vector<std::string> inputs;
  std::string out;
  int64_t vocab = 1024;
  OutputFormat format = OutputFormat::text;
};
int command_tokenizer_train(const TokenizerTrainOptions& options);
int command_tokenizer_inspect(const InspectOptions& options);

// cambium checkpoint inspect|verify PATH; export-hf PATH OUT; import-hf HF_DIR OUT
struct CheckpointOptions {
  CheckpointAction action = CheckpointAction::inspect;
  std::string path;
  std::string out;               // export-hf, import-hf
  std::string storage = "fp32";  // export-hf: fp32 | bf16
  OutputFormat format = OutputFormat::text;
};
int command_checkpoint(const CheckpointOptions& options);

// cambium parity DIR [--device cpu|cuda] [--set a.b=c]... [--json]
struct ParityOptions {
  std::string directory;
  std::string device = "cpu";
  std::vector<std::string> sets;
  OutputFormat format = OutputFormat::text;
};
int command_parity(const ParityOptions& options);

// cambium compare RUN_A RUN_B [--json]: 0 when equal, 51 at the first differing step and tensor.
struct CompareOptions {
  std::string run_a;
  std::string run_b;
  OutputFormat format = OutputFormat::text;
};
int command_compare(const CompareOptions& options);

// cambium config show CONFIG.toml [--set a.b=c]... [--json]; cambium config schema [--json]
struct ConfigShowOptions {
  ConfigSource config;
  OutputFormat format = OutputFormat::text;
};
int command_config_show(const ConfigShowOptions& options);
int command_config_schema(OutputFormat format);

// cambium doctor [--json]: what this machine offers.
int command_doctor(OutputFormat format);

// cambium report RUN: writes RUN/report.html and prints its path.
int command_report(const InspectOptions& options);

}  // namespace cambium
