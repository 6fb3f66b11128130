// From arguments to a command's options: one `declare_and_run` per subcommand, and the dispatch.
//
// CLI11 parses the arguments of one subcommand; its own exit codes become 2, and a misspelt
// subcommand or flag is answered with the nearest one.
#include "src/cli/cli.h"

#include <cmath>

#include "CLI/CLI.hpp"
#include "fmt/format.h"
#include "src/base/error.h"
#include "src/cli/commands.h"
#include "src/config/nearest.h"

namespace cambium {

namespace {

// The arguments after the subcommand's name, and what every command may need.
struct Invocation {
  const std::vector<std::string>& arguments;
  const Environment& environment;
};

// --help was asked for and printed: the command does not run.
struct HelpShown {};

std::string first_unexpected(const CLI::App& app) {
  const std::vector<std::string> rest = app.remaining(true);
  for (const std::string& argument : rest) {
    if (argument.size() > 1 && argument.front() == '-') return argument;
  }
  return rest.empty() ? "" : rest.front();
}

[[noreturn]] void refuse_unexpected(const CLI::App& app) {
  const std::string argument = first_unexpected(app);
  if (argument.empty() || argument.front() != '-') {
    fail(ExitCode::usage, "{}: unexpected argument '{}'; see {} --help", app.get_name(), argument,
         app.get_name());
  }
  const std::string bare = argument.substr(0, argument.find('='));
  std::vector<std::string> flags;
  for (const CLI::Option* option : app.get_options()) {
    for (const std::string& name : option->get_lnames()) flags.push_back("--" + name);
  }
  const std::string nearest = nearest_name(bare, flags);
  fail(ExitCode::usage, "{}: unknown flag {}{}; see {} --help", app.get_name(), bare,
       nearest.empty() ? "" : fmt::format("; did you mean {}?", nearest), app.get_name());
}

// Parses, or throws Error (exit 2) or HelpShown.
void parse(CLI::App& app, const Invocation& invocation) {
  // CLI11 wants the arguments last first.
  std::vector<std::string> reversed(invocation.arguments.rbegin(), invocation.arguments.rend());
  try {
    app.parse(reversed);
  } catch (const CLI::CallForHelp&) {
    fmt::print("{}", app.help());
    throw HelpShown{};
  } catch (const CLI::ExtrasError&) {
    refuse_unexpected(app);
  } catch (const CLI::ParseError& error) {
    // A missing argument beside a misspelt flag: the flag is the cause.
    const std::string unexpected = first_unexpected(app);
    if (!unexpected.empty() && unexpected.front() == '-') refuse_unexpected(app);
    fail(ExitCode::usage, "{}: {}; see {} --help", app.get_name(), error.what(), app.get_name());
  }
}

std::string example(const char* text) { return fmt::format("Example:\n  {}", text); }

void add_config(CLI::App& app, ConfigSource& source) {
  app.add_option("CONFIG", source.path, "configuration, a TOML file")->required();
  app.add_option("--set", source.sets,
                 "section.key=value over the file's; may be given again, a later one wins")
      ->type_size(1)
      ->allow_extra_args(false)
      ->type_name("SECTION.KEY=VALUE");
}

void add_json(CLI::App& app, OutputFormat& format) {
  app.add_flag_callback(
      "--json", [&format] { format = OutputFormat::json; }, "one JSON object on stdout");
}

void add_model(CLI::App& app, ModelSource& model) {
  app.add_option("MODEL", model.path, "run directory, checkpoint, or Hugging Face directory")
      ->required();
  app.add_option("--tokenizer", model.tokenizer,
                 "bytes, or a SentencePiece .model; default: the run's own");
  app.add_option("--device", model.device, "cpu | cuda; default: the run's own")
      ->check(CLI::IsMember({"cpu", "cuda"}));
}

template <class Number>
CLI::Option* add_number(CLI::App& app, const char* flag, Number& number, const char* meaning) {
  return app.add_option(flag, number, meaning)->capture_default_str();
}

CLI::Range positive() { return CLI::Range(int64_t{1}, int64_t{1'000'000'000}); }
CLI::Range not_negative() { return CLI::Range(int64_t{0}, int64_t{1'000'000'000}); }

int run_train(const Invocation& invocation) {
  TrainOptions options;
  options.environment = invocation.environment;
  CLI::App app(
      "Train a model. Every rank is simulated in this process, unless srun, mpirun or "
      "torchrun started one process per rank.",
      "cambium train");
  add_config(app, options.config);
  app.add_option("--out", options.out, "run directory; default runs/<name>-<UTC time>")
      ->type_name("DIR");
  app.add_flag_callback(
      "--resume", [&] { options.resume = ResumeChoice::resume; },
      "go on from the newest good checkpoint of the run directory");
  app.add_option("--stop-after-step", options.stop_after_step, "save after this step, and end")
      ->check(positive());
  app.add_option("--profile", options.profile_step,
                 "bracket this step for a GPU profiler, with NVTX ranges of stages and ops")
      ->type_name("STEP")
      ->check(positive());
  CLI::Option* const trace =
      app.add_option("--trace-routing", options.trace_routing,
                     "write the experts and weights of every token of the last step (HDF5)")
          ->type_name("FILE");
  app.add_option("--trace-steps", options.trace_steps, "how many last steps --trace-routing keeps")
      ->needs(trace)
      ->check(positive());
  app.footer(example("cambium train configs/quickstart.toml --set train.steps=100 --out runs/a"));
  parse(app, invocation);
  return command_train(options);
}

int run_check(const Invocation& invocation) {
  CheckOptions options;
  options.environment = invocation.environment;
  CLI::App app(
      "Prove a configuration before spending time on it: the same bits as one rank, "
      "matching collectives, no deadlock, any number of threads.",
      "cambium check");
  add_config(app, options.config);
  add_number(app, "--seeds", options.seeds, "schedules to explore")->check(positive());
  app.add_option("--schedule", options.schedule, "replay this schedule, as a REPRO line has it");
  add_json(app, options.format);
  app.footer(example("cambium check configs/quickstart.toml"));
  parse(app, invocation);
  return command_check(options);
}

int run_plan(const Invocation& invocation) {
  PlanOptions options;
  CLI::App app("Predict step time, memory and exposed communication on a machine.", "cambium plan");
  add_config(app, options.config);
  app.add_option("--machine", options.machine, "machine name or file; default plan.machine");
  add_number(app, "--ranks", options.ranks, "scale parallel.dp to so many ranks; 0 = as given")
      ->check(not_negative());
  app.add_flag_callback(
      "--fold", [&] { options.folding = Folding::on; },
      "let one rank of a pipeline stage stand for all of them; refused where they differ");
  app.add_option("--timeline", options.timeline, "write the timeline as a picture (SVG)")
      ->type_name("FILE");
  app.add_option("--trace", options.trace, "write the timeline, for ui.perfetto.dev")
      ->type_name("FILE");
  add_json(app, options.format);
  app.footer(example("cambium plan configs/quickstart.toml --machine laptop"));
  parse(app, invocation);
  return command_plan(options);
}

int run_calibrate(const Invocation& invocation) {
  CalibrateOptions options;
  CLI::App app("Measure this machine into a machine file.", "cambium calibrate");
  auto* out = app.add_option("--out", options.out, "machine file to write")->type_name("FILE");
  app.add_option("--check", options.check,
                 "compare a machine file's predictions with steps that it was not fitted to")
      ->type_name("FILE")
      ->excludes(out);
  app.add_option("--device", options.device, "cpu or cuda; default: a GPU where there is one")
      ->check(CLI::IsMember({"cpu", "cuda"}));
  auto* links = app.add_option("--links", options.links,
                               "measure collectives alone, between this job's processes (torchrun, "
                               "srun, mpirun: one GPU each), and write this machine with them")
                    ->type_name("NAME|FILE")
                    ->needs(out);
  add_number(app, "--ranks", options.ranks, "of --links without a launcher: simulated ranks")
      ->check(CLI::Range(2, 1024))
      ->needs(links);
  app.footer(example("cambium calibrate --out laptop.toml"));
  parse(app, invocation);
  options.environment = invocation.environment;
  return command_calibrate(options);
}

int run_eval(const Invocation& invocation) {
  EvalOptions options;
  CLI::App app("Loss, perplexity and bits per byte of a trained model.", "cambium eval");
  add_model(app, options.model);
  app.add_option("--data", options.data, "corpus; default: the run's validation corpus")
      ->type_size(1)
      ->allow_extra_args(false)
      ->type_name("FILE");
  add_number(app, "--sequences", options.sequences, "sequences to evaluate; 0 = all")
      ->check(not_negative());
  add_number(app, "--sequence-length", options.sequence_length, "tokens of one; 0 = the run's")
      ->check(not_negative());
  add_number(app, "--workers", options.workers, "worker threads; 0 = this machine's cores")
      ->check(not_negative());
  add_json(app, options.format);
  app.footer(example("cambium eval runs/a --sequences 64"));
  parse(app, invocation);
  return command_eval(options);
}

int run_generate(const Invocation& invocation) {
  GenerateOptions options;
  CLI::App app("Write text with a trained model.", "cambium generate");
  add_model(app, options.model);
  app.add_option("--prompt", options.prompt, "text to go on from");
  add_number(app, "--tokens", options.tokens, "tokens to write")->check(positive());
  add_number(app, "--temperature", options.temperature, "0 = the likeliest token")
      ->check(CLI::Range(0.0, 100.0));
  add_number(app, "--top-k", options.top_k, "draw among the K likeliest; 0 = all")
      ->check(not_negative());
  add_number(app, "--seed", options.seed, "seed of the draws");
  add_number(app, "--workers", options.workers, "worker threads; 0 = this machine's cores")
      ->check(not_negative());
  add_json(app, options.format);
  app.footer(example("cambium generate runs/a --prompt \"It is a truth\" --tokens 100"));
  parse(app, invocation);
  if (!std::isfinite(options.temperature)) {  // NOTE: CLI::Range lets NaN through
    fail(ExitCode::usage, "{}: --temperature is not a finite number", app.get_name());
  }
  return command_generate(options);
}

int run_data_build(const Invocation& invocation) {
  DataBuildOptions options;
  CLI::App app("Turn text or JSONL (also .zst) into a token file.", "cambium data build");
  app.add_option("INPUT", options.inputs, "text or JSONL files")->required();
  app.add_option("--out", options.out, "token file to write (.h5)")->required();
  app.add_option("--tokenizer", options.tokenizer, "bytes, or a SentencePiece .model")
      ->capture_default_str();
  add_json(app, options.format);
  app.footer(example("cambium data build novels.txt --out novels.h5 --tokenizer novels.model"));
  parse(app, invocation);
  return command_data_build(options);
}

// The commands that take one path.
struct InspectCommand {
  const char* name;
  const char* meaning;
  const char* argument;
  const char* argument_meaning;
  const char* example_text;
  int (*command)(const InspectOptions& options);
};

int run_inspect(const Invocation& invocation, const InspectCommand& command) {
  InspectOptions options;
  CLI::App app(command.meaning, command.name);
  app.add_option(command.argument, options.path, command.argument_meaning)->required();
  add_json(app, options.format);
  app.footer(example(command.example_text));
  parse(app, invocation);
  return command.command(options);
}

int run_data_inspect(const Invocation& invocation) {
  return run_inspect(
      invocation, {"cambium data inspect", "What a token file holds.", "FILE", "token file (.h5)",
                   "cambium data inspect novels.h5", command_data_inspect});
}

int run_tokenizer_train(const Invocation& invocation) {
  TokenizerTrainOptions options;
  CLI::App app("Train a SentencePiece tokenizer.", "cambium tokenizer train");
  app.add_option("INPUT", options.inputs, "text or JSONL files")->required();
  app.add_option("--out", options.out, "model file to write (.model)")->required();
  add_number(app, "--vocab", options.vocab, "number of pieces")->check(positive());
  add_json(app, options.format);
  app.footer(example("cambium tokenizer train novels.txt --vocab 1024 --out novels.model"));
  parse(app, invocation);
  return command_tokenizer_train(options);
}

int run_tokenizer_inspect(const Invocation& invocation) {
  return run_inspect(invocation,
                     {"cambium tokenizer inspect", "What a tokenizer holds.", "FILE",
                      "SentencePiece .model, or bytes", "cambium tokenizer inspect novels.model",
                      command_tokenizer_inspect});
}

int run_checkpoint(const Invocation& invocation, CheckpointAction action, const char* name,
                   const char* meaning) {
  CheckpointOptions options;
  options.action = action;
  CLI::App app(meaning, fmt::format("cambium checkpoint {}", name));
  const bool imports = action == CheckpointAction::import_hf;
  const bool writes = imports || action == CheckpointAction::export_hf;
  app.add_option("PATH", options.path,
                 imports ? "Hugging Face directory" : "checkpoint, or run directory for its newest")
      ->required();
  if (writes) app.add_option("OUT", options.out, "directory to write")->required();
  if (action == CheckpointAction::export_hf) {
    app.add_option("--storage", options.storage, "fp32 | bf16")
        ->check(CLI::IsMember({"fp32", "bf16"}))
        ->capture_default_str();
  }
  add_json(app, options.format);
  app.footer(example(fmt::format("cambium checkpoint {} {}{}", name, imports ? "hf" : "runs/a",
                                 writes ? " out" : "")
                         .c_str()));
  parse(app, invocation);
  return command_checkpoint(options);
}

int run_checkpoint_inspect(const Invocation& invocation) {
  return run_checkpoint(invocation, CheckpointAction::inspect, "inspect",
                        "What a checkpoint holds.");
}
int run_checkpoint_verify(const Invocation& invocation) {
  return run_checkpoint(invocation, CheckpointAction::verify, "verify",
                        "Read a checkpoint whole and compare every size and hash.");
}
int run_checkpoint_export(const Invocation& invocation) {
  return run_checkpoint(invocation, CheckpointAction::export_hf, "export-hf",
                        "Write a checkpoint's model as a Hugging Face directory.");
}
int run_checkpoint_import(const Invocation& invocation) {
  return run_checkpoint(invocation, CheckpointAction::import_hf, "import-hf",
                        "Turn a Hugging Face directory into a checkpoint.");
}

int run_parity(const Invocation& invocation) {
  ParityOptions options;
  CLI::App app("Compare with a golden directory: loss, logits, gradients, AdamW steps.",
               "cambium parity");
  app.add_option("DIR", options.directory, "golden directory")->required();
  app.add_option("--device", options.device, "cpu | cuda")
      ->check(CLI::IsMember({"cpu", "cuda"}))
      ->capture_default_str();
  app.add_option("--set", options.sets, "section.key=value, such as parallel.dp=2")
      ->type_size(1)
      ->allow_extra_args(false)
      ->type_name("SECTION.KEY=VALUE");
  add_json(app, options.format);
  app.footer(example("cambium parity tests/golden/tiny --set parallel.dp=2 --json"));
  parse(app, invocation);
  return command_parity(options);
}

int run_compare(const Invocation& invocation) {
  CompareOptions options;
  CLI::App app("Compare two runs by their digests: equal, or the first differing step and tensor.",
               "cambium compare");
  app.add_option("RUN_A", options.run_a, "run directory")->required();
  app.add_option("RUN_B", options.run_b, "run directory")->required();
  add_json(app, options.format);
  app.footer(example("cambium compare runs/a runs/b"));
  parse(app, invocation);
  return command_compare(options);
}

int run_config_show(const Invocation& invocation) {
  ConfigShowOptions options;
  CLI::App app("Check a configuration, print it whole, and what follows from it.",
               "cambium config show");
  add_config(app, options.config);
  add_json(app, options.format);
  app.footer(example("cambium config show configs/quickstart.toml --set parallel.ep=8"));
  parse(app, invocation);
  return command_config_show(options);
}

int run_config_schema(const Invocation& invocation) {
  OutputFormat format = OutputFormat::text;
  CLI::App app("Every key with type, default, range and meaning.", "cambium config schema");
  add_json(app, format);
  app.footer(example("cambium config schema"));
  parse(app, invocation);
  return command_config_schema(format);
}

int run_doctor(const Invocation& invocation) {
  OutputFormat format = OutputFormat::text;
  CLI::App app("What this machine offers: cores, instructions, memory, libraries, GPU, corpus.",
               "cambium doctor");
  add_json(app, format);
  app.footer(example("cambium doctor"));
  parse(app, invocation);
  return command_doctor(format);
}

int run_report(const Invocation& invocation) {
  return run_inspect(invocation, {"cambium report", "Write a run's report.html.", "RUN",
                                  "run directory", "cambium report runs/a", command_report});
}

struct Subcommand {
  const char* group;  // first word
  const char* name;   // second word; empty when there is none
  const char* meaning;
  int (*run)(const Invocation& invocation);
};

const Subcommand kSubcommands[] = {
    {"train", "", "train a model", run_train},
    {"check", "", "prove a configuration before spending time on it", run_check},
    {"plan", "", "predict step time and memory on a machine", run_plan},
    {"calibrate", "", "measure this machine into a machine file", run_calibrate},
    {"eval", "", "loss, perplexity and bits per byte", run_eval},
    {"generate", "", "write text with a trained model", run_generate},
    {"data", "build", "text or JSONL to a token file", run_data_build},
    {"data", "inspect", "what a token file holds", run_data_inspect},
    {"tokenizer", "train", "train a SentencePiece tokenizer", run_tokenizer_train},
    {"tokenizer", "inspect", "what a tokenizer holds", run_tokenizer_inspect},
    {"checkpoint", "inspect", "what a checkpoint holds", run_checkpoint_inspect},
    {"checkpoint", "verify", "read a checkpoint whole", run_checkpoint_verify},
    {"checkpoint", "export-hf", "checkpoint to a Hugging Face directory", run_checkpoint_export},
    {"checkpoint", "import-hf", "Hugging Face directory to a checkpoint", run_checkpoint_import},
    {"parity", "", "compare with a golden directory", run_parity},
    {"compare", "", "first difference between two runs", run_compare},
    {"config", "show", "a configuration, checked and whole", run_config_show},
    {"config", "schema", "every key with its meaning", run_config_schema},
    {"doctor", "", "what this machine offers", run_doctor},
    {"report", "", "a run's report.html", run_report},
};

// The names a word may be: first words, or the second words of a group.
std::vector<std::string> words(std::string_view group) {
  std::vector<std::string> result;
  for (const Subcommand& row : kSubcommands) {
    if (!group.empty() && group != row.group) continue;
    const std::string word = group.empty() ? row.group : row.name;
    if (result.empty() || result.back() != word) result.push_back(word);
  }
  return result;
}

void print_overview(std::FILE* file, std::string_view group) {
  fmt::print(file, "Cambium trains Mixture-of-Experts language models.\n\n");
  for (const Subcommand& row : kSubcommands) {
    if (!group.empty() && group != row.group) continue;
    const std::string name = fmt::format("{} {}", row.group, row.name);
    fmt::print(file, "  cambium {:<24}{}\n", name, row.meaning);
  }
  fmt::print(file, "\n`cambium COMMAND --help` has the arguments and an example.\n");
}

[[noreturn]] void refuse_word(const std::string& word, const std::string& group) {
  const std::vector<std::string> names = words(group);
  const std::string nearest = nearest_name(word, names);
  const std::string prefix = group.empty() ? "" : group + " ";
  if (word.empty()) {
    fail(ExitCode::usage, "cambium {}needs one of: {}", prefix, joined_names(names, ", "));
  }
  fail(ExitCode::usage, "unknown command '{}{}'; {}", prefix, word,
       nearest.empty() ? "there are: " + joined_names(names, ", ")
                       : fmt::format("did you mean {}{}?", prefix, nearest));
}

int dispatch(const std::vector<std::string>& arguments, const Environment& environment) {
  const auto is_help = [](const std::string& word) { return word == "--help" || word == "-h"; };
  if (arguments.empty()) refuse_word("", "");
  if (is_help(arguments[0]) || arguments[0] == "help") {
    print_overview(stdout, "");
    return 0;
  }
  const std::string& group = arguments[0];
  const std::string second = arguments.size() > 1 ? arguments[1] : "";
  bool group_exists = false;
  for (const Subcommand& row : kSubcommands) {
    if (group != row.group) continue;
    group_exists = true;
    const bool is_pair = *row.name != '\0';
    if (is_pair && second != row.name) continue;
    const std::vector<std::string> rest(arguments.begin() + (is_pair ? 2 : 1), arguments.end());
    return row.run({rest, environment});
  }
  if (!group_exists) refuse_word(group, "");
  if (!is_help(second)) refuse_word(second, group);
  print_overview(stdout, group);
  return 0;
}

}  // namespace

int run_cli(const std::vector<std::string>& arguments, const Environment& environment) {
  int code = 0;
  std::string message;
  try {
    code = dispatch(arguments, environment);
  } catch (const HelpShown&) {
    code = static_cast<int>(ExitCode::done);
  } catch (const Error& error) {
    code = static_cast<int>(error.exit_code());
    message = error.what();
  } catch (const std::bad_alloc&) {
    code = static_cast<int>(ExitCode::out_of_memory);
    message = "out of memory: use a smaller model, batch or sequence";
  } catch (const std::exception& error) {
    code = static_cast<int>(ExitCode::internal);
    message = fmt::format("internal error: {}", error.what());
  }
  if (!message.empty()) fmt::print(stderr, "cambium: {}\n", message);
  // Results that never reached their reader are an I/O error, such as a full disk behind a pipe.
  if (std::fflush(stdout) != 0 && code == 0) {
    fmt::print(stderr, "cambium: cannot write the results to stdout\n");
    code = static_cast<int>(ExitCode::io);
  }
  return code;
}

}  // namespace cambium
