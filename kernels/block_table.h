// What each 4,096-element block of a flat buffer is: a row on the device for every block, so that
// one call of an op serves all tensors of the buffer (src/parallel/param_group.h), each of which
// begins on a block. Napkin: 12 bytes beside the 16 KB of a block.
#pragma once

#include "kernels/op.h"
#include "src/base/digest.h"

namespace cambium {

constexpr int64_t kTableBlockElements = kDigestBlockElements;

enum BlockColumn : int {
  kBlockElements = 0,   // from its begin on; fewer at the end of a tensor, 0 = padding
  kBlockCanonical = 1,  // number among the blocks of all canonical tensors: the same in any layout
  kBlockDecays = 2,     // 1: AdamW decays its weights
  kBlockColumns = 3,
};

struct BlockTable {
  In<int32_t> block_BC;
  int64_t elements = 0;  // of the tensors; the rest of the buffer is padding
};

inline void check_block_table(const char* op, const BlockTable& table, int64_t buffer_elements) {
  const int64_t blocks = (buffer_elements + kTableBlockElements - 1) / kTableBlockElements;
  check_shape(op, "block_BC", table.block_BC, Shape(blocks, int64_t{kBlockColumns}));
  CHECK(table.block_BC.is_contiguous());
  CHECK_LE(table.elements, buffer_elements);
}

template <class Visitor>
void visit_views(const BlockTable& table, Visitor&& visit) {
  visit("block_BC", table.block_BC);
}

}  // namespace cambium
