// Load-balance loss on the GPU. A chunk is a block of `block_tokens` positions. A first kernel
// counts the choices of parts of sequences (in integers, so their order is nothing); then a thread
// block per chunk adds the parts that its fraction is of, writes its rows of the gradient, sums its
// probabilities and makes its leaf. Bits depend on the sequence alone (with its own counts), not on
// the batch.
// Napkin: 4 T E bytes read and written.
#include "kernels/balance_loss.h"

#include "kernels/cuda_launch.cuh"

namespace cambium::cuda {

namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarpLanes;
constexpr int kCountThreads = 1024;
constexpr int kPartTokens = 512;  // of a sequence, counted by one block
constexpr int kChoicesAhead = 4;  // of a thread that counts
constexpr int kTokensAhead = 32;  // of a thread that sums probabilities

struct BalanceLoss {
  Rows<const float> probs_TE;
  Rows<const int32_t> expert_index_TK;
  Rows<const float> fraction_NE;  // CountSource::given
  int64_t fractions;
  float* loss_leaf_B;
  Rows<float> d_probs_TE;
  int32_t* count_PE;  // of every part of every sequence, sequence-major
  int parts_per_sequence, parts;
  int64_t sequence_length;
  int64_t counted;  // tokens that a fraction is of
  int E, K, block_tokens, chunks_per_sequence;
  float positions;  // of a whole sequence
  CountSource source;
  float loss_scale, gradient_scale;
};

__global__ void __launch_bounds__(kCountThreads) balance_count_kernel(const BalanceLoss a) {
  extern __shared__ int32_t count_E[];
  const int64_t part = blockIdx.x % a.parts_per_sequence;
  const int64_t begin = blockIdx.x / a.parts_per_sequence * a.sequence_length + part * kPartTokens;
  const int tokens =
      static_cast<int>(min(int64_t{kPartTokens}, a.sequence_length - part * kPartTokens));
  for (int e = threadIdx.x; e < a.E; e += kCountThreads) count_E[e] = 0;
  __syncthreads();
  for (int first = threadIdx.x; first < tokens * a.K; first += kChoicesAhead * kCountThreads) {
    int32_t expert[kChoicesAhead];
#pragma unroll
    for (int n = 0; n < kChoicesAhead; ++n) {
      const int i = first + n * kCountThreads;
      expert[n] = i < tokens * a.K ? a.expert_index_TK.row(begin + i / a.K)[i % a.K] : a.E;
    }
#pragma unroll
    for (int n = 0; n < kChoicesAhead; ++n) {
      if (first + n * kCountThreads >= tokens * a.K) break;
      device_check(expert[n] >= 0 && expert[n] < a.E);
      atomicAdd(count_E + expert[n], 1);  // tidy: allow float-atomics: integers
    }
  }
  __syncthreads();
  for (int e = threadIdx.x; e < a.E; e += kCountThreads) {
    a.count_PE[int64_t{blockIdx.x} * a.E + e] = count_E[e];
  }
}

// f of expert e for the sequence of chunk `chunk`.
__device__ __forceinline__ float fraction_of(const BalanceLoss& a, int64_t chunk, int e) {
  const int64_t sequence = chunk / a.chunks_per_sequence;
  if (a.source == CountSource::given) {
    return a.fraction_NE.row(a.fractions == 1 ? 0 : sequence)[e];
  }
  const bool is_own = a.source == CountSource::own_sequence;
  const int parts = is_own ? a.parts_per_sequence : a.parts;
  const int32_t* from = a.count_PE + (is_own ? sequence * parts : 0) * a.E + e;
  int32_t count = 0;
#pragma unroll 8
  for (int part = 0; part < parts; ++part) count += from[int64_t{part} * a.E];
  return static_cast<float>(count) / static_cast<float>(a.K * a.counted);
}

// The sum of an expert's probabilities from `from` on, in order of positions.
__device__ __forceinline__ float sum_positions(const BalanceLoss& a, const float* from) {
  float sum = 0;
  for (int left = a.block_tokens; left > 0; left -= kTokensAhead) {
    float prob[kTokensAhead];
#pragma unroll
    for (int i = 0; i < kTokensAhead; ++i, from += a.probs_TE.stride) {
      if (i < left) prob[i] = *from;
    }
#pragma unroll
    for (int i = 0; i < kTokensAhead; ++i) {
      if (i < left) sum += prob[i];
    }
  }
  return sum;
}

__global__ void __launch_bounds__(kThreads, 4) balance_loss_kernel(const BalanceLoss a) {
  extern __shared__ float fraction_E[];
  __shared__ double weighted[kWarps];
  const int warp = threadIdx.x / kWarpLanes, lane = threadIdx.x % kWarpLanes;
  for (int e = threadIdx.x; e < a.E; e += kThreads) fraction_E[e] = fraction_of(a, blockIdx.x, e);
  __syncthreads();
  const int64_t begin = int64_t{blockIdx.x} * a.block_tokens, end = begin + a.block_tokens;
  const float coefficient = a.gradient_scale * static_cast<float>(a.E) / a.positions;
  for (int64_t t = begin + warp; t < end; t += kWarps) {
    float* d_probs_E = a.d_probs_TE.row(t);
    for (int e = lane; e < a.E; e += kWarpLanes) d_probs_E[e] = coefficient * fraction_E[e];
  }
  double sum = 0;
  for (int e = threadIdx.x; e < a.E; e += kThreads) {
    const float mean = sum_positions(a, a.probs_TE.row(begin) + e) / a.positions;
    sum += static_cast<double>(fraction_E[e]) * static_cast<double>(mean);
  }
  for (int step = kWarpLanes / 2; step > 0; step /= 2) {
    sum += __shfl_xor_sync(kAllLanes, sum, step);
  }
  if (lane == 0) weighted[warp] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  sum = 0;
  for (const double part : weighted) sum += part;
  a.loss_leaf_B[blockIdx.x] = static_cast<float>(a.loss_scale * static_cast<double>(a.E) * sum);
}

}  // namespace

