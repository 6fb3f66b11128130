// Battery: a save, a retention and a load are struck at every file-system call.
//
// Oracle of every trial: the newest checkpoint that was complete loads bit for bit; an interrupted
// save never shows; after prepare_checkpoints nothing of it is left; a load never gives anything
// but a complete checkpoint.
#include <sys/resource.h>
#include <sys/wait.h>

#include <fstream>

#include "gtest/gtest.h"
#include "tests/checkpoint/checkpoint_samples.h"
#include "tests/checkpoint/checkpoint_testing.h"
#include "tests/checkpoint/faulty_file_system.h"

namespace cambium {
namespace {

constexpr int64_t kRanks = 2;
constexpr int64_t kOldSteps[] = {5, 10};
constexpr int64_t kNewStep = 15;

// A directory with two good checkpoints, copied afresh for every trial.
class FaultBattery : public ::testing::Test {
 protected:
  FaultBattery() {
    for (const int64_t step : kOldSteps) save_sample(plain_, pristine_.path(), step, kRanks);
  }

  void reset() {
    std::filesystem::remove_all(work());
    std::filesystem::copy(pristine_.path(), work(), std::filesystem::copy_options::recursive);
  }
  std::string work() const { return scratch_.path() + "/checkpoints"; }

  // What a training process does: leftovers away, save, retention.
  void save_run(FileSystem& files) const {
    prepare_checkpoints(files, work());
    save_sample(files, work(), kNewStep, kRanks);
    retain_checkpoints(files, work(), kNewStep, 2);
  }

  // Runs `body` in a child; its wait status. The child exits with the Error's code, or 0.
  template <class Body>
  static int run_child(Body&& body) {
    const pid_t child = ::fork();
    if (child == 0) ::_exit(outcome_of(body).code);
    int status = 0;
    EXPECT_EQ(::waitpid(child, &status, 0), child);
    return status;
  }

  // The step that loads after a fault; checks every bit of it.
  int64_t loaded_step() {
    const NewestCheckpoint newest = open_newest_checkpoint(plain_, work());
    if (!newest.reader) return -1;
    EXPECT_TRUE(newest.warnings.empty()) << newest.warnings.front();
    const int64_t step = newest.reader->state().step;
    EXPECT_TRUE(is_sample(*newest.reader, step));
    return step;
  }

  // After a clean start and another save nothing but the two newest checkpoints is left.
  void expect_recovers() {
    save_run(plain_);
    EXPECT_EQ(plain_.list(work()), (std::vector<std::string>{"step-00000010", "step-00000015"}));
    EXPECT_EQ(loaded_step(), kNewStep);
  }

