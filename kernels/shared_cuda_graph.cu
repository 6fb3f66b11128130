// CUDA graphs of launches that repeat (kernels/cuda_stream.h).
#include <cstring>

#include "kernels/cuda_launch.cuh"

namespace cambium::cuda {

namespace {

constexpr size_t kFewest = 4;  // launches worth a graph
constexpr size_t kMost = 256;  // of a segment: the GPU is not kept waiting for longer ones
constexpr size_t kMostGraphs = 4096;
constexpr size_t kMostSeen = size_t{1} << 20;
constexpr size_t kObjectAlignment = 16;

cudaStream_t stream_of(void* native) { return static_cast<cudaStream_t>(native); }

}  // namespace

// While a segment's launches run, what asks for the stream does not end it. Then it is over, also
// when one of them failed.
struct LaunchGraphs::Running {
  LaunchGraphs& graphs;
  explicit Running(LaunchGraphs& of) : graphs(of) { graphs.runs_ = true; }
  ~Running() {
    graphs.runs_ = false;
    graphs.launches_.clear();
    graphs.objects_.clear();
  }
};

LaunchGraphs::LaunchGraphs(void* native) : native_(native) {}
LaunchGraphs::~LaunchGraphs() { forget_graphs(); }

void LaunchGraphs::forget_graphs() {
  for (const auto& [digest, graph] : graphs_) {
    if (graph != nullptr) cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(graph));
  }
  graphs_.clear();
}

// First of what was met once; of all where that is less than half.
void LaunchGraphs::make_room() {
  std::erase_if(graphs_, [](const auto& segment) { return segment.second == nullptr; });
  if (graphs_.size() > kMostGraphs / 2) forget_graphs();
}

bool LaunchGraphs::take_over(const DeviceLaunch& launch) {
  const std::lock_guard lock(mutex_);
  CHECK(!runs_);
  if (seen_.size() == kMostSeen) seen_.clear();
  if (seen_.insert(xxh3_128(launch.object, static_cast<size_t>(launch.bytes))).second) {
    end_segment();
    return false;
  }
  const size_t first = objects_.size();
  objects_.resize((first + static_cast<size_t>(launch.bytes) + kObjectAlignment - 1) /
                  kObjectAlignment * kObjectAlignment);
  std::memcpy(objects_.data() + first, launch.object, static_cast<size_t>(launch.bytes));
  launches_.push_back({launch.call, first});
  if (launches_.size() == kMost) end_segment();
  return true;
}

void LaunchGraphs::run_all() const {
  Workers none(1);
  for (const Launch& launch : launches_) launch.call(objects_.data() + launch.first, none);
}

// NOTE: what allocates from the stream's pool becomes nodes of the graph, with memory of its own.
void* LaunchGraphs::capture() const {
  check_cuda(cudaStreamBeginCapture(stream_of(native_), cudaStreamCaptureModeThreadLocal),
             "cudaStreamBeginCapture");
  cudaGraph_t graph = nullptr;
  try {
    run_all();
  } catch (...) {
    cudaStreamEndCapture(stream_of(native_), &graph);
    cudaGraphDestroy(graph);
    throw;
  }
  check_cuda(cudaStreamEndCapture(stream_of(native_), &graph), "cudaStreamEndCapture");
  cudaGraphExec_t exec = nullptr;
  const cudaError_t status = cudaGraphInstantiate(&exec, graph, 0);
  cudaGraphDestroy(graph);
  check_cuda(status, "cudaGraphInstantiate");
  return exec;
}

void LaunchGraphs::end_segment() {
  const std::lock_guard lock(mutex_);
  if (runs_ || launches_.empty()) return;
  const Running running(*this);
  if (launches_.size() < kFewest) return run_all();
  if (graphs_.size() == kMostGraphs) make_room();
  const auto [segment, is_new] =
      graphs_.try_emplace(xxh3_128(objects_.data(), objects_.size()), nullptr);
  if (is_new) return run_all();
  void*& graph = segment->second;
  if (graph == nullptr) {
    graph = capture();
    ++counts_.captures;
  }
  check_cuda(cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph), stream_of(native_)),
             "cudaGraphLaunch");
  counts_.joined += std::ssize(launches_);
  ++counts_.graphs;
}

}  // namespace cambium::cuda
