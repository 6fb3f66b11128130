// The loops of reference/product_kernels.h, for one kind of `Row`.
//
// Everything here is a template over Row, calls nothing of the standard library and defines no
// inline function of its own name: the file that instantiates it for AVX-512 must not emit a symbol
// that other files could be linked to (the test `isa` looks).
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <utility>

#include "reference/product_kernels.h"

namespace cambium::reference {

constexpr int64_t kColumnBlock = 128;  // packed columns of B at a time: 128 KB
static_assert(kColumnBlock % kTileColumns == 0);

// Between panels: consecutive panels start in different cache sets, else packing evicts itself.
constexpr int64_t kPanelPadding = kTileColumns;

constexpr int64_t kPrefetchedRows = 16;  // strided rows, which no hardware prefetcher follows
constexpr int64_t kPackedRows = 16;      // that are packed together

constexpr int64_t kGroupTiles = 16;  // one level of their stacks is 6 or 12 KB

template <class Row>
struct ProductLoops {
  static constexpr int kTileRows = Row::kTileRows;
  static constexpr int kTileFloats = kTileRows * static_cast<int>(kTileColumns);

  static constexpr int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }

  // Calls body.template operator()<i>() for i = 0 .. kCount - 1, expanded by the compiler:
  // accumulators indexed by constants stay in registers, those indexed by a variable do not.
  template <int kCount, class Body>
  [[gnu::always_inline]] static void unrolled(Body&& body) {
    [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
      (body.template operator()<i>(), ...);
    }
    (std::make_integer_sequence<int, kCount>());
  }

  // kRows x 16 accumulators.
  template <int kRows>
  struct Tile {
    Row row[kRows];

    [[gnu::always_inline]] void clear() {
      unrolled<kRows>([&]<int i>() __attribute__((always_inline)) { row[i] = Row::zero(); });
    }
    [[gnu::always_inline]] void load(const float* c, int64_t c_stride) {
      unrolled<kRows>([&]<int i>()
                          __attribute__((always_inline)) { row[i] = Row::load(c + i * c_stride); });
    }
    [[gnu::always_inline]] void store(float* c, int64_t c_stride) const {
      unrolled<kRows>([&]<int i>()
                          __attribute__((always_inline)) { row[i].store(c + i * c_stride); });
    }
    // this = c + this
    [[gnu::always_inline]] void add_left(const float* c, int64_t c_stride) {
      unrolled<kRows>([&]<int i>() __attribute__((always_inline)) {
        row[i] = Row::load(c + i * c_stride).plus(row[i]);
      });
    }
    // this = this + right
    [[gnu::always_inline]] void add(const Tile& right) {
      unrolled<kRows>([&]<int i>()
                          __attribute__((always_inline)) { row[i] = row[i].plus(right.row[i]); });
    }
    [[gnu::always_inline]] void scale_rows(const float* scale) {
      unrolled<kRows>([&]<int i>() __attribute__((always_inline)) {
        row[i] = row[i].times(Row::broadcast(scale + i));
      });
    }
    // Asks for the cache lines that `store` will write, so that they arrive during the product.
    [[gnu::always_inline]] static void prefetch(const float* c, int64_t c_stride) {
      unrolled<kRows>([&]<int i>() __attribute__((always_inline)) {
        __builtin_prefetch(c + i * c_stride, 1);
        __builtin_prefetch(c + i * c_stride + kTileColumns - 1, 1);
      });
    }
    // Continues the chains over `depth` terms: A[i][k] = a[i * a_row + k * a_step], B's row k at
    // b + k * b_step.
    [[gnu::always_inline]] void multiply(const float* a, int64_t a_row, int64_t a_step,
                                         const float* b, int64_t b_step, int64_t depth) {
      Tile sum = *this;
      for (int64_t k = 0; k < depth; ++k) {
        const Row b_row = Row::load(b);
        unrolled<kRows>([&]<int i>() __attribute__((always_inline)) {
          sum.row[i].fuse(Row::broadcast(a + i * a_row), b_row);
        });
        a += a_step;
        b += b_step;
      }
      *this = sum;
    }
  };

  static void copy(const float* from, int64_t count, float* to) {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
  }

