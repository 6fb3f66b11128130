#include "kernels/copy.h"

#include <algorithm>
#include <cstring>

#include "reference/rounding.h"

namespace cambium::reference {

namespace {
constexpr int64_t kChunkBytes = int64_t{1} << 20;  // about 50 us of one core's bandwidth
}

void copy_bytes(const CopyBytesArgs& args, Workers& workers) {
  const int64_t bytes = args.from_N[0];
  workers.parallel_for((bytes + kChunkBytes - 1) / kChunkBytes, [&](int64_t chunk, Scratch&) {
    const int64_t first = chunk * kChunkBytes;
    std::memcpy(args.to_N.pointer() + first, args.from_N.pointer() + first,
                static_cast<size_t>(std::min(kChunkBytes, bytes - first)));
  });
}

void zero_bytes(const ZeroBytesArgs& args, Workers& workers) {
  const int64_t bytes = args.to_N[0];
  workers.parallel_for((bytes + kChunkBytes - 1) / kChunkBytes, [&](int64_t chunk, Scratch&) {
    const int64_t first = chunk * kChunkBytes;
    std::memset(args.to_N.pointer() + first, 0,
                static_cast<size_t>(std::min(kChunkBytes, bytes - first)));
  });
}

void scale_values(const ScaleValuesArgs& args, Workers&) {
  for (int64_t i = 0; i < args.value_N[0]; ++i) args.value_N.pointer()[i] *= args.factor;
}

void add_values(const AddValuesArgs& args, Workers&) {
  float* sum = args.sum_N.pointer();
  for (int64_t i = 0; i < args.sum_N[0]; ++i) sum[i] = sum[i] + args.addend_N.pointer()[i];
}

void cast_real(const CastRealArgs& args, Workers&) {
  const ReadF32 from(args.from_N);
  const WriteF32 to(args.to_N);
  std::copy(from.data, from.data + args.from_N[0], to.data);
}

}  // namespace cambium::reference
