// libFuzzer target: the safetensors header parser. Built with -DCAMBIUM_FUZZ=ON and clang.
//
// Run: build/fuzz/safetensors_fuzz -max_len=4096 corpus/. An input either is refused with exit
// code 30 or 34, or satisfies every promise of the reader; anything else stops the fuzzer.
#include <cstddef>
#include <cstdint>

#include "tests/fuzz/safetensors_mutations.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t bytes) {
  try {
    cambium::check_safetensors_bytes(std::string(reinterpret_cast<const char*>(data), bytes));
  } catch (const cambium::Error& error) {
    if (error.exit_code() != cambium::ExitCode::corrupt_file &&
        error.exit_code() != cambium::ExitCode::unsafe_file) {
      throw;
    }
  }
  return 0;
}