  // A tile of fewer than 16 columns goes through a full one on the stack.
  template <int kRows>
  [[gnu::always_inline]] static void load_tile(Tile<kRows>& tile, const float* c, int64_t c_stride,
                                               int64_t columns) {
    if (columns == kTileColumns) return tile.load(c, c_stride);
    alignas(64) float full[kTileFloats] = {};
    for (int i = 0; i < kRows; ++i) copy(c + i * c_stride, columns, full + i * kTileColumns);
    tile.load(full, kTileColumns);
  }

  template <int kRows>
  [[gnu::always_inline]] static void store_tile(const Tile<kRows>& tile, float* c, int64_t c_stride,
                                                int64_t columns) {
    if (columns == kTileColumns) return tile.store(c, c_stride);
    alignas(64) float full[kTileFloats];
    tile.store(full, kTileColumns);
    for (int i = 0; i < kRows; ++i) copy(full + i * kTileColumns, columns, c + i * c_stride);
  }

  // Cut of `rows` into the fewest panels of at most kTileRows, as even as possible: the first
  // `longer` panels have `base` + 1 rows. (Even panels keep enough chains in flight.)
  struct PanelCut {
    int64_t panels = 0;
    int64_t base = 0;
    int64_t longer = 0;

    explicit PanelCut(int64_t rows)
        : panels((rows + kTileRows - 1) / kTileRows),
          base(panels == 0 ? 0 : rows / panels),
          longer(panels == 0 ? 0 : rows % panels) {}
    int64_t begin(int64_t panel) const { return panel * base + lesser(panel, longer); }
    int64_t count(int64_t panel) const { return base + (panel < longer ? 1 : 0); }
  };

  // Calls run.template operator()<rows>() for a run-time row count of 1..kTileRows.
  template <int kMost = kTileRows, class Run>
  [[gnu::always_inline]] static void with_tile_rows(int64_t rows, Run&& run) {
    if constexpr (kMost > 1) {
      if (rows != kMost) return with_tile_rows<kMost - 1>(rows, run);
    }
    run.template operator()<kMost>();
  }

  // --- A product ---

