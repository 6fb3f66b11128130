#include "kernels/attention_cudnn.h"

#include "kernels/attention.h"

#ifdef CAMBIUM_HAS_CUDNN

#include <cudnn_frontend.h>
#include <dlfcn.h>

#include <bit>
#include <map>
#include <optional>

#include "kernels/cuda_stream.h"

namespace cudnn_frontend {
void* cudnn_dlhandle = nullptr;  // tidy: allow global: declared and read by their header
}

namespace cambium::cuda {

namespace {

namespace fe = cudnn_frontend;

constexpr const char* kLibrary = "libcudnn.so.9";
constexpr const char* kOwnKernel = "numerics.attention = own";

// Empty when the library is loaded.
const std::string& load_failure() {
  static const std::string failure = [] {
    fe::cudnn_dlhandle = dlopen(kLibrary, RTLD_NOW);
    return fe::cudnn_dlhandle != nullptr ? std::string() : std::string(dlerror());
  }();
  return failure;
}

void check_cudnn(fe::error_t status, const char* what) {
  if (status.is_good()) return;
  const bool is_refused = status.get_code() == fe::error_code_t::GRAPH_NOT_SUPPORTED ||
                          status.get_code() == fe::error_code_t::HEURISTIC_QUERY_FAILED;
  fail(is_refused ? ExitCode::usage : ExitCode::internal, "{} by cuDNN {}: {}; next: {}", what,
       cudnn_version(), status.get_message(), kOwnKernel);
}

void check_cudnn(cudnnStatus_t status, const char* what) {
  if (status == CUDNN_STATUS_SUCCESS) return;
  fail(ExitCode::internal, "{}: {}", what, fe::detail::get_error_string(status));
}

enum Uid : int64_t { kQ = 1, kK, kV, kO, kLse, kDO, kDQ, kDK, kDV };
using Pointers = std::unordered_map<int64_t, void*>;
using TensorAttributes = fe::graph::Tensor_attributes;
using TensorPointer = std::shared_ptr<TensorAttributes>;

// [T, heads, Q] with T = [sequence][position], in cuDNN's order: sequence, head, position, Q.
void describe(TensorAttributes& tensor, Uid uid, const RawView& view, int64_t S) {
  tensor.set_uid(uid)
      .set_dim({view[0] / S, view[1], S, view[2]})
      .set_stride({S * view.row_stride, view[2], view.row_stride, 1});
}

TensorPointer input(fe::graph::Graph& graph, const char* name, Uid uid, const RawView& view,
                    int64_t S) {
  TensorAttributes tensor;
  describe(tensor.set_name(name), uid, view, S);
  return graph.tensor(tensor);
}

void output(const TensorPointer& tensor, Uid uid, const RawView& view, int64_t S) {
  describe(tensor->set_output(true), uid, view, S);
}

void describe_lse(TensorAttributes& tensor, const LseLayouts& lse) {
  tensor.set_uid(kLse)
      .set_data_type(fe::DataType_t::FLOAT)
      .set_dim({lse.sequences, lse.H, lse.S, 1})
      .set_stride({lse.H * lse.S, lse.S, 1, 1});
}

template <class Args>
LseLayouts lse_layouts(const Args& a) {
  return {.by_position = const_cast<float*>(a.lse_TH.pointer()),
          .row_stride = a.lse_TH.row_stride,
          .sequences = a.q_THQ[0] / a.sequence_length,
          .S = a.sequence_length,
          .H = a.q_THQ[1]};
}

void add_pass(fe::graph::Graph& graph, const AttentionArgs& a) {
  const int64_t S = a.sequence_length;
  const auto [o, lse] =
      graph.sdpa(input(graph, "q", kQ, a.q_THQ, S), input(graph, "k", kK, a.k_TGQ, S),
                 input(graph, "v", kV, a.v_TGQ, S),
                 fe::graph::SDPA_attributes()
                     .set_name("attention")
                     .set_generate_stats(true)
                     .set_diagonal_alignment(fe::DiagonalAlignment_t::TOP_LEFT)
                     .set_diagonal_band_right_bound(0)
                     .set_attn_scale(a.scale));
  output(o, kO, a.o_THQ, S);
  describe_lse(lse->set_output(true), lse_layouts(a));
}

void add_pass(fe::graph::Graph& graph, const AttentionBackwardArgs& a) {
  const int64_t S = a.sequence_length;
  TensorAttributes lse;
  describe_lse(lse.set_name("lse"), lse_layouts(a));
  const auto [d_q, d_k, d_v] =
      graph.sdpa_backward(input(graph, "q", kQ, a.q_THQ, S), input(graph, "k", kK, a.k_TGQ, S),
                          input(graph, "v", kV, a.v_TGQ, S), input(graph, "o", kO, a.o_THQ, S),
                          input(graph, "d_o", kDO, a.d_o_THQ, S), graph.tensor(lse),
                          fe::graph::SDPA_backward_attributes()
                              .set_name("attention_backward")
                              .set_diagonal_alignment(fe::DiagonalAlignment_t::TOP_LEFT)
                              .set_diagonal_band_right_bound(0)
                              .set_attn_scale(a.scale)
                              .set_deterministic_algorithm(true));
  output(d_q, kDQ, a.d_q_THQ, S);
  output(d_k, kDK, a.d_k_TGQ, S);
  output(d_v, kDV, a.d_v_TGQ, S);
}

Pointers pointers(const AttentionArgs& a, const LseLayouts& lse) {
  return {{kQ, a.q_THQ.data},
          {kK, a.k_TGQ.data},
          {kV, a.v_TGQ.data},
          {kO, a.o_THQ.data},
          {kLse, lse.by_head}};
}

Pointers pointers(const AttentionBackwardArgs& a, const LseLayouts& lse) {
  return {{kQ, a.q_THQ.data},    {kK, a.k_TGQ.data},    {kV, a.v_TGQ.data},
          {kO, a.o_THQ.data},    {kDO, a.d_o_THQ.data}, {kDQ, a.d_q_THQ.data},
          {kDK, a.d_k_TGQ.data}, {kDV, a.d_v_TGQ.data}, {kLse, lse.by_head}};
}

// All that decides a graph: its scalars, and the extents and strides of every tensor.
template <class Args>
std::vector<int64_t> graph_key(const Args& a) {
  std::vector<int64_t> key{std::is_same_v<Args, AttentionArgs>, a.sequence_length,
                           std::bit_cast<int32_t>(a.scale)};
  visit_views(a, [&](const char*, const RawView& view) {
    key.insert(key.end(), {view[0], view[1], view[2], view.row_stride});
  });
  return key;
}

// A stream's handle, graphs and workspace.
class CudnnAttention {
 public:
  explicit CudnnAttention(Stream& stream) {
    if (!cudnn_missing().empty()) fail(ExitCode::usage, "attention by cuDNN: {}", cudnn_missing());
    check_cudnn(fe::detail::create_handle(&handle_), "cudnnCreate");
    check_cudnn(fe::detail::set_stream(handle_, static_cast<cudaStream_t>(stream.native())),
                "cudnnSetStream");
  }
  ~CudnnAttention() { fe::detail::destroy_handle(handle_); }
  CudnnAttention(const CudnnAttention&) = delete;
  CudnnAttention& operator=(const CudnnAttention&) = delete;

