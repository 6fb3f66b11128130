// Faults of ranks, links and saves: each ends with the bits of a run without, or with its
// documented exit code within the virtual time limit, and after a restart from the newest
// checkpoint the run has those bits too. A rank that dies is tried at every call of three steps,
// saves included.
#include "src/checkpoint/checkpoint.h"
#include "src/config/faults.h"
#include "src/train/train_run.h"
#include "tests/checkpoint/checkpoint_testing.h"
#include "tests/train/run_trace.h"

namespace cambium::test {

namespace {

constexpr int64_t kFaultSteps = 3;

struct FaultRun {
  ExitCode exit_code = ExitCode::done;
  std::string message;
  std::string digest;       // of the last step
  int64_t loaded_step = 0;  // of the checkpoint it went on from; 0 = none
};

// The quickstart layout (dp 8, ep 4, zero1) of a tiny model, saving after every step.
Config quickstart_layout() {
  Config config = with_layout(tiny_config(), {8, 4, 1, Sharding::zero1});
  config.model.layers = 1;
  config.checkpoint.every_steps = 1;
  config.train.steps = kFaultSteps;
  return config;
}

FaultRun run_with_saves(Config config, const std::string& directory,
                        const std::vector<FaultConfig>& faults) {
  config.faults = faults;
  const Derived derived = derive(config);
  const SyntheticSequences source(config);
  FileSystem files;
  files.make_directories(checkpoint_directory(directory));
  TrainRun run;
  run.config = &config;
  run.directory = directory;
  run.files = &files;
  FaultRun result;
  try {
    const auto newest = open_newest_checkpoint(files, checkpoint_directory(directory));
    if (newest.reader != nullptr) result.loaded_step = newest.reader->state().step;
    launch_ranks({.ranks = derived.ranks,
                  .workers = 1,
                  .faults = faults,
                  .watchdog_s = config.run.watchdog_s},
                 [&](RankEnvironment& environment) {
                   Rank rank(config, environment);
                   TrainStep step(rank, config.model);
                   int64_t done = 0;
                   if (newest.reader != nullptr) {
                     load_checkpoint(step, *newest.reader);
                     done = newest.reader->state().step;
                   } else {
                     step.model().initialize(config.run.seed);
                   }
                   while (done < kFaultSteps) {
                     rank.step = ++done;
                     environment.set_step(done);
                     step.accumulate(source, done - 1);
                     const StepResult last =
                         step.update(done, learning_rate(config, derived, done), WithDigests::yes);
                     if (rank.is_first()) result.digest = total_hex(last);
                     save_checkpoint(step, run, done);
                   }
                   if (rank.is_first() && result.digest.empty()) {
                     Digest128 total;
                     for (const auto& [name, digest] : step.digests()) total += digest;
                     result.digest = total.hex();
                   } else if (result.digest.empty()) {
                     step.digests();
                   }
                 });
  } catch (const Error& error) {
    result.exit_code = error.exit_code();
    result.message = error.what();
  }
  return result;
}

const std::string& unfaulted_digest() {
  static const std::string digest = [] {
    const TemporaryDirectory directory;
    return run_with_saves(quickstart_layout(), directory.path(), {}).digest;
  }();
  return digest;
}

std::string fault_text(const FaultConfig& fault, const FaultRun& run) {
  return fmt::format("{} {}: {}", describe_fault(fault), fault.site, run.message);
}

// Fails as documented, then goes on to the same bits.
void expect_recovery(const FaultConfig& fault, ExitCode exit_code, const std::string& directory,
                     const FaultRun& failed) {
  const std::string what = fault_text(fault, failed);
  EXPECT_EQ(failed.exit_code, exit_code) << what;
  const FaultRun restarted = run_with_saves(quickstart_layout(), directory, {});
  EXPECT_EQ(restarted.message, "") << what;
  EXPECT_EQ(restarted.digest, unfaulted_digest()) << what;
}

TEST(Faults, RankKilledAtEveryCallOfThreeSteps) {
  int64_t kills = 0;
  for (int64_t rank = 0; rank < 8; ++rank) {
    for (int64_t step = 1; step <= kFaultSteps; ++step) {
      for (int64_t call = 0;; ++call) {
        const FaultConfig fault{"rank_crash", rank, step, fmt::format("#{}", call)};
        const TemporaryDirectory directory;
        const FaultRun failed = run_with_saves(quickstart_layout(), directory.path(), {fault});
        if (failed.exit_code == ExitCode::usage) break;  // past the last call
        expect_recovery(fault, ExitCode::peer_lost, directory.path(), failed);
        ++kills;
      }
    }
  }
  EXPECT_GE(kills, 8 * 3 * 16);
}

TEST(Faults, EachEndsWithItsExitCodeAndGoesOnWithTheSameBits) {
  struct Case {
    FaultConfig fault;
    ExitCode exit_code;
  };
  const Case cases[] = {
      {{"stuck_rank", 5, 2, "expert#3"}, ExitCode::watchdog},
      {{"stuck_rank", 0, 3, "world#2"}, ExitCode::watchdog},
      {{"out_of_memory", 3, 2, "#11"}, ExitCode::out_of_memory},
      {{"nan_gradient", 6, 2, ""}, ExitCode::non_finite},
      {{"wrong_count", 4, 3, ""}, ExitCode::collective_mismatch},
      {{"skipped_collective", 7, 2, ""}, ExitCode::collective_mismatch},
      {{.kind = "pause", .rank = 3, .step = 2, .seconds = 301}, ExitCode::watchdog},
      {{.kind = "slow_link", .rank = 3, .step = 2, .seconds = 301}, ExitCode::watchdog},
      {{.kind = "flapping_link", .rank = 0, .step = 3, .seconds = 1e4}, ExitCode::watchdog},
      {{"failed_write", 3, 2, ""}, ExitCode::io},
      {{"failed_write", 0, 2, "#2"}, ExitCode::io},  // the manifest
      {{"disk_full", 5, 3, ""}, ExitCode::io},
      {{"disk_full", 7, 1, "#1"}, ExitCode::io},
      {{"torn_write", 4, 2, "#1"}, ExitCode::corrupt_file},  // read back before the commit
      {{"lost_peer", 2, 2, ""}, ExitCode::peer_lost},
  };
  for (const Case& row : cases) {
    const TemporaryDirectory directory;
    const FaultRun failed = run_with_saves(quickstart_layout(), directory.path(), {row.fault});
    expect_recovery(row.fault, row.exit_code, directory.path(), failed);
  }
}

// Time passes, and nothing else differs, whatever the schedule.
TEST(Faults, PausesAndBadLinksWithinTheLimitKeepTheBits) {
  for (const char* kind : {"pause", "slow_link", "flapping_link"}) {
    for (const char* site : {"", "expert#1"}) {
      // A slow link delays every transfer of the step, and other ranks wait for them all.
      const double seconds = std::string(kind) == "pause" ? 299 : 5;
      const FaultConfig fault{.kind = kind, .rank = 5, .step = 2, .site = site, .seconds = seconds};
      const TemporaryDirectory directory;
      const FaultRun run = run_with_saves(quickstart_layout(), directory.path(), {fault});
      EXPECT_EQ(run.exit_code, ExitCode::done) << fault_text(fault, run);
      EXPECT_EQ(run.digest, unfaulted_digest()) << fault_text(fault, run);
    }
  }
}

// Every call of a save: before its k-th file call the rank is gone.
TEST(Faults, PeerLostAtEveryFileCallOfASave) {
  for (const int64_t rank : {0, 3}) {
    int64_t lost = 0;
    for (;; lost += rank == 0 ? 3 : 1) {
      const FaultConfig fault{"lost_peer", rank, 2, fmt::format("#{}", lost)};
      const TemporaryDirectory directory;
      const FaultRun failed = run_with_saves(quickstart_layout(), directory.path(), {fault});
      if (failed.exit_code == ExitCode::usage) break;
      expect_recovery(fault, ExitCode::peer_lost, directory.path(), failed);
    }
    EXPECT_GE(lost, rank == 0 ? 30 : 10) << rank;
  }
}

// Nothing tells the run that half of a file is gone. A load does, and goes back one checkpoint.
TEST(Faults, TornFilesAreFoundByTheirHashes) {
  for (const FaultConfig& torn :
       {FaultConfig{"torn_write", 6, 2, ""}, FaultConfig{"torn_write", 0, 2, "#2"}}) {
    const TemporaryDirectory directory;
    const FaultConfig crash{"rank_crash", 1, 3, ""};
    const FaultRun failed = run_with_saves(quickstart_layout(), directory.path(), {torn, crash});
    EXPECT_EQ(failed.exit_code, torn.rank == 0 ? ExitCode::corrupt_file : ExitCode::peer_lost)
        << failed.message;
    const FaultRun restarted = run_with_saves(quickstart_layout(), directory.path(), {});
    EXPECT_EQ(restarted.loaded_step, 1);
    EXPECT_EQ(restarted.digest, unfaulted_digest());
  }
}

constexpr const char* kSoakKinds[] = {
    "rank_crash",        "stuck_rank", "pause",     "slow_link",     "flapping_link", "torn_write",
    "failed_write",      "disk_full",  "lost_peer", "out_of_memory", "nan_gradient",  "wrong_count",
    "skipped_collective"};

// Several kinds at once, each with its probability: no run ends well with other bits, and removing
// the faults recovers every one. Returns the number of faults that struck.
int64_t soak(uint64_t first_seed, uint64_t seeds) {
  int64_t struck = 0;
  for (uint64_t seed = first_seed; seed < first_seed + seeds; ++seed) {
    Config config = quickstart_layout();
    config.run.seed = seed;
    for (const char* kind : kSoakKinds) {
      config.faults.push_back({.kind = kind, .probability = 0.15});
    }
    std::vector<FaultConfig> faults = drawn_faults(config, {0, kFaultSteps});
    struck += std::ssize(faults);
    for (FaultConfig& fault : faults) {
      if (fault.kind.ends_with("_link") && seed % 2 == 0) fault.seconds = 301;
    }
    config = quickstart_layout();
    const TemporaryDirectory directory;
    FaultRun run = run_with_saves(config, directory.path(), faults);
    if (run.exit_code != ExitCode::done) {
      constexpr ExitCode kDocumented[] = {
          ExitCode::peer_lost,  ExitCode::watchdog,     ExitCode::collective_mismatch,
          ExitCode::deadlock,   ExitCode::io,           ExitCode::corrupt_file,
          ExitCode::non_finite, ExitCode::out_of_memory};
      EXPECT_NE(std::ranges::find(kDocumented, run.exit_code), std::end(kDocumented))
          << seed << ": " << run.message;
      run = run_with_saves(config, directory.path(), {});
      if (run.exit_code == ExitCode::corrupt_file) {  // the only checkpoint was torn: from step 0
        EXPECT_NE(run.message.find("move the directory away"), std::string::npos) << run.message;
        const TemporaryDirectory other;
        run = run_with_saves(config, other.path(), {});
      }
    }
    EXPECT_EQ(run.message, "") << seed;
    EXPECT_EQ(run.digest, unfaulted_digest()) << seed;
  }
  return struck;
}

TEST(Faults, SampledSoakEndsWithTheSameBits) { EXPECT_GE(soak(1, 64), 64); }

// A minute: test_train --gtest_also_run_disabled_tests --gtest_filter=*SoakOf*
TEST(Faults, DISABLED_SoakOfTwoThousandSeeds) { fmt::print("{} faults\n", soak(1, 2000)); }

// A flipped bit is no error of the run: its digests tell.
TEST(Faults, FlippedBitShowsInTheDigest) {
  const TemporaryDirectory directory;
  const FaultRun run =
      run_with_saves(quickstart_layout(), directory.path(), {{"bit_flip", 2, 2, ""}});
  EXPECT_EQ(run.exit_code, ExitCode::done);
  EXPECT_NE(run.digest, unfaulted_digest());
}

}  // namespace

}  // namespace cambium::test