  // Transposes eight rows of eight columns: panel[k * 16 + n] = b[n * b_stride + k].
  static void transpose_8x8(const float* b, int64_t b_stride, float* panel) {
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
      _mm256_storeu_ps(panel + i * kTileColumns,
                       _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x20));
      _mm256_storeu_ps(panel + (i + 4) * kTileColumns,
                       _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x31));
    }
  }

  static void pack_columns(const float* b, int64_t b_stride, int64_t columns, int64_t depth,
                           float* panel) {
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

  // Packs B[depth][columns] into panels of 16 columns, each [depth][16], `panel_stride` apart, with
  // zeros beyond `columns`.
  static void pack_panels(const float* b, int64_t b_stride, OperandOrder order, int64_t columns,
                          int64_t depth, float* packed, int64_t panel_stride) {
    if (order == OperandOrder::column_major) {
      for (int64_t p = 0; p * kTileColumns < columns; ++p) {
        pack_columns(b + p * kTileColumns * b_stride, b_stride,
                     lesser(kTileColumns, columns - p * kTileColumns), depth,
                     packed + p * panel_stride);
      }
      return;
    }
    pack_rows(Rows{b, b_stride}, columns, depth, packed, panel_stride);
  }

  // Rows that lie side by side, or where `index` says.
  struct Rows {
    const float* data;
    int64_t stride;
    const int32_t* index = nullptr;
    [[gnu::always_inline]] const float* at(int64_t row) const {
      return data + (index == nullptr ? row : index[row]) * stride;
    }
    Rows from(int64_t row, int64_t column) const {
      if (index == nullptr) return {data + row * stride + column, stride};
      return {data + column, stride, index + row};
    }
  };

  static void pack_rows(const Rows& rows, int64_t columns, int64_t depth, float* packed,
                        int64_t panel_stride) {
    const int64_t whole = columns / kTileColumns, rest = columns % kTileColumns;
    for (int64_t k = 0; k < depth; ++k) {
      const float* from = rows.at(k);
      const float* ahead = rows.at(lesser(k + kPrefetchedRows, depth - 1));
      float* to = packed + k * kTileColumns;
      for (int64_t p = 0; p < whole; ++p) {
        __builtin_prefetch(ahead);
        Row::load(from).store(to);
        from += kTileColumns, ahead += kTileColumns, to += panel_stride;
      }
      if (rest > 0) {
        for (int64_t n = 0; n < kTileColumns; ++n) to[n] = n < rest ? from[n] : 0.0f;
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
  static void run_tile(const TileCall& call) {
    Tile<kRows> tile;
    if (call.start == TileStart::zero) {
      tile.clear();
    } else {
      load_tile(tile, call.partial, call.partial_stride, call.columns);
    }
    Tile<kRows>::prefetch(call.end == TileEnd::result ? call.c : call.partial,
                          call.end == TileEnd::result ? call.c_stride : call.partial_stride);
    tile.multiply(call.a, call.a_stride, 1, call.panel, kTileColumns, call.depth);
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
  static void run_panel(const GemmBlock& block, TileCall call) {
    const PanelCut cut(block.rows);
    for (int64_t p = 0; p < cut.panels; ++p) {
      const int64_t rows = cut.count(p);
      with_tile_rows(rows, [&]<int kRows>() { run_tile<kRows>(call); });
      call.a += rows * call.a_stride;
      call.partial += rows * call.partial_stride;
      call.c += rows * call.c_stride;
      if (call.residual != nullptr) call.residual += rows * call.residual_stride;
      if (call.row_scale != nullptr) call.row_scale += rows;
    }
  }

  static void gemm_block(const GemmBlock& block, Scratch& scratch) {
    if (block.rows == 0 || block.columns == 0) return;
    float* packed = scratch.floats(
        kPackedBSlot, (kDepthBlock * kTileColumns + kPanelPadding) * (kColumnBlock / kTileColumns));
    // Between depth blocks partial sums live in C, unless C is still needed as the residual.
    const bool aside = block.residual != nullptr && block.depth > kDepthBlock;
    float* aside_data = aside ? scratch.floats(kPartialSlot, block.rows * kColumnBlock) : nullptr;
    for (int64_t n0 = 0; n0 < block.columns; n0 += kColumnBlock) {
      const int64_t n_count = lesser(kColumnBlock, block.columns - n0);
      for (int64_t k0 = 0; k0 == 0 || k0 < block.depth; k0 += kDepthBlock) {
        const int64_t depth = lesser(kDepthBlock, block.depth - k0);
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
          call.columns = lesser(kTileColumns, n_count - n);
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

  // --- A weight gradient ---

  // d_y columns of a batch as panels [rows][panel's columns], x columns as panels [rows][16].
  struct PackedBatch {
    float* a = nullptr;
    float* b = nullptr;
    int64_t rows = 0;
    int64_t a_panel_stride() const { return rows * kTileRows + kPanelPadding; }
    int64_t b_panel_stride() const { return rows * kTileColumns + kPanelPadding; }
  };

  // Columns of `rows` rows into panels of kRows, [row][kRows] each. A few rows at a time: they stay
  // in the first-level cache, and a panel is written a few lines in a row.
  template <int kRows>
  static void pack_row_panels(const Rows& from, int64_t panels, int64_t rows, int64_t panel_stride,
                              float* to) {
    const float *source[kPackedRows], *ahead[kPackedRows];
    for (int64_t row = 0; row < rows; row += kPackedRows) {
      const int64_t count = lesser(kPackedRows, rows - row);
      for (int64_t i = 0; i < count; ++i) {
        source[i] = from.at(row + i);
        ahead[i] = from.at(lesser(row + i + kPackedRows, rows - 1));
      }
      for (int64_t p = 0; p < panels; ++p) {
        float* target = to + p * panel_stride + row * kRows;
        for (int64_t i = 0; i < count; ++i, target += kRows) {
          __builtin_prefetch(ahead[i] + p * kRows);
          __builtin_memcpy(target, source[i] + p * kRows, kRows * sizeof(float));
        }
      }
    }
  }

  static PackedBatch pack_batch(const WgradGroup& group, const WgradChunk& chunk, int64_t row_begin,
                                int64_t rows, Scratch& scratch) {
    const PanelCut cut(chunk.n_count);
    const int64_t b_panels = (chunk.k_count + kTileColumns - 1) / kTileColumns;
    PackedBatch packed;
    packed.rows = rows;
    packed.a = scratch.floats(kPackedASlot, cut.panels * packed.a_panel_stride());
    packed.b = scratch.floats(kPackedBSlot, b_panels * packed.b_panel_stride());
    pack_rows(Rows{group.x, group.x_stride, group.x_row}.from(row_begin, chunk.k_begin),
              chunk.k_count, rows, packed.b, packed.b_panel_stride());
    const Rows d_y =
        Rows{group.d_y, group.d_y_stride, group.d_y_row}.from(row_begin, chunk.n_begin);
    if (cut.longer > 0) {
      with_tile_rows(cut.base + 1, [&]<int kRows>() {
        pack_row_panels<kRows>(d_y, cut.longer, rows, packed.a_panel_stride(), packed.a);
      });
    }
    with_tile_rows(cut.base, [&]<int kRows>() {
      pack_row_panels<kRows>(d_y.from(0, cut.begin(cut.longer)), cut.panels - cut.longer, rows,
                             packed.a_panel_stride(),
                             packed.a + cut.longer * packed.a_panel_stride());
    });
    return packed;
  }

  // Tiles of the same height in one panel of x, below each other. They are walked together, step by
  // step: the branches of a step depend on the step alone, so only the first tile can mispredict.
  struct TileGroup {
    const float* a = nullptr;  // panel of the first tile; the next one is a_stride further
    int64_t a_stride = 0;
    const float* b = nullptr;
    int64_t count = 0;
    int64_t n = 0;  // place in the whole matrix
    int64_t k = 0;
    int64_t columns = 0;
    int64_t tile_index = 0;  // of the first tile in the chunk
  };

  // Calls run.template operator()<rows>(group) for every group of register tiles of the chunk.
  template <class Run>
  static void for_each_tile_group(const WgradChunk& chunk, const PackedBatch& packed, Run&& run) {
    const PanelCut cut(chunk.n_count);
    TileGroup group;
    group.a_stride = packed.a_panel_stride();
    group.b = packed.b;
    for (int64_t k = 0; k < chunk.k_count; k += kTileColumns, group.b += packed.b_panel_stride()) {
      group.k = chunk.k_begin + k;
      group.columns = lesser(kTileColumns, chunk.k_count - k);
      for (int64_t p = 0; p < cut.panels; p += group.count) {
        const int64_t same_height = p < cut.longer ? cut.longer : cut.panels;
        group.count = lesser(kGroupTiles, same_height - p);
        group.a = packed.a + p * packed.a_panel_stride();
        group.n = chunk.n_begin + cut.begin(p);
        with_tile_rows(cut.count(p), [&]<int kRows>() { run.template operator()<kRows>(group); });
        group.tile_index += group.count;
      }
    }
  }

  static void accumulate_chunk(const WgradGroup& group, const WgradChunk& chunk, Scratch& scratch) {
    bool stores = group.mode == GradMode::store;  // at least once, whatever the row count
    for (int64_t row = group.row_begin; row < group.row_end || stores; row += kMaxBatchRows) {
      const int64_t rows = lesser(kMaxBatchRows, group.row_end - row);
      const PackedBatch packed = pack_batch(group, chunk, row, rows, scratch);
      for_each_tile_group(chunk, packed, [&]<int kRows>(const TileGroup& tiles) {
        for (int64_t i = 0; i < tiles.count; ++i) {
          float* c = group.slots + (tiles.n + i * kRows) * group.K + tiles.k;
          Tile<kRows> tile;
          if (stores) {
            tile.clear();
          } else {
            load_tile(tile, c, group.K, tiles.columns);
          }
          tile.multiply(tiles.a + i * tiles.a_stride, 1, kRows, tiles.b, kTileColumns, rows);
          store_tile(tile, c, group.K, tiles.columns);
        }
      });
      stores = false;
    }
  }

  // Folds the left slots into a finished node's value and stores it. The value comes through
  // memory, so that the tiles of the walk itself stay in registers.
  template <int kRows>
  static void finish_node(const WgradGroup& group, const NodeStore& store, const float* value,
                          int64_t offset, int64_t columns) {
    Tile<kRows> tile;
    tile.load(value, kTileColumns);
    bool has_value = store.value_present;
    for (int32_t f = 0; f < store.fold_count; ++f) {
      Tile<kRows> left;
      load_tile(left, group.slots + store.folds[f] * group.slot_stride + offset, group.K, columns);
      if (has_value) left.add(tile);
      tile = left;
      has_value = true;
    }
    store_tile(tile, group.slots + store.destination * group.slot_stride + offset, group.K,
               columns);
  }

  // Runs a batch of steps on a group of tiles. `stack` holds their unfinished operands, the tiles
  // of one level next to each other.
  template <int kRows>
  static void walk_tiles(const WgradGroup& group, const StepWalk& walk, const StepBatch& batch,
                         const TileGroup& tiles, float* stack) {
    const int64_t level_floats = tiles.count * kTileFloats;
    float* top = stack + batch.stack_depth * level_floats;
    for (int64_t s = batch.step_begin; s < batch.step_end; ++s) {
      const WgradStep& step = walk.steps[s];
      const int64_t row = step.row_begin - batch.row_begin, rows = step.row_end - step.row_begin;
      float* value = top - step.merges * level_floats;
      for (int64_t i = 0; i < tiles.count; ++i) {
        Tile<kRows> tile;
        tile.clear();
        tile.multiply(tiles.a + i * tiles.a_stride + row * kRows, 1, kRows,
                      tiles.b + row * kTileColumns, kTileColumns, rows);
        for (int32_t m = 1; m <= step.merges; ++m) {
          tile.add_left(top - m * level_floats + i * kTileFloats, kTileColumns);
        }
        tile.store(value + i * kTileFloats, kTileColumns);
      }
      top = value;
      if (step.node < 0) {
        top += level_floats;
        continue;
      }
      for (int64_t i = 0; i < tiles.count; ++i) {
        finish_node<kRows>(group, walk.nodes[step.node], top + i * kTileFloats,
                           (tiles.n + i * kRows) * group.K + tiles.k, tiles.columns);
      }
    }
  }

  static void walk_chunk(const WgradGroup& group, const WgradChunk& chunk, const StepWalk& walk,
                         Scratch& scratch) {
    const int64_t tiles =
        PanelCut(chunk.n_count).panels * ((chunk.k_count + kTileColumns - 1) / kTileColumns);
    // One stack serves all tile groups in turn, unless operands wait across batches.
    const int64_t stack_floats = walk.stack_tiles * kTileFloats;
    float* stack =
        scratch.floats(kPartialSlot, (walk.is_carried ? tiles : kGroupTiles) * stack_floats);
    for (int64_t i = 0; i < walk.batch_count; ++i) {
      const StepBatch& batch = walk.batches[i];
      const PackedBatch packed =
          pack_batch(group, chunk, batch.row_begin, batch.row_end - batch.row_begin, scratch);
      for_each_tile_group(chunk, packed, [&]<int kRows>(const TileGroup& tiles) {
        walk_tiles<kRows>(group, walk, batch, tiles,
                          stack + (walk.is_carried ? tiles.tile_index * stack_floats : 0));
      });
    }
  }

  // --- A product on panels in the first-level cache ---

  template <int kRows>
  static void panel_tile(const PanelProduct& p, int64_t row, int64_t column) {
    Tile<kRows> tile;
    tile.clear();
    tile.multiply(p.a + row * p.a_row, p.a_row, p.a_column, p.b + column, p.b_row, p.depth);
    float* c = p.c + row * p.c_row + column;
    if (p.combine != PanelCombine::store) {
      Tile<kRows> old;
      old.load(c, p.c_row);
      if (p.combine == PanelCombine::scale_add) old.scale_rows(p.row_scale + row);
      old.add(tile);
      tile = old;
    }
    tile.store(c, p.c_row);
  }

  static void panel_columns(const PanelProduct& p, int64_t columns) {
    const PanelCut cut(p.rows);
    for (int64_t column = 0; column < columns; column += kTileColumns) {
      int64_t row = 0;
      for (int64_t panel = 0; panel < cut.panels; ++panel) {
        with_tile_rows(cut.count(panel), [&]<int kRows>() { panel_tile<kRows>(p, row, column); });
        row += cut.count(panel);
      }
    }
  }

  static constexpr ProductKernels kernels() {
    return {&gemm_block, &accumulate_chunk, &walk_chunk, &panel_columns};
  }
};

}  // namespace cambium::reference
