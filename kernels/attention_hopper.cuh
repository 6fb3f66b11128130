// What attention asks of Hopper's asynchronous units (kernels/cuda_hopper.cuh): TMA tiles of four
// extents, wgmma shapes, descriptors in uniform registers.
//
// A tile in shared memory is cut into panels of 64 bf16 columns, each [rows][64] with the 128-byte
// swizzle that TMA writes and wgmma reads: 16-byte chunk c of row r lies at chunk c ^ (r % 8).
// The same tile is read K-major (its columns are summed over) and MN-major (its rows are).
// A warpgroup is 4 consecutive warps; thread t of it holds of a 64 x N accumulator d, element i:
//   row 16 (t / 32) + t % 32 / 4 + 8 (i / 2 % 2),  column 8 (i / 4) + 2 (t % 4) + i % 2
// Sources: PTX ISA 9.0, "Asynchronous warpgroup-level matrix instructions", "Tensor copy".
#pragma once

#include "kernels/cuda_hopper.cuh"

namespace cambium::cuda {

constexpr int kPanelColumns = 64;
static_assert(kPanelColumns * sizeof(__nv_bfloat16) == kSwizzleBytes);

// The address in the cluster of what lies at `address` in block `rank`.
__device__ __forceinline__ uint32_t address_in_block(uint32_t address, uint32_t rank) {
  uint32_t mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}
__device__ __forceinline__ void store_in_cluster(uint32_t address, const float* four) {
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(four[0]),
               "f"(four[1]), "f"(four[2]), "f"(four[3])
               : "memory");
}

// ---- TMA -------------------------------------------------------------------------------------

// A box of a [sequences][positions][heads][columns] tensor: where it begins.
struct TileAt {
  int column, head, position, sequence;
};

// Box of `map` into shared memory; elements outside the tensor arrive as zeros.
__device__ __forceinline__ void tma_load(const CUtensorMap* map, uint64_t* barrier, void* to,
                                         TileAt at) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(at.column), "r"(at.head), "r"(at.position),
      "r"(at.sequence)
      : "memory");
}

// Box from shared memory; elements outside the tensor are not written.
__device__ __forceinline__ void tma_store(const CUtensorMap* map, const void* from, TileAt at) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
          map),
      "r"(shared_address(from)), "r"(at.column), "r"(at.head), "r"(at.position), "r"(at.sequence)
      : "memory");
}
// 4 bytes, or zeros where `bytes` is 0; asynchronous.
__device__ __forceinline__ void copy_4(void* to, const void* from, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(bytes)
               : "memory");
}
// ---- wgmma -----------------------------------------------------------------------------------

// A shared-memory operand is a descriptor of 64 bits; here it is its low half, and the high half is
// the same for all: 128-byte swizzle, groups of 8 rows follow each other.
constexpr uint32_t kDescriptorHigh = 1u << 30 | 8 * kSwizzleBytes >> 4;

// The value of lane 0, which the compiler then knows to be the same in all lanes: descriptors live
// in uniform registers, and moving them there for every wgmma would cost more than short ones take.
__device__ __forceinline__ uint32_t uniform(uint32_t value) {
  return __shfl_sync(kAllLanes, value, 0);
}

// NOTE: in a cluster an address carries the block's rank above these bits.
constexpr uint32_t kAddressMask = 0x3ffff;

// A tile whose columns are summed over (K-major): a step of 16 columns is 32 bytes.
__device__ __forceinline__ uint32_t operand_k_major(uint32_t address) {
  return uniform(1u << 16 | (address & kAddressMask) >> 4);
}

// The same tile with its columns as N and its rows summed over: panels of 64 columns lie
// `panel_bytes` apart; a step of 16 rows is 16 * 128 bytes.
__device__ __forceinline__ uint32_t operand_mn_major(uint32_t address, uint32_t panel_bytes) {
  return uniform((panel_bytes >> 4) << 16 | (address & kAddressMask) >> 4);
}

