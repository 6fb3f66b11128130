// Digests: reference values, sums over shards, streaming, files.
#include "src/base/digest.h"

#include <gtest/gtest.h>

#include <cstdio>
#include <fstream>
#include <numeric>
#include <string>
#include <vector>

#include "src/base/error.h"

namespace cambium {
namespace {

std::vector<float> ramp_values(int64_t element_count) {
  std::vector<float> values(static_cast<size_t>(element_count));
  std::iota(values.begin(), values.end(), 1.0f);
  return values;
}

TEST(Digest, MatchesPublishedXxh3OfEmptyInput) {
  // XXH3-64 and XXH3-128 of zero bytes, seed 0, from xxHash's own sanity table.
  EXPECT_EQ(xxh3_64("", 0), 0x2D06800538D394C2u);
  EXPECT_EQ(xxh3_128("", 0).hex(), "99aa06d3014798d86001c324468d497f");
  EXPECT_EQ(tensor_id(""), 0x2D06800538D394C2u);
}

TEST(Digest, SumOfShardsIsTheWhole) {
  const auto values = ramp_values(3 * kDigestBlockElements + 17);
  const uint64_t tensor = tensor_id("layers.0.norm");
  const auto element_count = static_cast<int64_t>(values.size());
  const Digest128 whole = digest_blocks(values.data(), element_count, tensor, 0);
  for (int64_t cut = 0; cut <= 3; ++cut) {
    const int64_t head = cut * kDigestBlockElements;
    Digest128 sum = digest_blocks(values.data() + head, element_count - head, tensor, cut);
    sum += digest_blocks(values.data(), head, tensor, 0);
    EXPECT_EQ(sum.hex(), whole.hex()) << "cut after block " << cut;
  }
}

TEST(Digest, DependsOnTensorBlockPositionAndEveryBit) {
  auto values = ramp_values(2 * kDigestBlockElements);
  const auto element_count = static_cast<int64_t>(values.size());
  const Digest128 base = digest_blocks(values.data(), element_count, 1, 0);
  EXPECT_NE(digest_blocks(values.data(), element_count, 2, 0), base);
  EXPECT_NE(digest_blocks(values.data(), element_count, 1, 1), base);
  auto swapped = values;
  std::swap_ranges(swapped.begin(), swapped.begin() + kDigestBlockElements,
                   swapped.begin() + kDigestBlockElements);
  EXPECT_NE(digest_blocks(swapped.data(), element_count, 1, 0), base);
  values[5000] = -values[5000];
  EXPECT_NE(digest_blocks(values.data(), element_count, 1, 0), base);
}

TEST(Digest, AdditionCarries) {
  Digest128 sum{UINT64_MAX, 1};
  sum += Digest128{1, UINT64_MAX};
  EXPECT_EQ(sum.hex(), "00000000000000010000000000000000");
}

TEST(Digest, StreamAndFileEqualTheBuffer) {
  std::string bytes(3'000'001, 'x');
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<char>(i * 2654435761u >> 13);
  const Digest128 whole = xxh3_128(bytes.data(), bytes.size());
  Xxh3Stream stream;
  for (size_t start = 0; start < bytes.size(); start += 70'001) {
    stream.update(bytes.data() + start, std::min<size_t>(70'001, bytes.size() - start));
  }
  EXPECT_EQ(stream.digest(), whole);
  const std::string path = ::testing::TempDir() + "cambium_digest_test.bin";
  std::ofstream(path, std::ios::binary).write(bytes.data(), static_cast<int64_t>(bytes.size()));
  EXPECT_EQ(xxh3_128_of_file(path), whole);
  std::remove(path.c_str());
}

TEST(Digest, MissingFileIsAnIoError) {
  try {
    xxh3_128_of_file("/nonexistent/file");
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_EQ(error.exit_code(), ExitCode::io);
    EXPECT_NE(std::string(error.what()).find("/nonexistent/file"), std::string::npos);
  }
}

}  // namespace
}  // namespace cambium
