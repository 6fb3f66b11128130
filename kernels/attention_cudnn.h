// cuDNN's fused attention behind the contract of kernels/attention.h, for fast mode on a GPU.
//
// A build has it when CMake found the headers of cuDNN and cudnn-frontend; the library is loaded
// when it is first asked for. Causal attention over whole sequences: no documents, no share of a
// sequence, bf16, head dims that are multiples of 8 up to 128. Runs repeat their bits (D1): the
// backward pass asks for the deterministic algorithm, which on Hopper keeps 2 B H S S bytes of
// workspace. cuDNN chooses its kernel by the shape, so D2 and D3 are not promised.
#pragma once

#include <cstdint>
#include <string>

namespace cambium {

class Stream;
struct AttentionArgs;
struct AttentionBackwardArgs;

enum class AttentionKernel : uint8_t { own, cudnn };

constexpr int64_t kCudnnHeadStep = 8;
constexpr int64_t kCudnnMostHeadColumns = 128;

namespace cuda {

// Why this process cannot use cuDNN, with the next step; empty where it can.
std::string cudnn_missing();

// Version of the loaded library, as 91900 for 9.19.0; 0 where there is none.
int64_t cudnn_version();

// A graph is made for every new shape, which takes about a tenth of a second. `delta_TH` is not
// written. A shape that no engine takes is refused with exit 2.
void attention_cudnn(const AttentionArgs& args, Stream& stream);
void attention_backward_cudnn(const AttentionBackwardArgs& args, Stream& stream);

// A log-sum-exp as kernels/attention.h stores it, [sequence][position][head] with rows `row_stride`
// apart, and as cuDNN reads it, [sequence][head][position].
struct LseLayouts {
  float* by_position = nullptr;
  float* by_head = nullptr;
  int64_t row_stride = 0;
  int64_t sequences = 0;
  int64_t S = 0;
  int64_t H = 0;
};
enum class LseOrder { by_position, by_head };
void reorder_lse(const LseLayouts& lse, LseOrder to, Stream& stream);

}  // namespace cuda

}  // namespace cambium
