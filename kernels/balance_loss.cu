// Load-balance loss on the GPU. A chunk is a block of `block_tokens` positions: one thread block
// sums its probabilities and counts its choices, then one a chunk makes its leaf and its rows of
// the gradient. Bits depend on the sequence alone (with its own counts), not on the batch.
// Napkin: 4 T E bytes read and written.
#include "kernels/balance_loss.h"

#include "kernels/cuda_launch.cuh"

namespace cambium::cuda {

namespace {

constexpr int kThreads = 256;

struct BalanceLoss {
  Rows<const float> probs_TE;
  Rows<const int32_t> expert_index_TK;
  Rows<const float> fraction_NE;  // CountSource::given
  int64_t fractions;
  float* loss_leaf_B;
  Rows<float> d_probs_TE;
  float* prob_sum_CE;  // of every chunk of the call
  int32_t* count_CE;
  int64_t chunks;
  int S, E, K, block_tokens, chunks_per_sequence;
  float positions;  // of a whole sequence
  CountSource source;
  float loss_scale, gradient_scale;
};

// Tokens [begin, end) of chunk `chunk` of the call.
struct ChunkTokens {
  int64_t begin, end;
  __device__ __forceinline__ ChunkTokens(const BalanceLoss& a, int64_t chunk) {
    begin = chunk * a.block_tokens;
    end = begin + a.block_tokens;
  }
};

__global__ void __launch_bounds__(kThreads) balance_sum_kernel(const BalanceLoss a) {
  extern __shared__ int32_t count_E[];
  const ChunkTokens tokens(a, blockIdx.x);
  for (int e = threadIdx.x; e < a.E; e += kThreads) {
    count_E[e] = 0;
    float sum = 0;
#pragma unroll 8
    for (int64_t t = tokens.begin; t < tokens.end; ++t) sum += a.probs_TE.row(t)[e];
    a.prob_sum_CE[int64_t{blockIdx.x} * a.E + e] = sum;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < (tokens.end - tokens.begin) * a.K; i += kThreads) {
    const int32_t e = a.expert_index_TK.row(tokens.begin + i / a.K)[i % a.K];
    device_check(e >= 0 && e < a.E);
    atomicAdd(count_E + e, 1);  // tidy: allow float-atomics: integers
  }
  __syncthreads();
  for (int e = threadIdx.x; e < a.E; e += kThreads) {
    a.count_CE[int64_t{blockIdx.x} * a.E + e] = count_E[e];
  }
}

// f of expert e for the sequence whose chunks are [first, first + chunks_per_sequence).
__device__ __forceinline__ float fraction_of(const BalanceLoss& a, int64_t first, int e) {
  if (a.source == CountSource::given) {
    return a.fraction_NE.row(a.fractions == 1 ? 0 : first / a.chunks_per_sequence)[e];
  }
  const bool is_own = a.source == CountSource::own_sequence;
  const int64_t begin = is_own ? first : 0;
  const int64_t end = is_own ? first + a.chunks_per_sequence : a.chunks;
  int32_t count = 0;
  for (int64_t c = begin; c < end; ++c) count += a.count_CE[c * a.E + e];
  const int64_t tokens = is_own ? a.S : a.chunks / a.chunks_per_sequence * a.S;
  return static_cast<float>(count) / static_cast<float>(a.K * tokens);
}

__global__ void __launch_bounds__(kThreads) balance_loss_kernel(const BalanceLoss a) {
  extern __shared__ float fraction_E[];
  __shared__ double weighted[kThreads];
  const int64_t sequence = blockIdx.x / a.chunks_per_sequence;
  const int64_t first = sequence * a.chunks_per_sequence;
  for (int e = threadIdx.x; e < a.E; e += kThreads) fraction_E[e] = fraction_of(a, first, e);
  __syncthreads();
  const ChunkTokens tokens(a, blockIdx.x);
  const float coefficient = a.gradient_scale * static_cast<float>(a.E) / a.positions;
  for (int64_t i = threadIdx.x; i < (tokens.end - tokens.begin) * a.E; i += kThreads) {
    a.d_probs_TE.row(tokens.begin + i / a.E)[i % a.E] = coefficient * fraction_E[i % a.E];
  }
  double sum = 0;
  for (int e = threadIdx.x; e < a.E; e += kThreads) {
    const float mean = a.prob_sum_CE[int64_t{blockIdx.x} * a.E + e] / a.positions;
    sum += static_cast<double>(fraction_E[e]) * static_cast<double>(mean);
  }
  weighted[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  sum = 0;
  for (int i = 0; i < kThreads; ++i) sum += weighted[i];
  a.loss_leaf_B[blockIdx.x] = static_cast<float>(a.loss_scale * static_cast<double>(a.E) * sum);
}

}  // namespace

void balance_loss(const BalanceLossArgs& args, Stream& stream) {
  const int64_t T_count = args.probs_TE[0], E = args.probs_TE[1], S = args.sequence_length;
  const int64_t chunks = T_count / args.block_tokens;
  if (args.source == CountSource::micro_batch) {
    CHECK_LE(T_count * args.expert_index_TK[1], int64_t{1} << 24);  // exact in fp32
  }
  const StreamScratch scratch(8 * chunks * E, stream);
  const BalanceLoss a{.probs_TE = rows_of<const float>(args.probs_TE),
                      .expert_index_TK = rows_of<const int32_t>(args.expert_index_TK),
                      .fraction_NE = rows_of<const float>(args.fraction_NE),
                      .fractions = args.fraction_NE.empty() ? 0 : args.fraction_NE[0],
                      .loss_leaf_B = args.loss_leaf_B.pointer(),
                      .d_probs_TE = rows_of<float>(args.d_probs_TE),
                      .prob_sum_CE = scratch.as<float>(),
                      .count_CE = scratch.as<int32_t>() + chunks * E,
                      .chunks = chunks,
                      .S = static_cast<int>(S),
                      .E = static_cast<int>(E),
                      .K = static_cast<int>(args.expert_index_TK[1]),
                      .block_tokens = static_cast<int>(args.block_tokens),
                      .chunks_per_sequence = static_cast<int>(S / args.block_tokens),
                      .positions = static_cast<float>(args.positions),
                      .source = args.source,
                      .loss_scale = args.loss_scale,
                      .gradient_scale = args.gradient_scale};
  const LaunchShape shape{.blocks = chunks, .threads = kThreads, .shared_bytes = 4 * E};
  launch("balance_loss", balance_sum_kernel, shape, stream, a);
  launch("balance_loss", balance_loss_kernel, shape, stream, a);
}

}  // namespace cambium::cuda