// d = A B^T: A [64][16] and B [64][16] in shared memory, both K-major.
__device__ __forceinline__ void wgmma_64x64_first(float (&d)[32], uint32_t a, uint32_t b) {
  asm volatile(
      "{\n.reg .b64 da, db;\nmov.b64 da, {%32, %34};\nmov.b64 db, {%33, %34};\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, "
      "%30, %31 "
      "}, da, db, 0, 1, 1, 0, 0;\n}\n"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3]), "=f"(d[4]), "=f"(d[5]), "=f"(d[6]),
        "=f"(d[7]), "=f"(d[8]), "=f"(d[9]), "=f"(d[10]), "=f"(d[11]), "=f"(d[12]), "=f"(d[13]),
        "=f"(d[14]), "=f"(d[15]), "=f"(d[16]), "=f"(d[17]), "=f"(d[18]), "=f"(d[19]), "=f"(d[20]),
        "=f"(d[21]), "=f"(d[22]), "=f"(d[23]), "=f"(d[24]), "=f"(d[25]), "=f"(d[26]), "=f"(d[27]),
        "=f"(d[28]), "=f"(d[29]), "=f"(d[30]), "=f"(d[31])
      : "r"(a), "r"(b), "r"(kDescriptorHigh));
}

// d += A B^T
__device__ __forceinline__ void wgmma_64x64(float (&d)[32], uint32_t a, uint32_t b) {
  asm volatile(
      "{\n.reg .b64 da, db;\nmov.b64 da, {%32, %34};\nmov.b64 db, {%33, %34};\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, "
      "%30, %31 "
      "}, da, db, 1, 1, 1, 0, 0;\n}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
        "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
        "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "r"(a), "r"(b), "r"(kDescriptorHigh));
}

// The same with B [128][16].
__device__ __forceinline__ void wgmma_64x128_first(float (&d)[64], uint32_t a, uint32_t b) {
  asm volatile(
      "{\n.reg .b64 da, db;\nmov.b64 da, {%64, %66};\nmov.b64 db, {%65, %66};\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, "
      "%30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, "
      "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, "
      "%58, %59, %60, %61, %62, %63 "
      "}, da, db, 0, 1, 1, 0, 0;\n}\n"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3]), "=f"(d[4]), "=f"(d[5]), "=f"(d[6]),
        "=f"(d[7]), "=f"(d[8]), "=f"(d[9]), "=f"(d[10]), "=f"(d[11]), "=f"(d[12]), "=f"(d[13]),
        "=f"(d[14]), "=f"(d[15]), "=f"(d[16]), "=f"(d[17]), "=f"(d[18]), "=f"(d[19]), "=f"(d[20]),
        "=f"(d[21]), "=f"(d[22]), "=f"(d[23]), "=f"(d[24]), "=f"(d[25]), "=f"(d[26]), "=f"(d[27]),
        "=f"(d[28]), "=f"(d[29]), "=f"(d[30]), "=f"(d[31]), "=f"(d[32]), "=f"(d[33]), "=f"(d[34]),
        "=f"(d[35]), "=f"(d[36]), "=f"(d[37]), "=f"(d[38]), "=f"(d[39]), "=f"(d[40]), "=f"(d[41]),
        "=f"(d[42]), "=f"(d[43]), "=f"(d[44]), "=f"(d[45]), "=f"(d[46]), "=f"(d[47]), "=f"(d[48]),
        "=f"(d[49]), "=f"(d[50]), "=f"(d[51]), "=f"(d[52]), "=f"(d[53]), "=f"(d[54]), "=f"(d[55]),
        "=f"(d[56]), "=f"(d[57]), "=f"(d[58]), "=f"(d[59]), "=f"(d[60]), "=f"(d[61]), "=f"(d[62]),
        "=f"(d[63])
      : "r"(a), "r"(b), "r"(kDescriptorHigh));
}

