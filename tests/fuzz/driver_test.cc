// Runs the fuzz targets on seeded mutations of small valid files, without libFuzzer: the part of
// fuzzing that every test run does.
#include "gtest/gtest.h"
#include "src/checkpoint/safetensors.h"
#include "tests/fuzz/safetensors_mutations.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t bytes);

namespace cambium {
namespace {

TEST(FuzzDriver, MutatedSafetensorsNeverMislead) {
  constexpr int kInputs = 100000;
  MutationRandom random(20260101);
  const std::string sample = sample_safetensors();
  check_safetensors_bytes(sample);
  int accepted = 0;
  for (int i = 0; i < kInputs; ++i) {
    std::string bytes = mutate(sample, random);
    while (random.next() % 2 == 0 && !bytes.empty()) bytes = mutate(bytes, random);
    // Anything but acceptance with every promise kept, or a refusal, throws and fails the test.
    LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size());
    try {
      check_safetensors_bytes(bytes);
      ++accepted;
    } catch (const Error&) {
      continue;
    }
  }
  EXPECT_LT(accepted, kInputs / 2);
  fmt::print("{} mutated safetensors inputs: {} accepted, the rest refused\n", kInputs, accepted);
}

}  // namespace
}  // namespace cambium
