// A timeline of a GPU's step, read by CUPTI: when kernels of communication ran, and what of that no
// other kernel hid. It is a shared library that the driver loads into any CUDA program:
//
//   CUDA_INJECTION64_PATH=build/cuda/libcupti_timeline.so cambium train CONFIG --profile STEP
//
// Between cudaProfilerStart and cudaProfilerStop, which bracket that step, it records kernels,
// copies and fills; then it writes timeline-<pid>.json, which Perfetto loads, to the working
// directory, and one line to stderr: the span from first to last, the time in which compute ran,
// in which communication (NCCL's kernels) ran, and in which communication ran alone: exposed. A
// kernel of NCCL that waits for its peer counts as communication, as in `cambium plan`. A line for
// each kernel's name follows, dearest first. cambium_bench's gpu_moe and gpu_layer are bracketed
// the same way.
#include <cupti.h>
#include <cxxabi.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

namespace cambium::timeline {

namespace {

constexpr size_t kBufferBytes = size_t{1} << 20;
constexpr CUpti_ActivityKind kKinds[] = {CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL,
                                         CUPTI_ACTIVITY_KIND_MEMCPY, CUPTI_ACTIVITY_KIND_MEMSET};

struct Interval {
  uint64_t begin_ns, end_ns;
};

struct Activity {
  std::string name;
  uint32_t stream;
  Interval time;
  bool is_communication;
};

// CUPTI calls back from its own thread and from the program's.
struct Recorder {
  std::mutex mutex;
  std::vector<Activity> activities;
  size_t dropped = 0;
};

Recorder& recorder() {
  static Recorder one;  // a library that a driver loads has no other place for what it keeps
  return one;
}

void check_cupti(CUptiResult result, const char* call) {
  if (result == CUPTI_SUCCESS) return;
  const char* text = "";
  cuptiGetResultString(result, &text);
  std::fprintf(stderr, "timeline: %s: %s\n", call, text);
  std::abort();
}

void add_activity(const CUpti_Activity& record) {
  Recorder& to = recorder();
  if (record.kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) {
    const auto& kernel = reinterpret_cast<const CUpti_ActivityKernel10&>(record);
    const std::string name = kernel.name;
    to.activities.push_back({name,
                             kernel.streamId,
                             {kernel.start, kernel.end},
                             name.find("nccl") != std::string::npos});
  } else if (record.kind == CUPTI_ACTIVITY_KIND_MEMCPY) {
    const auto& copy = reinterpret_cast<const CUpti_ActivityMemcpy6&>(record);
    to.activities.push_back({"copy", copy.streamId, {copy.start, copy.end}, false});
  } else if (record.kind == CUPTI_ACTIVITY_KIND_MEMSET) {
    const auto& fill = reinterpret_cast<const CUpti_ActivityMemset4&>(record);
    to.activities.push_back({"fill", fill.streamId, {fill.start, fill.end}, false});
  }
}

void CUPTIAPI buffer_requested(uint8_t** buffer, size_t* bytes, size_t* most_records) {
  *buffer = static_cast<uint8_t*>(std::aligned_alloc(8, kBufferBytes));
  *bytes = *buffer == nullptr ? 0 : kBufferBytes;
  *most_records = 0;
}

void CUPTIAPI buffer_completed(CUcontext context, uint32_t stream, uint8_t* buffer, size_t,
                               size_t valid_bytes) {
  const std::lock_guard lock(recorder().mutex);
  CUpti_Activity* record = nullptr;
  while (cuptiActivityGetNextRecord(buffer, valid_bytes, &record) == CUPTI_SUCCESS) {
    add_activity(*record);
  }
  size_t dropped = 0;
  cuptiActivityGetNumDroppedRecords(context, stream, &dropped);
  recorder().dropped += dropped;
  std::free(buffer);
}

// Disjoint intervals in order.
std::vector<Interval> united(std::vector<Interval> parts) {
  std::sort(parts.begin(), parts.end(),
            [](const Interval& a, const Interval& b) { return a.begin_ns < b.begin_ns; });
  std::vector<Interval> whole;
  for (const Interval& part : parts) {
    if (!whole.empty() && part.begin_ns <= whole.back().end_ns) {
      whole.back().end_ns = std::max(whole.back().end_ns, part.end_ns);
    } else {
      whole.push_back(part);
    }
  }
  return whole;
}

uint64_t total_ns(const std::vector<Interval>& parts) {
  uint64_t sum = 0;
  for (const Interval& part : parts) sum += part.end_ns - part.begin_ns;
  return sum;
}

std::vector<Interval> intervals_of(const std::vector<Activity>& all, bool is_communication) {
  std::vector<Interval> parts;
  for (const Activity& activity : all) {
    if (activity.is_communication == is_communication) parts.push_back(activity.time);
  }
  return united(std::move(parts));
}

// Names of kernels are C identifiers and mangled: nothing in them needs an escape.
void write_trace(const std::vector<Activity>& all, uint64_t origin_ns) {
  const std::string path = "timeline-" + std::to_string(getpid()) + ".json";
  std::FILE* file = std::fopen(path.c_str(), "w");
  if (file == nullptr) {
    std::perror(path.c_str());
    return;
  }
  std::fprintf(file, "{\"traceEvents\":[");
  const char* separator = "\n";
  for (const Activity& activity : all) {
    std::fprintf(file,
                 "%s{\"ph\":\"X\",\"pid\":%d,\"tid\":%u,\"name\":\"%s\",\"ts\":%.3f,\"dur\":%.3f}",
                 separator, getpid(), activity.stream, activity.name.c_str(),
                 static_cast<double>(activity.time.begin_ns - origin_ns) / 1e3,
                 static_cast<double>(activity.time.end_ns - activity.time.begin_ns) / 1e3);
    separator = ",\n";
  }
  std::fprintf(file, "\n]}\n");
  if (std::fclose(file) != 0) std::perror(path.c_str());
}

// "void cambium::cuda::rms_norm_kernel<...>(...)" without what stands around the name.
std::string short_name(const std::string& mangled) {
  int status = 0;
  char* text = abi::__cxa_demangle(mangled.c_str(), nullptr, nullptr, &status);
  std::string name = status == 0 ? text : mangled;
  std::free(text);
  for (const char* part : {"void ", "cambium::cuda::", "(anonymous namespace)::"}) {
    for (size_t at; (at = name.find(part)) != std::string::npos;) name.erase(at, strlen(part));
  }
  return name.substr(0, std::min<size_t>(name.find('('), 72));
}

// Time and count of each kernel's name, dearest first.
void print_totals(const std::vector<Activity>& all) {
  std::map<std::string, std::pair<uint64_t, int>> totals;
  for (const Activity& activity : all) {
    auto& [ns, count] = totals[short_name(activity.name)];
    ns += activity.time.end_ns - activity.time.begin_ns;
    ++count;
  }
  std::vector<std::pair<uint64_t, std::string>> order;
  for (const auto& [name, total] : totals) order.emplace_back(total.first, name);
  std::sort(order.rbegin(), order.rend());
  for (const auto& [ns, name] : order) {
    std::fprintf(stderr, "timeline: %9.3f ms %5d x %s\n", static_cast<double>(ns) / 1e6,
                 totals[name].second, name.c_str());
  }
}

void report() {
  const std::lock_guard lock(recorder().mutex);
  const std::vector<Activity>& all = recorder().activities;
  if (all.empty()) {
    std::fprintf(stderr, "timeline: no kernel ran in the profiled step\n");
    return;
  }
  const std::vector<Interval> compute = intervals_of(all, false), comm = intervals_of(all, true);
  std::vector<Interval> both = compute;
  both.insert(both.end(), comm.begin(), comm.end());
  both = united(std::move(both));
  const uint64_t origin_ns = both.front().begin_ns;
  const double span = static_cast<double>(both.back().end_ns - origin_ns);
  const double exposed = static_cast<double>(total_ns(both) - total_ns(compute));
  write_trace(all, origin_ns);
  std::fprintf(stderr,
               "timeline: span %.3f ms, compute %.3f ms, communication %.3f ms, exposed %.3f ms "
               "(%.1f %% of the span), %zu activities, %zu dropped\n",
               span / 1e6, static_cast<double>(total_ns(compute)) / 1e6,
               static_cast<double>(total_ns(comm)) / 1e6, exposed / 1e6, 100 * exposed / span,
               all.size(), recorder().dropped);
  print_totals(all);
  recorder().activities.clear();
}

void CUPTIAPI on_profiler_call(void*, CUpti_CallbackDomain, CUpti_CallbackId id, const void* data) {
  const bool is_start = id == CUPTI_RUNTIME_TRACE_CBID_cudaProfilerStart_v4000;
  if (static_cast<const CUpti_CallbackData*>(data)->callbackSite != CUPTI_API_ENTER) return;
  if (is_start) {
    for (const CUpti_ActivityKind kind : kKinds) {
      check_cupti(cuptiActivityEnable(kind), "cuptiActivityEnable");
    }
    return;
  }
  for (const CUpti_ActivityKind kind : kKinds) {
    check_cupti(cuptiActivityDisable(kind), "cuptiActivityDisable");
  }
  check_cupti(cuptiActivityFlushAll(CUPTI_ACTIVITY_FLAG_FLUSH_FORCED), "cuptiActivityFlushAll");
  report();
}

}  // namespace

void start() {
  CUpti_SubscriberHandle subscriber = nullptr;
  check_cupti(cuptiSubscribe(&subscriber, on_profiler_call, nullptr), "cuptiSubscribe");
  for (const CUpti_CallbackId id : {CUPTI_RUNTIME_TRACE_CBID_cudaProfilerStart_v4000,
                                    CUPTI_RUNTIME_TRACE_CBID_cudaProfilerStop_v4000}) {
    check_cupti(cuptiEnableCallback(1, subscriber, CUPTI_CB_DOMAIN_RUNTIME_API, id),
                "cuptiEnableCallback");
  }
  check_cupti(cuptiActivityRegisterCallbacks(buffer_requested, buffer_completed),
              "cuptiActivityRegisterCallbacks");
}

}  // namespace cambium::timeline

// What the driver calls in the library that CUDA_INJECTION64_PATH names.
extern "C" __attribute__((visibility("default"))) int InitializeInjection() {
  cambium::timeline::start();
  return 1;
}
