// execute(): the one place where an op meets its backend, and the cost it declares.
//
// An op is an args struct (views and scalars), `check_args`, `cost`, `visit_views`, and two
// implementations of the same contract: reference::op(args, workers) and cuda::op(args, stream).
// Calling op(args, context) goes through `execute`, whose switch picks one of three executions.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <source_location>
#include <string>
#include <vector>

#include "src/base/stream.h"
#include "src/base/view.h"

namespace cambium {

#ifdef CAMBIUM_HAS_CUDA
inline constexpr bool kHasCuda = true;
#else
inline constexpr bool kHasCuda = false;
#endif

// What one call of an op does. `op` has static lifetime; `shape_key` is what cost tables are
// indexed by (the extents that decide the time, 0 where unused).
struct Cost {
  const char* op = "";
  std::array<int64_t, 6> shape_key{};
  int64_t flops = 0;
  int64_t bytes = 0;
  int64_t workspace_bytes = 0;
};

enum class Backend { reference, cuda, shape_only };

// Sums of `Cost` by op name: what tests assert per rank, and what reports print.
struct OpTotals {
  int64_t calls = 0;
  int64_t flops = 0;
  int64_t bytes = 0;
};

// Sees ops, on a GPU where they are launched at once (kernels/cuda_stream.h), on the CPU where they
// run, and where a layer's stages begin. For benchmarks, calibration and profiles.
class OpTimer {
 public:
  virtual ~OpTimer() = default;
  virtual void before(const Cost& cost, Stream& stream) = 0;
  virtual void after(Stream& stream) = 0;
  virtual void begin_stage(const char*) {}  // ends the one before; "" = none
};

// Where shape-only execution charges costs.
class OpCharge {
 public:
  virtual ~OpCharge() = default;
  virtual void charge(const Cost& cost, Stream& stream) = 0;
};

// What an op needs beside its args. One per rank and stream; passed explicitly.
struct OpContext {
  Backend backend = Backend::reference;
  Stream* stream = nullptr;
  std::map<std::string, OpTotals>* totals = nullptr;  // null = not counted
  OpTimer* timer = nullptr;                           // null = not timed
  OpCharge* charge = nullptr;                         // shape-only execution
};

// What an op is called with: `rms_norm(args, rank.ops)` makes one, which knows where that is
// written.
struct OpCall {
  OpCall(OpContext& op_context,
         std::source_location call_site = std::source_location::current())  // NOLINT: implicit
      : context(op_context), site(call_site) {}
  OpContext& context;
  std::source_location site;
};

// Stands where an op has no CUDA kernel yet (`CPU_ONLY` in kernels/ops.cmake).
inline constexpr std::nullptr_t kCpuOnly = nullptr;

// Tells the stream's observer the bytes of every view; a view of rows with gaps is one interval a
// row.
template <class Args>
void declare_accesses(const char* op, const Args& args, Stream& stream, std::source_location site) {
  std::vector<MemoryAccess> accesses;
  visit_views(args, [&](const char* name, const RawView& view) {
    if (view.empty() || view.elements() == 0) return;
    const int64_t rows = view.is_contiguous() ? 1 : view[0];
    const int64_t element = dtype_bytes(view.dtype);
    for (int64_t row = 0; row < rows; ++row) {
      accesses.push_back(
          {static_cast<const std::byte*>(view.data) + row * view.row_stride * element,
           view.elements() / rows * element, view.access, name});
    }
  });
  stream.observer()->declare({stream, op, accesses, site});
}

// `cuda` is written `kHasCuda ? cuda::op : nullptr`: the condition is constant, so a CPU build
// refers to no cuda:: symbol.
template <class Args>
struct TimedCall {
  void (*reference)(const Args&, Workers&);
  Args args;
  Cost cost;
  OpTimer* timer;
  Stream* stream;
  static void run(const TimedCall& call, Workers& workers) {
    call.timer->before(call.cost, *call.stream);
    call.reference(call.args, workers);
    call.timer->after(*call.stream);
  }
};

template <class Args>
void execute(const Args& args, OpCall op_call, void (*reference)(const Args&, Workers&),
             std::type_identity_t<void (*)(const Args&, Stream&)> cuda) {
  OpContext& context = op_call.context;
  check_args(args);
  const Cost call = cost(args);
  if (context.totals != nullptr) {
    OpTotals& sum = (*context.totals)[call.op];
    ++sum.calls;
    sum.flops += call.flops;
    sum.bytes += call.bytes;
  }
  switch (context.backend) {
    case Backend::reference:
      if (context.stream->observer() != nullptr) {
        declare_accesses(call.op, args, *context.stream, op_call.site);
      }
      if (context.timer == nullptr) return context.stream->enqueue(call.op, reference, args);
      context.stream->enqueue(
          call.op, TimedCall<Args>::run,
          TimedCall<Args>{reference, args, call, context.timer, context.stream});
      return;
    case Backend::cuda:
      if (cuda == nullptr) {
        fail(ExitCode::usage, "op '{}' has no CUDA kernel in this build; set run.device = \"cpu\"",
             call.op);
      }
      if (context.timer != nullptr) context.timer->before(call, *context.stream);
      context.stream->launch(call.op, cuda, args);
      if (context.timer != nullptr) context.timer->after(*context.stream);
      return;
    case Backend::shape_only:
      CHECK(context.charge != nullptr);
      context.charge->charge(call, *context.stream);
      return;
  }
}

// Helpers of check_args: a message with the op, the view and both values.
inline void check_shape(const char* op, const char* view_name, const RawView& view, Shape want) {
  if (view.shape == want) return;
  auto show = [](const Shape& shape) {
    return format_text("[{},{},{},{}] rank {}", shape[0], shape[1], shape[2], shape[3], shape.rank);
  };
  fail(ExitCode::internal, "{}: {} has shape {}, expected {}", op, view_name, show(view.shape),
       show(want));
}

}  // namespace cambium