__device__ __forceinline__ void wgmma_64x128(float (&d)[64], uint32_t a, uint32_t b) {
  asm volatile(
      "{\n.reg .b64 da, db;\nmov.b64 da, {%64, %66};\nmov.b64 db, {%65, %66};\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, "
      "%30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, "
      "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, "
      "%58, %59, %60, %61, %62, %63 "
      "}, da, db, 1, 1, 1, 0, 0;\n}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
        "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
        "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]),
        "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]),
        "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),
        "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
        "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]),
        "+f"(d[63])
      : "r"(a), "r"(b), "r"(kDescriptorHigh));
}

// d += A B: A [64][16] in registers, two bf16 each as the accumulator's layout packs; B [16][64]
// in shared memory, MN-major.
__device__ __forceinline__ void wgmma_64x64(float (&d)[32], const uint32_t* a, uint32_t b) {
  asm volatile(
      "{\n.reg .b64 db;\nmov.b64 db, {%36, %37};\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, "
      "%30, %31 "
      "}, {%32, %33, %34, %35}, db, 1, 1, 1, 1;\n}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
        "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
        "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(kDescriptorHigh));
}

// The same with B [16][128].
__device__ __forceinline__ void wgmma_64x128(float (&d)[64], const uint32_t* a, uint32_t b) {
  asm volatile(
      "{\n.reg .b64 db;\nmov.b64 db, {%68, %69};\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, "
      "%30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, "
      "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, "
      "%58, %59, %60, %61, %62, %63 "
      "}, {%64, %65, %66, %67}, db, 1, 1, 1, 1;\n}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
        "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
        "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]),
        "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]),
        "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),
        "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
        "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]),
        "+f"(d[63])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(kDescriptorHigh));
}

// d = A B^T over kDepth columns: A [64][kDepth] is part of a tile of kRowsA rows, B is a whole tile
// of 2 kElements rows. Descriptors of the first panels.
enum class Start { zero, accumulate };
template <int kDepth, int kRowsA, Start kStart = Start::zero, int kElements>
__device__ __forceinline__ void tile_product_abt(float (&d)[kElements], uint32_t a, uint32_t b) {
  constexpr int kStepsPerPanel = kPanelColumns / 16, kRowsB = 2 * kElements;
#pragma unroll
  for (int step = 0; step < kDepth / 16; ++step) {
    const int panel = step / kStepsPerPanel, offset = step % kStepsPerPanel * 32;
    const uint32_t a_at = a + ((panel * kRowsA * kSwizzleBytes + offset) >> 4);
    const uint32_t b_at = b + ((panel * kRowsB * kSwizzleBytes + offset) >> 4);
    if constexpr (kElements == 64) {
      step == 0 && kStart == Start::zero ? wgmma_64x128_first(d, a_at, b_at)
                                         : wgmma_64x128(d, a_at, b_at);
    } else {
      static_assert(kElements == 32);
      step == 0 && kStart == Start::zero ? wgmma_64x64_first(d, a_at, b_at)
                                         : wgmma_64x64(d, a_at, b_at);
    }
  }
}

// d += A B over kDepth rows of B: A in registers, B a tile of 2 kElements columns, MN-major.
template <int kDepth, int kElements>
__device__ __forceinline__ void tile_product_ab(float (&d)[kElements],
                                                const uint32_t (&a)[kDepth / 4], uint32_t b) {
#pragma unroll
  for (int step = 0; step < kDepth / 16; ++step) {
    const uint32_t b_at = b + ((step * 16 * kSwizzleBytes) >> 4);
    if constexpr (kElements == 64) {
      wgmma_64x128(d, a + 4 * step, b_at);
    } else {
      static_assert(kElements == 32);
      wgmma_64x64(d, a + 4 * step, b_at);
    }
  }
}

}  // namespace cambium::cuda