void balance_loss(const BalanceLossArgs& args, Stream& stream) {
  const int64_t T_count = args.probs_TE[0], E = args.probs_TE[1], S = args.sequence_length;
  const int64_t chunks = T_count / args.block_tokens;
  if (args.source == CountSource::micro_batch) {
    CHECK_LE(T_count * args.expert_index_TK[1], int64_t{1} << 24);  // exact in fp32
  }
  const bool is_own = args.source == CountSource::own_sequence;
  const int64_t parts_per_sequence = blocks_for(S, kPartTokens);
  const int64_t parts = args.source == CountSource::given ? 0 : T_count / S * parts_per_sequence;
  const StreamScratch scratch(4 * parts * E, stream);
  const BalanceLoss a{.probs_TE = rows_of<const float>(args.probs_TE),
                      .expert_index_TK = rows_of<const int32_t>(args.expert_index_TK),
                      .fraction_NE = rows_of<const float>(args.fraction_NE),
                      .fractions = args.fraction_NE.empty() ? 0 : args.fraction_NE[0],
                      .loss_leaf_B = args.loss_leaf_B.pointer(),
                      .d_probs_TE = rows_of<float>(args.d_probs_TE),
                      .count_PE = scratch.as<int32_t>(),
                      .parts_per_sequence = static_cast<int>(parts_per_sequence),
                      .parts = static_cast<int>(parts),
                      .sequence_length = S,
                      .counted = is_own ? S : T_count,
                      .E = static_cast<int>(E),
                      .K = static_cast<int>(args.expert_index_TK[1]),
                      .block_tokens = static_cast<int>(args.block_tokens),
                      .chunks_per_sequence = static_cast<int>(S / args.block_tokens),
                      .positions = static_cast<float>(args.positions),
                      .source = args.source,
                      .loss_scale = args.loss_scale,
                      .gradient_scale = args.gradient_scale};
  launch("balance_loss", balance_count_kernel,
         {.blocks = parts, .threads = kCountThreads, .shared_bytes = 4 * E}, stream, a);
  launch("balance_loss", balance_loss_kernel,
         {.blocks = chunks, .threads = kThreads, .shared_bytes = 4 * E}, stream, a);
}

}  // namespace cambium::cuda
