// Merging and finishing gradient nodes on the GPU: pieces of groups, 16 bytes an access. Flags
// change in a kernel of their own, after every piece has read them.
#include "kernels/grad_merge.h"

#include "kernels/cuda_launch.cuh"

namespace cambium::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kVectorsPerThread = 4;

// The groups of one slot, and their presence.
template <class Data, class Flags>
struct SlotGroups {
  Data* data;
  int64_t group_stride;
  Flags* present;
};

struct MergeSlots {
  SlotGroups<const float, const uint8_t> left, right;
  SlotGroups<float, uint8_t> to;  // finish: without flags
  int64_t N;
  int64_t groups, pieces;  // of a group
};

// out = left + right where both are there, else the one that is; zeros where neither is and
// `kFillsAbsent`.
template <int kVec, bool kFillsAbsent>
__global__ void __launch_bounds__(kThreads) merge_kernel(const MergeSlots a) {
  const int64_t group = blockIdx.x / a.pieces;
  const int64_t first = blockIdx.x % a.pieces * (kThreads * kVectorsPerThread * kVec);
  const bool has_left = a.left.present[group] != 0;
  const bool has_right = a.right.present != nullptr && a.right.present[group] != 0;
  if (!has_left && !has_right && !kFillsAbsent) return;
  float* to = a.to.data + group * a.to.group_stride;
#pragma unroll
  for (int i = 0; i < kVectorsPerThread; ++i) {
    const int64_t at = first + (i * kThreads + static_cast<int>(threadIdx.x)) * kVec;
    if (at >= a.N) continue;
    float left[kVec] = {}, right[kVec] = {};
    if (has_left) load_floats<kVec>(a.left.data + group * a.left.group_stride + at, left);
    if (has_right) load_floats<kVec>(a.right.data + group * a.right.group_stride + at, right);
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      if (has_left && has_right) left[j] = left[j] + right[j];
      if (!has_left) left[j] = right[j];
    }
    store_floats<kVec>(to + at, left);
  }
}

__global__ void __launch_bounds__(kThreads) merge_presence_kernel(const MergeSlots a) {
  const int64_t group = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (group >= a.groups) return;
  a.to.present[group] = a.left.present[group] != 0 || a.right.present[group] != 0 ? 1 : 0;
}

template <bool kFillsAbsent>
void launch_merge(const char* op, MergeSlots a, Stream& stream) {
  const auto is_vectors = [&](const void* data, int64_t stride) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && (stride % 4 == 0 || a.groups == 1);
  };
  const bool vectors = a.N % 4 == 0 && is_vectors(a.left.data, a.left.group_stride) &&
                       is_vectors(a.right.data, a.right.group_stride) &&
                       is_vectors(a.to.data, a.to.group_stride);
  with_storage(DType::f32, vectors, [&]<class, int kVec>() {
    if constexpr (kVec <= 4) {
      a.pieces = blocks_for(a.N, kThreads * kVectorsPerThread * kVec);
      launch(op, merge_kernel<kVec, kFillsAbsent>,
             {.blocks = a.groups * a.pieces, .threads = kThreads}, stream, a);
    }
  });
}

}  // namespace

void grad_merge(const GradMergeArgs& args, Stream& stream) {
  const auto slot = [&](int64_t index) -> SlotGroups<float, uint8_t> {
    return {args.slots_SGN.pointer() + index * args.slots_SGN.row_stride, args.group_stride,
            args.present_SG.pointer() + index * args.present_SG.row_stride};
  };
  const auto read = [&](int64_t index) -> SlotGroups<const float, const uint8_t> {
    return {slot(index).data, args.group_stride, slot(index).present};
  };
  const MergeSlots a{.left = read(args.left_slot),
                     .right = read(args.right_slot),
                     .to = slot(args.destination_slot),
                     .N = args.slots_SGN[2],
                     .groups = args.slots_SGN[1],
                     .pieces = 0};
  launch_merge<false>("grad_merge", a, stream);
  launch("grad_merge", merge_presence_kernel,
         {.blocks = blocks_for(a.groups, kThreads), .threads = kThreads}, stream, a);
}

void grad_finish(const GradFinishArgs& args, Stream& stream) {
  const MergeSlots a{
      .left = {args.slots_SGN.pointer() + args.slot * args.slots_SGN.row_stride, args.group_stride,
               args.present_SG.pointer() + args.slot * args.present_SG.row_stride},
      .right = {},
      .to = {args.gradient_GN.pointer(), args.gradient_GN.row_stride, nullptr},
      .N = args.slots_SGN[2],
      .groups = args.slots_SGN[1],
      .pieces = 0};
  launch_merge<true>("grad_finish", a, stream);
}

}  // namespace cambium::cuda
