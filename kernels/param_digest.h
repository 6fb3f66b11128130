// Parameter digest of one piece of a canonical tensor (src/base/digest.h).
//
//   sum_2 = sum over the piece's 4,096-element blocks b of
//           XXH3-128(bytes of b, seed(tensor_id, first_block + b))  mod 2^128
//
// Integer sums are associative: bits do not depend on threads, shards or ranks.
// Napkin: 4 N bytes read; memory bound.
#pragma once

#include "kernels/op.h"
#include "src/base/digest.h"

namespace cambium {

struct ParamDigestArgs {
  In<float> data_N;  // starts on a block; only the tensor's last block is short
  uint64_t tensor_id = 0;
  int64_t first_block = 0;
  Out<int64_t> sum_2;  // the bits of {low, high} of a Digest128
};

inline void check_args(const ParamDigestArgs& a) {
  check_shape("param_digest", "data_N", a.data_N, Shape(a.data_N.elements()));
  check_shape("param_digest", "sum_2", a.sum_2, Shape(2));
  CHECK_GE(a.first_block, 0);
}

inline Cost cost(const ParamDigestArgs& a) {
  const int64_t N = a.data_N.elements();
  return {"param_digest", {N}, 0, 4 * N + 16, 0};
}

template <class Visitor>
void visit_views(const ParamDigestArgs& a, Visitor&& visit) {
  visit("data_N", a.data_N);
  visit("sum_2", a.sum_2);
}

namespace reference {
void param_digest(const ParamDigestArgs& args, Workers& workers);
}
namespace cuda {
void param_digest(const ParamDigestArgs& args, Stream& stream);
}  // namespace cuda

inline void param_digest(const ParamDigestArgs& args, OpCall call) {
  execute(args, call, reference::param_digest, kHasCuda ? cuda::param_digest : nullptr);
}

}  // namespace cambium
