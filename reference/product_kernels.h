// The inner loops of every product on the CPU, compiled for two instruction sets.
//
// An element of a result is one chain of fused multiply-adds in a stated order, so the width of the
// registers that hold neighbouring elements cannot enter it: both sets give the same bits, and the
// processor at hand chooses (D1). The loops are templates over `Row` (reference/tile_row_avx2.h),
// in reference/product_loops.h; nothing else in the program is compiled for AVX-512.
#pragma once

#include <cstdint>

#include "reference/gemm.h"
#include "reference/panel_product.h"
#include "reference/wgrad.h"

namespace cambium::reference {

constexpr int64_t kMaxBatchRows = 256;  // of a weight gradient: a panel of x is 16 KB

// A part of one group's matrix.
struct WgradChunk {
  int64_t group = 0;
  int64_t n_begin = 0;
  int64_t n_count = 0;
  int64_t k_begin = 0;
  int64_t k_count = 0;
};

// Consecutive steps of a plan whose rows are packed together.
struct StepBatch {
  int64_t step_begin = 0;
  int64_t step_end = 0;
  int64_t row_begin = 0;
  int64_t row_end = 0;
  int64_t stack_depth = 0;  // tiles on the stack when the batch starts
};

// A plan cut into batches.
struct StepWalk {
  const WgradStep* steps = nullptr;
  const NodeStore* nodes = nullptr;
  const StepBatch* batches = nullptr;
  int64_t batch_count = 0;
  int64_t stack_tiles = 0;  // most tiles on the stack at once
  bool is_carried = false;  // operands wait on the stack between batches
};

struct ProductKernels {
  void (*gemm_block)(const GemmBlock& block, Scratch& scratch);
  // Rows [row_begin, row_end) of a group into its slot 0, modes `accumulate` and `store`.
  void (*accumulate_chunk)(const WgradGroup& group, const WgradChunk& chunk, Scratch& scratch);
  // The walk of a group's plan, mode `nodes`.
  void (*walk_chunk)(const WgradGroup& group, const WgradChunk& chunk, const StepWalk& walk,
                     Scratch& scratch);
  // Columns [0, columns) of a panel product; whole registers of 16.
  void (*panel_columns)(const PanelProduct& product, int64_t columns);
};

extern const ProductKernels kAvx2Products;
extern const ProductKernels kAvx512Products;

// The widest set that this processor has.
const ProductKernels& product_kernels();

}  // namespace cambium::reference
