// Load-balance loss on the GPU. A chunk is a block of `block_tokens` positions: one thread block
// sums its probabilities and adds its choices to those of its sequence or of the micro-batch (in
// integers, so their order is nothing), then one a chunk makes its leaf and its rows of the
// gradient. Bits depend on the sequence alone (with its own counts), not on the batch.
// Napkin: 4 T E bytes read and written.
#include "kernels/balance_loss.h"

#include "kernels/cuda_launch.cuh"

namespace cambium::cuda {

namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarpLanes;

struct BalanceLoss {
  Rows<const float> probs_TE;
  Rows<const int32_t> expert_index_TK;
  Rows<const float> fraction_NE;  // CountSource::given
  int64_t fractions;
  float* loss_leaf_B;
  Rows<float> d_probs_TE;
  float* prob_sum_CE;  // of every chunk of the call
  int32_t* count_SE;   // of every sequence, or one row: of the micro-batch
  int64_t counted;     // tokens of such a row
  int E, K, block_tokens, chunks_per_sequence;
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

// The row of counts that chunk `chunk` of the call adds to.
__device__ __forceinline__ int32_t* counts_of(const BalanceLoss& a, int64_t chunk) {
  const bool is_own = a.source == CountSource::own_sequence;
  return a.count_SE + (is_own ? chunk / a.chunks_per_sequence : 0) * a.E;
}

__global__ void __launch_bounds__(kThreads) balance_sum_kernel(const BalanceLoss a) {
  extern __shared__ int32_t count_E[];
  const ChunkTokens tokens(a, blockIdx.x);
  for (int e = threadIdx.x; e < a.E; e += kThreads) {
    count_E[e] = 0;
    float sum = 0;
#pragma unroll 16
    for (int64_t t = tokens.begin; t < tokens.end; ++t) sum += a.probs_TE.row(t)[e];
    a.prob_sum_CE[int64_t{blockIdx.x} * a.E + e] = sum;
  }
  if (a.source == CountSource::given) return;
  __syncthreads();
  for (int i = threadIdx.x; i < a.block_tokens * a.K; i += kThreads) {
    const int32_t e = a.expert_index_TK.row(tokens.begin + i / a.K)[i % a.K];
    device_check(e >= 0 && e < a.E);
    atomicAdd(count_E + e, 1);  // tidy: allow float-atomics: integers
  }
  __syncthreads();
  for (int e = threadIdx.x; e < a.E; e += kThreads) {
    if (count_E[e] == 0) continue;
    atomicAdd(counts_of(a, blockIdx.x) + e, count_E[e]);  // tidy: allow float-atomics: integers
  }
}

// f of expert e for the sequence of chunk `chunk`.
__device__ __forceinline__ float fraction_of(const BalanceLoss& a, int64_t chunk, int e) {
  if (a.source == CountSource::given) {
    return a.fraction_NE.row(a.fractions == 1 ? 0 : chunk / a.chunks_per_sequence)[e];
  }
  return static_cast<float>(counts_of(a, chunk)[e]) / static_cast<float>(a.K * a.counted);
}

__global__ void __launch_bounds__(kThreads) balance_loss_kernel(const BalanceLoss a) {
  extern __shared__ float fraction_E[];
  __shared__ double weighted[kWarps];
  const int warp = threadIdx.x / kWarpLanes, lane = threadIdx.x % kWarpLanes;
  double sum = 0;
  for (int e = threadIdx.x; e < a.E; e += kThreads) {
    fraction_E[e] = fraction_of(a, blockIdx.x, e);
    const float mean = a.prob_sum_CE[int64_t{blockIdx.x} * a.E + e] / a.positions;
    sum += static_cast<double>(fraction_E[e]) * static_cast<double>(mean);
  }
  for (int step = kWarpLanes / 2; step > 0; step /= 2) {
    sum += __shfl_xor_sync(kAllLanes, sum, step);
  }
  if (lane == 0) weighted[warp] = sum;
  __syncthreads();
  const ChunkTokens tokens(a, blockIdx.x);
  const float coefficient = a.gradient_scale * static_cast<float>(a.E) / a.positions;
  for (int64_t t = tokens.begin + warp; t < tokens.end; t += kWarps) {
    float* d_probs_E = a.d_probs_TE.row(t);
    for (int e = lane; e < a.E; e += kWarpLanes) d_probs_E[e] = coefficient * fraction_E[e];
  }
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
  const int64_t counts = is_own ? T_count / S : 1;
  const StreamScratch scratch(4 * (chunks + counts) * E, stream);
  int32_t* const count_SE = scratch.as<int32_t>();
  check_cuda(
      cudaMemsetAsync(count_SE, 0, static_cast<size_t>(4 * counts * E), native_stream(stream)),
      "balance_loss");
  const BalanceLoss a{.probs_TE = rows_of<const float>(args.probs_TE),
                      .expert_index_TK = rows_of<const int32_t>(args.expert_index_TK),
                      .fraction_NE = rows_of<const float>(args.fraction_NE),
                      .fractions = args.fraction_NE.empty() ? 0 : args.fraction_NE[0],
                      .loss_leaf_B = args.loss_leaf_B.pointer(),
                      .d_probs_TE = rows_of<float>(args.d_probs_TE),
                      .prob_sum_CE = scratch.as<float>() + counts * E,
                      .count_SE = count_SE,
                      .counted = is_own ? S : T_count,
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
