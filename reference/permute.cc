#include "kernels/permute.h"

#include <cstring>

#include "reference/chunks.h"

namespace cambium::reference {

namespace {

constexpr int64_t kGatherElements = 32768;  // per chunk

}  // namespace

void gather_rows(const GatherRowsArgs& a, Workers& workers) {
  const int64_t T = a.x_TD[0], D = a.x_TD[1], M = a.index_M[0];
  // Rows move as bytes: a copy rounds nothing, and +0 is all zero bits in either storage.
  const int64_t element_bytes = dtype_bytes(a.x_TD.dtype);
  const auto row_bytes = static_cast<size_t>(D * element_bytes);
  const auto* x = static_cast<const std::byte*>(a.x_TD.data);
  auto* y = static_cast<std::byte*>(a.y_MD.data);
  for_ranges(workers, M, items_per_chunk(D, kGatherElements), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const int64_t t = a.index_M.pointer()[m];
      CHECK(t >= -1 && t < T);
      std::byte* row = y + m * a.y_MD.row_stride * element_bytes;
      if (t == -1) {
        std::memset(row, 0, row_bytes);
      } else {
        std::memcpy(row, x + t * a.x_TD.row_stride * element_bytes, row_bytes);
      }
    }
  });
}

void gather_scalars(const GatherScalarsArgs& a, Workers& workers) {
  const int64_t N = a.x_N.elements(), M = a.index_M.elements();
  for_ranges(workers, M, kGatherElements, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      const int64_t source = a.index_M.pointer()[m];
      CHECK(source >= -1 && source < N);
      a.y_M.pointer()[m] = source == -1 ? 0.0f : a.x_N.pointer()[source];
    }
  });
}

void gather_row_blocks(const GatherRowBlocksArgs& a, Workers& workers) {
  const int64_t T = a.token_block_T[0], R = a.row_token_R[0];
  for_ranges(workers, R, kGatherElements, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t t = a.row_token_R.pointer()[r];
      CHECK(t >= -1 && t < T);
      a.row_block_R.pointer()[r] = t == -1 ? -1 : a.token_block_T.pointer()[t];
    }
  });
}

}  // namespace cambium::reference
