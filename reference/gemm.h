// The product kernel of the CPU path: register tiles of 16 columns over packed operands.
//
// Every element of C is one chain of fused multiply-adds over the contracted index, ascending, from
// zero (or from C). Neither tile shape, nor depth blocks, nor the cut into chunks enters the chain:
// a row's bits depend on that row and on B alone (D2), on any x86-64-v3 machine (D1), and the
// oracle is a plain loop over __builtin_fmaf.
// Eigen's products change bits with the row count; with rows padded to panels of 16 they do not,
// but reach 79-84 GFLOP/s where this reaches 94-101 (32 to 64 rows, N 512, K 128, one thread; the
// FMA ceiling is 117).
#pragma once

#include <cstdint>

#include "src/base/workers.h"

namespace cambium::reference {

constexpr int64_t kTileColumns = 16;  // two AVX registers, one of AVX-512
constexpr int64_t kDepthBlock = 256;  // a panel of B is 16 KB: half of a first-level cache

enum class OperandOrder : uint8_t {
  depth_major,   // b[k * b_stride + n]: B as stored for input gradients
  column_major,  // b[n * b_stride + k]: a weight [N, K] in the forward pass
};

// A part of a product: rows and columns of C.
struct GemmPart {
  int64_t row = 0;
  int64_t rows = 0;
  int64_t column = 0;
  int64_t columns = 0;
};

// C = row_scale * (A B) + residual on one block of rows and columns.
struct GemmBlock {
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t depth = 0;
  const float* a = nullptr;  // a[m * a_stride + k]
  int64_t a_stride = 0;
  const float* b = nullptr;
  int64_t b_stride = 0;
  OperandOrder b_order = OperandOrder::depth_major;
  float* c = nullptr;
  int64_t c_stride = 0;
  const float* row_scale = nullptr;  // optional: multiplies each row of the product
  const float* residual = nullptr;   // optional: added last; may be C's own memory
  int64_t residual_stride = 0;

  GemmBlock part(const GemmPart& part) const;
};

// Scratch slots that the product kernels use; slots from kFirstFreeSlot on are the caller's.
constexpr int kPackedBSlot = 0;
constexpr int kPackedASlot = 1;
constexpr int kPartialSlot = 2;
constexpr int kFirstFreeSlot = 3;

void gemm_block(const GemmBlock& block, Scratch& scratch);

// Cut of a product (of one expert's, say) into chunks that threads claim, by the problem alone:
// about kChunksPerOp of them over all rows of the op. Columns are halved first: a chunk packs its
// columns of B, so that cutting rows packs B again, while A is read in place.
struct GemmCut {
  int64_t row_chunk = 0;
  int64_t column_chunk = 0;
};
struct GemmExtent {
  int64_t rows = 0;
  int64_t op_rows = 0;  // rows of all products of the op
  int64_t columns = 0;
  int64_t depth = 0;
};
constexpr int64_t kChunksPerOp = 16;
constexpr int64_t kMinChunkFlops = 1 << 19;  // about 5 us
constexpr int64_t kMaxChunkFlops = 16 << 20;
constexpr int64_t kMaxChunkRows = 256;  // A stays in the second-level cache
constexpr int64_t kMinChunkRows = 96;   // packing B costs a few percent of the product
constexpr int64_t kMinChunkColumns = 4 * kTileColumns;  // fewer are not halved: A is read per chunk
GemmCut cut_gemm(const GemmExtent& extent);

}  // namespace cambium::reference
