// Row products without tensor cores (kernels/shared_grouped_rows.h). Lane l of a row's warp owns
// columns l, l + 32, ...; every element is one chain over the contracted index, ascending.
#include <type_traits>

#include "kernels/cuda_launch.cuh"
#include "kernels/shared_grouped_rows.h"
#include "kernels/swiglu_device.cuh"

namespace cambium::cuda {

namespace {

constexpr int kWarps = 4;

template <class Element>
struct RowsOf {
  Element* data;
  int64_t stride;
  __device__ Element* row(int64_t index) const { return data + index * stride; }
};

template <class Element>
RowsOf<Element> row_view(const RawView& view) {
  return {static_cast<Element*>(view.data), view.row_stride};
}

// What all four products read: a's rows times the expert's [columns, depth] matrix or its
// transpose.
template <class Element>
struct RowProduct {
  RowsOf<const Element> a;
  RowsOf<const Element> w;  // a row is an expert's matrix
  const int32_t* row_token;
  const int32_t* expert_offset;
  int experts, R, depth;
  int64_t column_step, depth_step;  // of the matrix, elements

  __device__ const Element* a_row(int row) const {
    return a.row(row_token != nullptr ? row_token[row] : row);
  }
  __device__ const Element* matrix_of(int row) const {
    int low = 0, high = experts;  // the last expert whose first row is at most `row`
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (expert_offset[middle] <= row ? low : high) = middle;
    }
    return w.row(low);
  }
  __device__ float chain(const Element* a, const Element* matrix, int64_t column) const {
    const Element* from = matrix + column * column_step;
    float sum = 0;
    for (int64_t k = 0; k < depth; ++k) sum = fmaf(widen(a[k]), widen(from[k * depth_step]), sum);
    return sum;
  }
};

__device__ __forceinline__ int row_of_warp() {
  return static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / kWarpLanes;
}

template <class Element>
__global__ void up_rows_kernel(RowProduct<Element> p, int F, RowsOf<Element> gate_up,
                               RowsOf<Element> h) {
  const int row = row_of_warp(), lane = threadIdx.x % kWarpLanes;
  if (row >= p.R) return;
  const Element *a = p.a_row(row), *matrix = p.matrix_of(row);
  for (int f = lane; f < F; f += kWarpLanes) {
    const Element gate(p.chain(a, matrix, f)), up(p.chain(a, matrix, F + f));
    gate_up.row(row)[f] = gate;
    gate_up.row(row)[F + f] = up;
    h.row(row)[f] = Element(swiglu_value(widen(gate), widen(up)));
  }
}

template <class Element>
__global__ void scaled_rows_kernel(RowProduct<Element> p, int columns, const float* weight,
                                   RowsOf<Element> out) {
  const int row = row_of_warp(), lane = threadIdx.x % kWarpLanes;
  if (row >= p.R) return;
  const Element *a = p.a_row(row), *matrix = p.matrix_of(row);
  for (int column = lane; column < columns; column += kWarpLanes) {
    const float sum = p.chain(a, matrix, column);
    out.row(row)[column] = Element(weight != nullptr ? weight[row] * sum : sum);
  }
}

template <class Element>
struct DownDgradOutputs {
  RowsOf<const Element> gate_up;
  const float* weight;
  RowsOf<Element> d_gate_up;
  RowsOf<Element> weighted_h;
  float* d_weight;
};

template <class Element>
__global__ void down_dgrad_rows_kernel(RowProduct<Element> p, int F, DownDgradOutputs<Element> o) {
  const int row = row_of_warp(), lane = threadIdx.x % kWarpLanes;
  if (row >= p.R) return;
  const Element *a = p.a_row(row), *matrix = p.matrix_of(row), *gate_up = o.gate_up.row(row);
  const float weight = o.weight != nullptr ? o.weight[row] : 1.0f;
  float dot = 0;
  for (int f = lane; f < F; f += kWarpLanes) {
    const float g = p.chain(a, matrix, f);
    const DownDgradPoint point =
        down_dgrad_point(widen(gate_up[f]), widen(gate_up[F + f]), weight, g);
    dot = fmaf(g, point.h, dot);
    o.weighted_h.row(row)[f] = Element(point.weighted_h);
    o.d_gate_up.row(row)[f] = Element(point.d_gate);
    o.d_gate_up.row(row)[F + f] = Element(point.d_up);
  }
  for (int step = kWarpLanes / 2; step > 0; step /= 2) {
    dot += __shfl_down_sync(kAllLanes, dot, step);
  }
  if (lane == 0 && o.d_weight != nullptr) o.d_weight[row] = dot;
}

struct ProductShape {
  int64_t R, depth, column_step, depth_step;
};

template <class Element>
RowProduct<Element> product_of(const RawView& a, const In<int32_t>& row_token_R, const RawView& w,
                               const In<int32_t>& expert_offset_e1, ProductShape shape) {
  return {row_view<const Element>(a),
          row_view<const Element>(w),
          row_token_R.pointer(),
          expert_offset_e1.pointer(),
          static_cast<int>(w.shape[0]),
          static_cast<int>(shape.R),
          static_cast<int>(shape.depth),
          shape.column_step,
          shape.depth_step};
}

// Calls run.template operator()<Element>() with the storage type of `view`.
template <class Run>
void with_element(const RawView& view, Run&& run) {
  if (view.dtype == DType::bf16) {
    run.template operator()<__nv_bfloat16>();
  } else {
    CHECK(view.dtype == DType::f32);
    run.template operator()<float>();
  }
}

unsigned blocks_of(int64_t R) { return static_cast<unsigned>((R + kWarps - 1) / kWarps); }

constexpr int kThreads = kWarps * kWarpLanes;

}  // namespace