  FileSystem plain_;
  TemporaryDirectory pristine_;
  TemporaryDirectory scratch_;
};

TEST_F(FaultBattery, KilledAtEveryCall) {
  reset();
  FaultyFileSystem counter({});
  save_run(counter);
  const int64_t calls = counter.calls();
  // NOTE: the count is a golden value: a new I/O path changes it, and is then covered knowingly.
  EXPECT_EQ(calls, 118);
  int64_t kept_old = 0, published = 0;
  for (const FaultKind kind : {FaultKind::kill, FaultKind::torn_kill}) {
    for (int64_t k = 0; k < calls; ++k) {
      reset();
      const int status = run_child([&] {
        FaultyFileSystem files({.kind = kind, .at_call = k});
        save_run(files);
      });
      const bool last_torn = kind == FaultKind::torn_kill && k == calls - 1;  // no call follows
      ASSERT_EQ(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL, !last_torn) << k;
      const int64_t step = loaded_step();
      ASSERT_TRUE(step == kNewStep || step == kOldSteps[1]) << k << " " << counter.trace()[k];
      (step == kNewStep ? published : kept_old) += 1;
      expect_recovers();
      if (HasFailure()) FAIL() << "call " << k << ": " << counter.trace()[k];
    }
  }
  EXPECT_GT(kept_old, 0);
  EXPECT_GT(published, 0);
  fmt::print("killed at {} calls, twice: {} kept the old checkpoint, {} had the new one\n", calls,
             kept_old, published);
}

TEST_F(FaultBattery, EveryCallFailsWithEveryError) {
  reset();
  FaultyFileSystem counter({});
  save_run(counter);
  int64_t trials = 0;
  for (const int error : {EIO, ENOSPC, EDQUOT, EACCES, EMFILE}) {
    for (const FaultKind kind : {FaultKind::fail_once, FaultKind::fail_after}) {
      for (int64_t k = 0; k < counter.calls(); ++k) {
        reset();
        FaultyFileSystem files({.kind = kind, .at_call = k, .error = error});
        const Outcome outcome = outcome_of([&] { save_run(files); });
        // fail_after does not strike calls that only read; whatever is struck is reported.
        const bool may_succeed = kind == FaultKind::fail_after && outcome.code == 0;
        ASSERT_TRUE(outcome.code == 31 || may_succeed) << counter.trace()[k] << outcome.message;
        const int64_t step = loaded_step();
        ASSERT_TRUE(step == kNewStep || step == kOldSteps[1]) << k << " " << counter.trace()[k];
        ASSERT_TRUE(step == kNewStep || !may_succeed) << counter.trace()[k];
        expect_recovers();
        if (HasFailure()) FAIL() << "call " << k << ": " << counter.trace()[k];
        ++trials;
      }
    }
  }
  fmt::print("{} saves with injected errors: whatever was struck exits 31\n", trials);
}

TEST_F(FaultBattery, InterruptsAndShortTransfersAreInvisible) {
  reset();
  FaultyFileSystem files({.kind = FaultKind::trickle});
  save_run(files);
  EXPECT_EQ(loaded_step(), kNewStep);
  const NewestCheckpoint newest = open_newest_checkpoint(files, work());
  EXPECT_TRUE(is_sample(*newest.reader, kNewStep));
}

// A save that replaces its own step, killed at every call: the old or the new, never neither.
TEST_F(FaultBattery, KilledWhileReplacingAStep) {
  reset();
  FaultyFileSystem counter({});
  save_sample(counter, work(), kOldSteps[1], 1);
  for (int64_t k = 0; k < counter.calls(); ++k) {
    reset();
    run_child([&] {
      FaultyFileSystem files({.kind = FaultKind::kill, .at_call = k});
      save_sample(files, work(), kOldSteps[1], 1);
    });
    ASSERT_EQ(loaded_step(), kOldSteps[1]) << counter.trace()[k];
    expect_recovers();
  }
}

// A load whose k-th call fails reports it; it neither succeeds wrongly nor falls back in silence.
TEST_F(FaultBattery, EveryCallOfALoadFails) {
  reset();
  FaultyFileSystem counter({});
  open_newest_checkpoint(counter, work());
  for (const int error : {EIO, EACCES, EMFILE}) {
    for (int64_t k = 0; k < counter.calls(); ++k) {
      FaultyFileSystem files({.kind = FaultKind::fail_once, .at_call = k, .error = error});
      const Outcome outcome = outcome_of([&] { open_newest_checkpoint(files, work()); });
      ASSERT_EQ(outcome.code, 31) << counter.trace()[k];
    }
  }
}

// A quota that bites at every 997th byte: exit 31, and the old checkpoint stays.
TEST_F(FaultBattery, FileSizeLimits) {
  reset();
  save_sample(plain_, work(), kNewStep, kRanks);
  int64_t largest = 0;
  for (const auto& entry : std::filesystem::directory_iterator(checkpoint_path(work(), kNewStep))) {
    largest = std::max(largest, static_cast<int64_t>(entry.file_size()));
  }
  int64_t refused = 0;
  for (int64_t limit = 0; limit < largest; limit += 997) {
    reset();
    const int status = run_child([&] {
      ::signal(SIGXFSZ, SIG_IGN);
      const rlimit bytes{static_cast<rlim_t>(limit), static_cast<rlim_t>(limit)};
      CHECK_EQ(::setrlimit(RLIMIT_FSIZE, &bytes), 0);
      save_sample(plain_, work(), kNewStep, kRanks);
    });
    ASSERT_TRUE(WIFEXITED(status));
    ASSERT_EQ(WEXITSTATUS(status), 31) << limit;
    ASSERT_EQ(loaded_step(), kOldSteps[1]) << limit;
    ++refused;
  }
  expect_recovers();
  EXPECT_GT(refused, 50);
}

// SIGKILL at random moments, not only at calls.
TEST_F(FaultBattery, KilledAtRandomTimes) {
  uint64_t random = 12345;
  int64_t published = 0;
  for (int trial = 0; trial < 60; ++trial) {
    reset();
    const pid_t child = ::fork();
    if (child == 0) {
      outcome_of([&] { save_run(plain_); });
      ::_exit(0);
    }
    random = random * 6364136223846793005u + 1442695040888963407u;
    ::usleep(static_cast<useconds_t>(random >> 33) % 40000);
    ::kill(child, SIGKILL);
    ::waitpid(child, nullptr, 0);
    const int64_t step = loaded_step();
    ASSERT_TRUE(step == kNewStep || step == kOldSteps[1]);
    published += step == kNewStep ? 1 : 0;
    if (trial % 10 == 0) expect_recovers();
  }
  fmt::print("killed 60 times at random: {} had the new checkpoint\n", published);
}

}  // namespace
}  // namespace cambium
