// Workers: every chunk runs once, nested and from several threads; errors come out in chunk order.
// The tsan preset runs this for the races that it would show.
#include "src/base/workers.h"

#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "gtest/gtest.h"

namespace cambium {
namespace {

constexpr int64_t kOuterChunks = 24, kInnerChunks = 16, kRounds = 40;

// Counts, for every (outer, inner) chunk, how often it ran; kRounds for each when all is well.
std::vector<int> nested_runs(Workers& workers) {
  std::vector<int> runs(kOuterChunks * kInnerChunks);
  for (int64_t round = 0; round < kRounds; ++round) {
    workers.parallel_for(kOuterChunks, [&](int64_t outer, Scratch& scratch) {
      float* own = scratch.floats(0, kInnerChunks);
      for (int64_t i = 0; i < kInnerChunks; ++i) own[i] = static_cast<float>(outer);
      workers.parallel_for(kInnerChunks, [&](int64_t inner, Scratch& inner_scratch) {
        inner_scratch.floats(1, 1 + inner)[inner] = 0;
        runs[static_cast<size_t>(outer * kInnerChunks + inner)] += 1;
      });
      for (int64_t i = 0; i < kInnerChunks; ++i) EXPECT_EQ(own[i], static_cast<float>(outer));
    });
  }
  return runs;
}

TEST(Workers, EveryChunkRunsOnceNestedToo) {
  for (const int threads : {1, 2, 4}) {
    Workers workers(threads);
    EXPECT_EQ(workers.threads(), threads);
    EXPECT_EQ(nested_runs(workers), std::vector<int>(kOuterChunks * kInnerChunks, kRounds));
    workers.parallel_for(0, [](int64_t, Scratch&) { FAIL(); });
  }
}

TEST(Workers, SeveralThreadsShareOnePool) {
  Workers workers(3);
  std::vector<std::vector<int>> runs(3);
  std::vector<std::thread> callers;
  for (std::vector<int>& mine : runs) {
    callers.emplace_back([&workers, &mine] { mine = nested_runs(workers); });
  }
  for (std::thread& caller : callers) caller.join();
  for (const std::vector<int>& mine : runs) {
    EXPECT_EQ(mine, std::vector<int>(kOuterChunks * kInnerChunks, kRounds));
  }
}

TEST(Workers, TheFirstErrorByChunkComesOutAfterAllRan) {
  Workers workers(4);
  for (int64_t round = 0; round < kRounds; ++round) {
    std::vector<int> runs(kOuterChunks);
    try {
      workers.parallel_for(kOuterChunks, [&](int64_t chunk, Scratch&) {
        runs[static_cast<size_t>(chunk)] += 1;
        if (chunk >= 3) throw std::runtime_error(std::to_string(chunk));
      });
      ADD_FAILURE() << "no error";
    } catch (const std::runtime_error& error) {
      EXPECT_STREQ(error.what(), "3");
    }
    EXPECT_EQ(runs, std::vector<int>(kOuterChunks, 1));
  }
}

}  // namespace
}  // namespace cambium
