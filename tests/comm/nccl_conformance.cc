// The conformance suite on NCCL: one process per GPU, for 1, 2, 4 and 8 of them as far as they go.
//
// The parent starts this binary again once per rank, with torchrun's variables; such a process runs
// the suite as its rank. CAMBIUM_COMM_RANKS and CAMBIUM_COMM_BYTES (scripts/gpu_comm_check.sh)
// choose one number of ranks and the size of the largest case.
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/nccl_comm.h"
#include "src/comm/nccl_environment.h"
#include "tests/comm/conformance.h"

namespace cambium::conformance {
namespace {

constexpr int64_t kLargestBytes = 32 << 20;  // unless told

int64_t number(const char* variable, int64_t otherwise) {
  const char* text = std::getenv(variable);
  return text == nullptr ? otherwise : std::atoll(text);
}

int gpus() {
  if constexpr (kHasCuda) return cuda::device_count();
  return 0;
}

Memory device_memory() {
  if constexpr (kHasCuda) {
    return {[](int64_t bytes) {
              const auto memory = std::make_shared<cuda::DeviceMemory>(bytes);
              return std::shared_ptr<void>(memory, memory->data());
            },
            cuda::copy_bytes};
  }
  return host_memory();
}

// All cases of one number of ranks: small ones about meaning, then large ones about data paths.
std::vector<std::vector<Case>> cases_of(int ranks) {
  std::vector<Case> small;
  for (const Case& test : all_cases(ranks)) {
    if (test.ranks == ranks) small.push_back(test);
  }
  return {small, large_cases(ranks, number("CAMBIUM_COMM_BYTES", kLargestBytes))};
}

// Starts one process per rank and returns how many did not end with 0.
int failed_processes(int ranks) {
  std::vector<pid_t> processes;
  const int port = listening_port(listen_on(0));
  for (int rank = 0; rank < ranks; ++rank) {
    std::vector<std::string> variables = {
        "RANK=" + std::to_string(rank), "WORLD_SIZE=" + std::to_string(ranks),
        "MASTER_ADDR=127.0.0.1", "MASTER_PORT=" + std::to_string(port)};
    std::vector<char*> environment;
    for (std::string& variable : variables) environment.push_back(variable.data());
    for (char** each = environ; *each != nullptr; ++each) environment.push_back(*each);
    environment.push_back(nullptr);
    std::string program = "/proc/self/exe", filter = "--gtest_filter=NcclRank.*";
    char* arguments[] = {program.data(), filter.data(), nullptr};
    pid_t process = 0;
    EXPECT_EQ(
        posix_spawn(&process, program.c_str(), nullptr, nullptr, arguments, environment.data()), 0);
    processes.push_back(process);
  }
  int failed = 0;
  for (const pid_t process : processes) {
    int status = 0;
    waitpid(process, &status, 0);
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) ++failed;
  }
  return failed;
}

TEST(NcclConformance, OneProcessPerGpu) {
  if (gpus() == 0) GTEST_SKIP() << "skipped: no GPU";
  const int64_t only = number("CAMBIUM_COMM_RANKS", 0);
  for (const int ranks : {1, 2, 4, 8}) {
    if (ranks > gpus() || (only != 0 && ranks != only)) continue;
    EXPECT_EQ(failed_processes(ranks), 0) << ranks << " ranks";
  }
}

// A rank's part: every case, with communicators made once.
struct RankProgram {
  static void main(void*, RankEnvironment& environment) {
    for (const std::vector<Case>& cases : cases_of(environment.ranks())) {
      const int64_t begin_ns = steady_now_ns();
      const uint64_t hash = run_cases(environment, cases, device_memory());
      std::printf("rank %d of %d: %zu cases up to %s in %.1f s, hash %016lx\n", environment.rank(),
                  environment.ranks(), cases.size(), cases.back().name().c_str(),
                  1e-9 * static_cast<double>(steady_now_ns() - begin_ns), hash);
      std::fflush(stdout);
    }
  }
};

TEST(NcclRank, RunsItsPart) {
  const int64_t ranks = number("WORLD_SIZE", 0);
  if (ranks == 0 || gpus() == 0) GTEST_SKIP() << "skipped: not started as a rank";
  if constexpr (kHasCuda) {
    JobOptions options;
    options.rank = static_cast<int>(number("RANK", 0));
    options.ranks = static_cast<int>(ranks);
    options.endpoint = {std::getenv("MASTER_ADDR"), static_cast<int>(number("MASTER_PORT", 0))};
    options.token = "nccl conformance";
    options.watchdog_s = 60;
    setenv("NCCL_ALGO", "Ring", 1);
    setenv("NCCL_PROTO", "Simple", 1);
    cuda::check_nccl_version();
    options.library_version = cuda::nccl_version();
    cuda::select_device(options.rank);
    Job job(options);
    const auto cores = static_cast<int>(std::thread::hardware_concurrency());
    run_nccl_rank({.job = &job, .worker_threads = std::max(1, cores / options.ranks)},
                  &RankProgram::main, nullptr);
  }
}

}  // namespace
}  // namespace cambium::conformance