void grouped_up_rows(const GroupedUpArgs& a, Stream& stream) {
  const int64_t R = a.h_RF[0], F = a.h_RF[1], D = a.x_RD[1];
  if (R == 0) return;
  with_element(a.x_RD, [&]<class Element>() {
    const auto product =
        product_of<Element>(a.x_RD, a.row_token_R, a.w_up_eND, a.expert_offset_e1, {R, D, D, 1});
    up_rows_kernel<Element><<<blocks_of(R), kThreads, 0, native_stream(stream)>>>(
        product, static_cast<int>(F), row_view<Element>(a.gate_up_RN), row_view<Element>(a.h_RF));
  });
  check_cuda(cudaGetLastError(), "grouped_up_rows");
}

void grouped_down_rows(const GroupedDownArgs& a, Stream& stream) {
  const int64_t R = a.h_RF[0], F = a.h_RF[1], D = a.y_RD[1];
  if (R == 0) return;
  with_element(a.h_RF, [&]<class Element>() {
    const auto product =
        product_of<Element>(a.h_RF, {}, a.w_down_eDF, a.expert_offset_e1, {R, F, F, 1});
    scaled_rows_kernel<Element><<<blocks_of(R), kThreads, 0, native_stream(stream)>>>(
        product, static_cast<int>(D), a.weight_R.pointer(), row_view<Element>(a.y_RD));
  });
  check_cuda(cudaGetLastError(), "grouped_down_rows");
}

void grouped_down_dgrad_rows(const GroupedDownDgradArgs& a, Stream& stream) {
  const int64_t R = a.gate_up_RN[0], D = a.d_y_RD[1], F = a.w_down_eDF[2];
  if (R == 0) return;
  with_element(a.d_y_RD, [&]<class Element>() {
    const auto product = product_of<Element>(a.d_y_RD, a.row_token_R, a.w_down_eDF,
                                             a.expert_offset_e1, {R, D, 1, F});
    const DownDgradOutputs<Element> outputs{row_view<const Element>(a.gate_up_RN),
                                            a.weight_R.pointer(), row_view<Element>(a.d_gate_up_RN),
                                            row_view<Element>(a.weighted_h_RF),
                                            a.d_weight_R.pointer()};
    down_dgrad_rows_kernel<Element><<<blocks_of(R), kThreads, 0, native_stream(stream)>>>(
        product, static_cast<int>(F), outputs);
  });
  check_cuda(cudaGetLastError(), "grouped_down_dgrad_rows");
}

void grouped_up_dgrad_rows(const GroupedUpDgradArgs& a, Stream& stream) {
  const int64_t R = a.d_gate_up_RN[0], N = a.d_gate_up_RN[1], D = a.d_x_RD[1];
  if (R == 0) return;
  with_element(a.d_gate_up_RN, [&]<class Element>() {
    const auto product =
        product_of<Element>(a.d_gate_up_RN, {}, a.w_up_eND, a.expert_offset_e1, {R, N, 1, D});
    scaled_rows_kernel<Element><<<blocks_of(R), kThreads, 0, native_stream(stream)>>>(
        product, static_cast<int>(D), nullptr, row_view<Element>(a.d_x_RD));
  });
  check_cuda(cudaGetLastError(), "grouped_up_dgrad_rows");
}

}  // namespace cambium::cuda
