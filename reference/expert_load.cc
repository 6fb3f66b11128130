#include "kernels/expert_load.h"

#include <vector>

#include "reference/chunks.h"

namespace cambium::reference {

namespace {

constexpr int64_t kHistogramElements = 16384;  // choices per chunk: about 10 us

void count_tokens(const ExpertHistogramArgs& a, int64_t begin, int64_t end, int32_t* count_E) {
  const int64_t K = a.expert_index_TK[1], E = a.count_E[0];
  for (int64_t t = begin; t < end; ++t) {
    const int32_t* index = a.expert_index_TK.pointer() + t * a.expert_index_TK.row_stride;
    for (int64_t k = 0; k < K; ++k) {
      if (index[k] == -1) continue;
      CHECK(index[k] >= 0 && index[k] < E);
      ++count_E[index[k]];
    }
  }
}

}  // namespace

void expert_histogram(const ExpertHistogramArgs& a, Workers& workers) {
  const int64_t T = a.expert_index_TK[0], K = a.expert_index_TK[1], E = a.count_E[0];
  const int64_t tokens_per_chunk = items_per_chunk(K, kHistogramElements);
  const int64_t chunks = chunk_count(T, tokens_per_chunk);
  std::vector<int32_t> partial(static_cast<size_t>(chunks * E), 0);
  for_ranges(workers, T, tokens_per_chunk, [&](int64_t begin, int64_t end) {
    count_tokens(a, begin, end, partial.data() + begin / tokens_per_chunk * E);
  });
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int64_t e = 0; e < E; ++e) a.count_E.pointer()[e] += partial[chunk * E + e];
  }
}

void router_bias_update(const RouterBiasUpdateArgs& a, Workers&) {
  const int64_t E = a.bias_E[0];
  const int32_t* count = a.count_E.pointer();
  int64_t total = 0;
  for (int64_t e = 0; e < E; ++e) total += count[e];
  for (int64_t e = 0; e < E; ++e) {
    const int64_t missing = total - E * count[e];
    if (missing > 0) a.bias_E.pointer()[e] += a.rate;
    if (missing < 0) a.bias_E.pointer()[e] -= a.rate;
  }
}

}  // namespace cambium::reference