  template <class Args>
  void run(const Args& a, Stream& stream) {
    constexpr bool is_forward = std::is_same_v<Args, AttentionArgs>;
    const fe::graph::Graph& graph = graph_of(a);
    LseLayouts lse = lse_layouts(a);
    const int64_t lse_bytes =
        (4 * lse.sequences * lse.S * lse.H + kAlignment - 1) / kAlignment * kAlignment;
    int64_t graph_bytes = 0;
    check_cudnn(graph.get_workspace_size(graph_bytes), "workspace");
    auto* const workspace = workspace_of(lse_bytes + graph_bytes);
    lse.by_head = reinterpret_cast<float*>(workspace);
    if (!is_forward) reorder_lse(lse, LseOrder::by_head, stream);
    Pointers tensors = pointers(a, lse);
    check_cudnn(graph.execute(handle_, tensors, workspace + lse_bytes), cost(a).op);
    if (is_forward) reorder_lse(lse, LseOrder::by_position, stream);
  }

 private:
  static constexpr int64_t kAlignment = 256;

  template <class Args>
  const fe::graph::Graph& graph_of(const Args& a) {
    const std::vector<int64_t> key = graph_key(a);
    const auto found = graphs_.find(key);
    if (found != graphs_.end()) return found->second;
    fe::graph::Graph graph;
    graph.set_io_data_type(fe::DataType_t::BFLOAT16)
        .set_intermediate_data_type(fe::DataType_t::FLOAT)
        .set_compute_data_type(fe::DataType_t::FLOAT);
    add_pass(graph, a);
    check_cudnn(graph.build(handle_, {fe::HeurMode_t::A}), cost(a).op);
    return graphs_.emplace(key, std::move(graph)).first->second;
  }

  // NOTE: freeing memory waits for the device, so no kernel still uses what is given back.
  std::byte* workspace_of(int64_t bytes) {
    if (bytes > workspace_bytes_) {
      workspace_.reset();
      workspace_.emplace(bytes);
      workspace_bytes_ = bytes;
    }
    return static_cast<std::byte*>(workspace_->data());
  }

  cudnnHandle_t handle_ = nullptr;
  std::map<std::vector<int64_t>, fe::graph::Graph> graphs_;
  std::optional<DeviceMemory> workspace_;
  int64_t workspace_bytes_ = 0;
};

template <class Args>
void run_cudnn(const Args& a, Stream& stream) {
  auto& state = static_cast<NativeStream*>(stream.device())->cudnn_state;
  if (state == nullptr) state = std::make_shared<CudnnAttention>(stream);
  static_cast<CudnnAttention*>(state.get())->run(a, stream);
}

}  // namespace

std::string cudnn_missing() {
  if (load_failure().empty()) return "";
  return format_text("cuDNN is not found ({}); next: put its folder into LD_LIBRARY_PATH, or {}",
                     load_failure(), kOwnKernel);
}

int64_t cudnn_version() {
  return load_failure().empty() ? static_cast<int64_t>(fe::detail::get_backend_version()) : 0;
}

void attention_cudnn(const AttentionArgs& args, Stream& stream) { run_cudnn(args, stream); }

void attention_backward_cudnn(const AttentionBackwardArgs& args, Stream& stream) {
  run_cudnn(args, stream);
}

}  // namespace cambium::cuda

#else

namespace cambium::cuda {

std::string cudnn_missing() {
  return "this build was configured without the headers of cuDNN and cudnn-frontend; next: "
         "scripts/setup.sh --cudnn and `cmake --preset cuda`, or numerics.attention = own";
}

int64_t cudnn_version() { return 0; }

void attention_cudnn(const AttentionArgs&, Stream&) {
  fail(ExitCode::usage, "{}", cudnn_missing());
}

void attention_backward_cudnn(const AttentionBackwardArgs&, Stream&) {
  fail(ExitCode::usage, "{}", cudnn_missing());
}

}  // namespace cambium::cuda

#endif
