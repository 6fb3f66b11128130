// Cases of copy, zero, cast and scale: sizes around the vector width and the chunk of a thread.
#pragma once

#include <cstdint>
#include <vector>

namespace cambium::test {

inline std::vector<int64_t> copy_case_sizes() { return {1, 7, 8, 9, 4096, 4097, (1 << 18) + 3}; }

}  // namespace cambium::test
