#include "kernels/param_digest.h"

#include <vector>

#include "reference/chunks.h"

namespace cambium::reference {

namespace {

constexpr int64_t kDigestChunkElements = 8 * kDigestBlockElements;  // 128 KiB

}  // namespace

void param_digest(const ParamDigestArgs& a, Workers& workers) {
  const int64_t N = a.data_N[0];
  std::vector<Digest128> partial(static_cast<size_t>(chunk_count(N, kDigestChunkElements)));
  for_ranges(workers, N, kDigestChunkElements, [&](int64_t begin, int64_t end) {
    partial[begin / kDigestChunkElements] =
        digest_blocks(a.data_N.pointer() + begin, end - begin, a.tensor_id,
                      a.first_block + begin / kDigestBlockElements);
  });
  Digest128 sum;
  for (const Digest128& digest : partial) sum += digest;
  a.sum_2.pointer()[0] = static_cast<int64_t>(sum.low);
  a.sum_2.pointer()[1] = static_cast<int64_t>(sum.high);
}

}  // namespace cambium::reference
