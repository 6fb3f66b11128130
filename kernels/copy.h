// Copies, zero fills, casts and plain additions in stream order (uploads, accumulators, bf16 copies
// of weights, the two gradients of a tied embedding).
// Napkin: 2 N bytes for a copy, N for a fill.
#pragma once

#include "kernels/op.h"

namespace cambium {

struct CopyBytesArgs {
  In<uint8_t> from_N;
  Out<uint8_t> to_N;
};
struct ZeroBytesArgs {
  Out<uint8_t> to_N;
};
struct ScaleValuesArgs {
  InOut<float> value_N;
  float factor = 1;
};
// sum_N = sum_N + addend_N
struct AddValuesArgs {
  InOut<float> sum_N;
  In<float> addend_N;
};
struct CastRealArgs {
  In<Real> from_N;
  Out<Real> to_N;  // rounded to nearest-even when bf16
};

inline void check_args(const CopyBytesArgs& a) {
  check_shape("copy_bytes", "to_N", a.to_N, Shape(a.from_N[0]));
}
inline void check_args(const ZeroBytesArgs& a) {
  check_shape("zero_bytes", "to_N", a.to_N, Shape(a.to_N[0]));
}
inline void check_args(const CastRealArgs& a) {
  check_shape("cast_real", "to_N", a.to_N, Shape(a.from_N[0]));
}
inline void check_args(const ScaleValuesArgs& a) {
  check_shape("scale_values", "value_N", a.value_N, Shape(a.value_N[0]));
}
inline void check_args(const AddValuesArgs& a) {
  check_shape("add_values", "addend_N", a.addend_N, Shape(a.sum_N[0]));
}
inline Cost cost(const AddValuesArgs& a) {
  return {"add_values", {a.sum_N[0]}, a.sum_N[0], 12 * a.sum_N[0], 0};
}
template <class Visitor>
void visit_views(const AddValuesArgs& a, Visitor&& visit) {
  visit("sum_N", a.sum_N);
  visit("addend_N", a.addend_N);
}
inline Cost cost(const ScaleValuesArgs& a) {
  return {"scale_values", {a.value_N[0]}, a.value_N[0], 8 * a.value_N[0], 0};
}
template <class Visitor>
void visit_views(const ScaleValuesArgs& a, Visitor&& visit) {
  visit("value_N", a.value_N);
}
inline Cost cost(const CastRealArgs& a) {
  return {"cast_real",
          {a.from_N[0]},
          0,
          a.from_N[0] * (dtype_bytes(a.from_N.dtype) + dtype_bytes(a.to_N.dtype)),
          0};
}
inline Cost cost(const CopyBytesArgs& a) {
  return {"copy_bytes", {a.from_N[0]}, 0, 2 * a.from_N[0], 0};
}
inline Cost cost(const ZeroBytesArgs& a) { return {"zero_bytes", {a.to_N[0]}, 0, a.to_N[0], 0}; }

template <class Visitor>
void visit_views(const CopyBytesArgs& a, Visitor&& visit) {
  visit("from_N", a.from_N);
  visit("to_N", a.to_N);
}
template <class Visitor>
void visit_views(const CastRealArgs& a, Visitor&& visit) {
  visit("from_N", a.from_N);
  visit("to_N", a.to_N);
}
template <class Visitor>
void visit_views(const ZeroBytesArgs& a, Visitor&& visit) {
  visit("to_N", a.to_N);
}

namespace reference {
void copy_bytes(const CopyBytesArgs& args, Workers& workers);
void zero_bytes(const ZeroBytesArgs& args, Workers& workers);
void cast_real(const CastRealArgs& args, Workers& workers);
void scale_values(const ScaleValuesArgs& args, Workers& workers);
void add_values(const AddValuesArgs& args, Workers& workers);
}  // namespace reference

namespace cuda {
void copy_op(const CopyBytesArgs& args, Stream& stream);  // copy_bytes is the blocking one
void zero_bytes(const ZeroBytesArgs& args, Stream& stream);
void cast_real(const CastRealArgs& args, Stream& stream);
void add_values(const AddValuesArgs& args, Stream& stream);
void scale_values(const ScaleValuesArgs& args, Stream& stream);
}  // namespace cuda

inline void copy_bytes(const CopyBytesArgs& args, OpCall call) {
  execute(args, call, reference::copy_bytes, kHasCuda ? cuda::copy_op : nullptr);
}
inline void zero_bytes(const ZeroBytesArgs& args, OpCall call) {
  execute(args, call, reference::zero_bytes, kHasCuda ? cuda::zero_bytes : nullptr);
}
inline void scale_values(const ScaleValuesArgs& args, OpCall call) {
  execute(args, call, reference::scale_values, kHasCuda ? cuda::scale_values : nullptr);
}
inline void add_values(const AddValuesArgs& args, OpCall call) {
  execute(args, call, reference::add_values, kHasCuda ? cuda::add_values : nullptr);
}
inline void cast_real(const CastRealArgs& args, OpCall call) {
  execute(args, call, reference::cast_real, kHasCuda ? cuda::cast_real : nullptr);
}

}  // namespace cambium
