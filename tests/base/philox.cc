// Philox: known answers, independence of position, permutations, moments.
#include "src/base/philox.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <set>
#include <vector>

namespace cambium {
namespace {

TEST(Philox, KnownAnswersOfRandom123) {
  // kat_vectors of Random123, "philox4x32 10": zeros, ones, and digits of pi.
  EXPECT_EQ(philox4x32({0, 0, 0, 0}, {0, 0}),
            (PhiloxCounter{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(philox4x32({~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}),
            (PhiloxCounter{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
            (PhiloxCounter{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(Philox, StreamsEntitiesAndElementsDiffer) {
  std::set<uint64_t> seen;
  for (uint64_t seed : {0ull, 1ull}) {
    for (auto stream : {RandomStream::init, RandomStream::data, RandomStream::routing_noise,
                        RandomStream::schedule, RandomStream::latency, RandomStream::faults}) {
      for (uint64_t entity : {0ull, 1ull, 1ull << 40}) {
        for (uint64_t element : {0ull, 1ull, 1ull << 40}) {
          seen.insert(random_u64({seed, stream, entity}, element));
        }
      }
    }
  }
  EXPECT_EQ(seen.size(), 2u * 6 * 3 * 3);
}

TEST(Philox, UniformAndBelowStayInRange) {
  const RandomSequence sequence{7, RandomStream::latency, 3};
  double sum = 0;
  std::array<int, 5> counts{};
  for (uint64_t i = 0; i < 50000; ++i) {
    const double u = random_uniform(sequence, i);
    ASSERT_TRUE(u >= 0 && u < 1);
    sum += u;
    ++counts.at(random_below(5, sequence, i));
  }
  EXPECT_NEAR(sum / 50000, 0.5, 5 * 0.289 / 223.6);  // five standard errors
  for (int count : counts) EXPECT_NEAR(count, 10000, 5 * 89.5);
}

TEST(Philox, PermuteIndexIsAPermutationForEverySizeAndEpoch) {
  for (uint64_t n : {1, 2, 3, 5, 8, 31, 63, 64, 65, 1000, 4099}) {
    for (uint64_t epoch : {0, 1, 7}) {
      std::vector<bool> hit(n, false);
      for (uint64_t i = 0; i < n; ++i) {
        const uint64_t image = permute_index(i, n, 42, epoch);
        ASSERT_LT(image, n);
        ASSERT_FALSE(hit[image]) << "n " << n << " epoch " << epoch;
        hit[image] = true;
      }
    }
  }
}

TEST(Philox, PermuteIndexDependsOnSeedAndEpochAndMixes) {
  constexpr uint64_t kCount = 1000;
  int same_epoch = 0, same_seed = 0, fixed = 0, neighbours = 0;
  for (uint64_t i = 0; i < kCount; ++i) {
    const uint64_t image = permute_index(i, kCount, 1, 0);
    same_epoch += image == permute_index(i, kCount, 1, 1);
    same_seed += image == permute_index(i, kCount, 2, 0);
    fixed += image == i;
    if (i > 0) neighbours += permute_index(i - 1, kCount, 1, 0) + 1 == image;
  }
  // Each counts about one coincidence (Poisson); ten would be a one in ten million event.
  EXPECT_LT(same_epoch, 10);
  EXPECT_LT(same_seed, 10);
  EXPECT_LT(fixed, 10);
  EXPECT_LT(neighbours, 10);
}

TEST(Philox, PermuteIndexOfThreeReachesEveryOrder) {
  std::set<std::array<uint64_t, 3>> orders;
  for (uint64_t epoch = 0; epoch < 200; ++epoch) {
    orders.insert({permute_index(0, 3, 9, epoch), permute_index(1, 3, 9, epoch),
                   permute_index(2, 3, 9, epoch)});
  }
  EXPECT_EQ(orders.size(), 6u);
}

TEST(Philox, NormalsDependOnTheElementAlone) {
  std::vector<float> whole(1003);
  fill_normal(whole.data(), 0, 1003, 0.5f, 11, 77);
  for (uint64_t first : {0, 1, 2, 3, 4, 500, 1002}) {
    for (int64_t count : {0, 1, 2, 5, 200}) {
      if (first + count > 1003) continue;
      std::vector<float> part(count + 1, -99.0f);
      fill_normal(part.data(), first, count, 0.5f, 11, 77);
      EXPECT_TRUE(std::equal(part.begin(), part.end() - 1, whole.begin() + first));
      EXPECT_EQ(part.back(), -99.0f);
    }
  }
  EXPECT_EQ(whole[6], 0.5f * random_normal({11, RandomStream::init, 77}, 6));
  std::vector<float> other(1003);
  fill_normal(other.data(), 0, 1003, 0.5f, 11, 78);
  EXPECT_NE(whole, other);
}

TEST(Philox, NormalsHaveTheMomentsOfANormal) {
  constexpr int64_t kCount = 400000;
  std::vector<float> x(kCount);
  fill_normal(x.data(), 12345, kCount, 1.0f, 3, 5);
  double sum1 = 0, sum2 = 0, sum3 = 0, sum4 = 0, lag = 0;
  int64_t beyond_two = 0;
  for (int64_t i = 0; i < kCount; ++i) {
    const double v = x[i];
    sum1 += v, sum2 += v * v, sum3 += v * v * v, sum4 += v * v * v * v;
    if (i > 0) lag += v * x[i - 1];
    beyond_two += std::abs(v) > 2;
  }
  // Five standard errors of each estimate.
  const double unit = 5 / std::sqrt(static_cast<double>(kCount));
  EXPECT_NEAR(sum1 / kCount, 0, unit);
  EXPECT_NEAR(sum2 / kCount, 1, unit * std::sqrt(2.0));
  EXPECT_NEAR(sum3 / kCount, 0, unit * std::sqrt(15.0));
  EXPECT_NEAR(sum4 / kCount, 3, unit * std::sqrt(96.0));
  EXPECT_NEAR(lag / kCount, 0, unit);
  EXPECT_NEAR(static_cast<double>(beyond_two) / kCount, 0.0455003, unit * 0.2084);
}

}  // namespace
}  // namespace cambium
