// The product kernel: packs panels of B, runs register tiles over them (reference/gemm.h says what
// is promised and why). One panel of B, 16 KB, serves all rows of a block before the next one is
// used.
#include "reference/gemm.h"

#include <algorithm>

#include "reference/gemm_tile.h"
#include "src/base/check.h"

namespace cambium::reference {

namespace {

constexpr int64_t kColumnBlock = 128;  // packed columns of B at a time: 128 KB
static_assert(kColumnBlock % kTileColumns == 0);

// Transposes eight rows of eight columns: panel[k * 16 + n] = b[n * b_stride + k].
void transpose_8x8(const float* b, int64_t b_stride, float* panel) {
  __m256 row[8], pair[8], quad[8];
  for (int i = 0; i < 8; ++i) row[i] = _mm256_loadu_ps(b + i * b_stride);
  for (int i = 0; i < 8; i += 2) {
    pair[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
    pair[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    quad[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
    quad[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xee);
    quad[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
    quad[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(panel + i * kTileColumns, _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x20));
    _mm256_storeu_ps(panel + (i + 4) * kTileColumns,
                     _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x31));
  }
}

void pack_columns(const float* b, int64_t b_stride, int64_t columns, int64_t depth, float* panel) {
  int64_t whole = 0;  // depth that the vector path covers
  if (columns == kTileColumns) {
    for (; whole + 8 <= depth; whole += 8) {
      transpose_8x8(b + whole, b_stride, panel + whole * kTileColumns);
      transpose_8x8(b + 8 * b_stride + whole, b_stride, panel + whole * kTileColumns + 8);
    }
  }
  for (int64_t k = whole; k < depth; ++k) {
    for (int64_t n = 0; n < kTileColumns; ++n) {
      panel[k * kTileColumns + n] = n < columns ? b[n * b_stride + k] : 0.0f;
    }
  }
}

// Where a tile's results go at the end of a depth block.
enum class TileStart : uint8_t { zero, partial };
enum class TileEnd : uint8_t { partial, result };

struct TileCall {
  const float* a;
  int64_t a_stride;
  const float* panel;
  int64_t depth;
  int64_t columns;
  float* partial;
  int64_t partial_stride;
  TileStart start;
  TileEnd end;
  float* c;
  int64_t c_stride;
  const float* row_scale;
  const float* residual;
  int64_t residual_stride;
};

template <int kRows>
void run_tile(const TileCall& call) {
  Tile<kRows> tile;
  if (call.start == TileStart::zero) {
    tile.clear();
  } else {
    load_tile(tile, call.partial, call.partial_stride, call.columns);
  }
  Tile<kRows>::prefetch(call.end == TileEnd::result ? call.c : call.partial,
                        call.end == TileEnd::result ? call.c_stride : call.partial_stride);
  tile.multiply(call.a, call.a_stride, 1, call.panel, call.depth);
  if (call.end == TileEnd::partial) {
    return store_tile(tile, call.partial, call.partial_stride, call.columns);
  }
  if (call.row_scale != nullptr) tile.scale_rows(call.row_scale);
  if (call.residual != nullptr) {
    Tile<kRows> residual;
    load_tile(residual, call.residual, call.residual_stride, call.columns);
    tile.add(residual);
  }
  store_tile(tile, call.c, call.c_stride, call.columns);
}

// All row panels of one packed panel of B.
void run_panel(const GemmBlock& block, TileCall call) {
  const PanelCut cut(block.rows);
  const float* row_scale = call.row_scale;
  for (int64_t p = 0; p < cut.panels; ++p) {
    with_tile_rows(cut.count(p), [&]<int kRows>() { run_tile<kRows>(call); });
    const int64_t rows = cut.count(p);
    call.a += rows * call.a_stride;
    call.partial += rows * call.partial_stride;
    call.c += rows * call.c_stride;
    if (call.residual != nullptr) call.residual += rows * call.residual_stride;
    if (row_scale != nullptr) call.row_scale += rows;
  }
}

}  // namespace

void pack_panels(const float* b, int64_t b_stride, OperandOrder order, int64_t columns,
                 int64_t depth, float* packed, int64_t panel_stride) {
  const int64_t whole = columns / kTileColumns, rest = columns % kTileColumns;
  if (order == OperandOrder::column_major) {
    for (int64_t p = 0; p * kTileColumns < columns; ++p) {
      const int64_t count = std::min(kTileColumns, columns - p * kTileColumns);
      pack_columns(b + p * kTileColumns * b_stride, b_stride, count, depth,
                   packed + p * panel_stride);
    }
    return;
  }
  for (int64_t k = 0; k < depth; ++k) {
    const float* from = b + k * b_stride;
    float* to = packed + k * kTileColumns;
    for (int64_t p = 0; p < whole; ++p, from += kTileColumns, to += panel_stride) {
      _mm256_storeu_ps(to, _mm256_loadu_ps(from));
      _mm256_storeu_ps(to + 8, _mm256_loadu_ps(from + 8));
    }
    if (rest > 0) {
      std::copy_n(from, rest, to);
      std::fill(to + rest, to + kTileColumns, 0.0f);
    }
  }
}

GemmBlock GemmBlock::part(const GemmPart& part) const {
  GemmBlock result = *this;
  result.rows = part.rows;
  result.columns = part.columns;
  result.a += part.row * a_stride;
  result.b += part.column * (b_order == OperandOrder::depth_major ? 1 : b_stride);
  result.c += part.row * c_stride + part.column;
  if (row_scale != nullptr) result.row_scale += part.row;
  if (residual != nullptr) result.residual += part.row * residual_stride + part.column;
  return result;
}

void gemm_block(const GemmBlock& block, Scratch& scratch) {
  if (block.rows == 0 || block.columns == 0) return;
  float* packed = scratch.floats(
      kPackedBSlot, (kDepthBlock * kTileColumns + kPanelPadding) * (kColumnBlock / kTileColumns));
  // Between depth blocks partial sums live in C, unless C is still needed as the residual.
  const bool aside = block.residual != nullptr && block.depth > kDepthBlock;
  float* aside_data = aside ? scratch.floats(kPartialSlot, block.rows * kColumnBlock) : nullptr;
  for (int64_t n0 = 0; n0 < block.columns; n0 += kColumnBlock) {
    const int64_t n_count = std::min(kColumnBlock, block.columns - n0);
    for (int64_t k0 = 0; k0 == 0 || k0 < block.depth; k0 += kDepthBlock) {
      const int64_t depth = std::min(kDepthBlock, block.depth - k0);
      const bool by_depth = block.b_order == OperandOrder::depth_major;
      const float* b =
          by_depth ? block.b + k0 * block.b_stride + n0 : block.b + n0 * block.b_stride + k0;
      const int64_t panel_stride = depth * kTileColumns + kPanelPadding;
      pack_panels(b, block.b_stride, block.b_order, n_count, depth, packed, panel_stride);
      for (int64_t n = 0; n < n_count; n += kTileColumns) {
        const int64_t column = n0 + n;
        TileCall call{};
        call.a = block.a + k0;
        call.a_stride = block.a_stride;
        call.panel = packed + n / kTileColumns * panel_stride;
        call.depth = depth;
        call.columns = std::min(kTileColumns, n_count - n);
        call.c = block.c + column;
        call.c_stride = block.c_stride;
        call.partial = aside ? aside_data + n : call.c;
        call.partial_stride = aside ? kColumnBlock : block.c_stride;
        call.start = k0 == 0 ? TileStart::zero : TileStart::partial;
        call.end = k0 + depth == block.depth ? TileEnd::result : TileEnd::partial;
        call.row_scale = block.row_scale;
        call.residual = block.residual == nullptr ? nullptr : block.residual + column;
        call.residual_stride = block.residual_stride;
        run_panel(block, call);
      }
    }
  }
}

GemmCut cut_gemm(const GemmExtent& extent) {
  const int64_t row_flops = 2 * extent.columns * extent.depth;
  const int64_t wanted =
      std::clamp(row_flops * extent.op_rows / kChunksPerOp, kMinChunkFlops, kMaxChunkFlops);
  auto half = [](int64_t count, int64_t unit) { return (count / 2 + unit - 1) / unit * unit; };
  GemmCut cut{std::min(extent.rows, kMaxChunkRows), extent.columns};
  auto flops = [&] { return 2 * cut.row_chunk * cut.column_chunk * extent.depth; };
  while (flops() > wanted && cut.column_chunk >= kMinChunkColumns) {
    cut.column_chunk = half(cut.column_chunk, kTileColumns);
  }
  while (flops() > wanted && cut.row_chunk >= 2 * kMinChunkRows) {
    cut.row_chunk = half(cut.row_chunk, kTileRows);
  }
  return cut;
}

}  // namespace cambium::reference
