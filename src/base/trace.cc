#include "src/base/trace.h"

#include <algorithm>
#include <set>

#include "fmt/format.h"

namespace cambium {

namespace {

bool same_place(const WorkPlace& a, const WorkPlace& b) {
  return a.stage == b.stage && a.pass == b.pass && a.layer == b.layer &&
         a.micro_batch == b.micro_batch;
}

struct ChromeEvent {
  const char* name = "";
  int64_t start_ns = 0, end_ns = 0;
};

void append_event(std::string& out, const ChromeEvent& event, const TraceSpan& span) {
  fmt::format_to(
      std::back_inserter(out),
      ",\n{{\"ph\":\"X\",\"name\":\"{}\",\"pid\":{},\"tid\":{},\"ts\":{}.{:03},\"dur\":{}"
      ".{:03},\"args\":{{\"pass\":\"{}\",\"layer\":{},\"micro_batch\":{}}}}}",
      event.name, span.rank, span.lane, event.start_ns / 1000, event.start_ns % 1000,
      (event.end_ns - event.start_ns) / 1000, (event.end_ns - event.start_ns) % 1000,
      work_pass_name(span.place.pass), span.place.layer, span.place.micro_batch);
}

}  // namespace

void Trace::name_lane(int lane, const std::string& name) {
  if (std::ssize(lanes_) <= lane) lanes_.resize(static_cast<size_t>(lane) + 1);
  lanes_[static_cast<size_t>(lane)] = name;
}

std::string Trace::chrome_json() const {
  std::vector<TraceSpan> sorted = spans_;
  std::stable_sort(sorted.begin(), sorted.end(), [](const TraceSpan& a, const TraceSpan& b) {
    return std::tuple(a.rank, a.lane, a.start_ns) < std::tuple(b.rank, b.lane, b.start_ns);
  });
  std::string out =
      "{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n{\"ph\":\"M\",\"name\":"
      "\"trace\",\"pid\":0}";
  std::set<std::pair<int, int>> named;
  for (size_t first = 0; first < sorted.size();) {
    const TraceSpan& head = sorted[first];
    if (named.insert({head.rank, head.lane}).second) {
      fmt::format_to(std::back_inserter(out),
                     ",\n{{\"ph\":\"M\",\"name\":\"process_name\",\"pid\":{0},\"args\":{{\"name\":"
                     "\"rank {0}\"}}}},\n{{\"ph\":\"M\",\"name\":\"thread_name\",\"pid\":{0},"
                     "\"tid\":{1},\"args\":{{\"name\":\"{2}\"}}}}",
                     head.rank, head.lane, lanes_[static_cast<size_t>(head.lane)]);
    }
    size_t end = first;
    while (end < sorted.size() && sorted[end].rank == head.rank && sorted[end].lane == head.lane &&
           same_place(sorted[end].place, head.place)) {
      ++end;
    }
    append_event(out, {work_stage_name(head.place.stage), head.start_ns, sorted[end - 1].end_ns},
                 head);
    for (; first < end; ++first) {
      const TraceSpan& span = sorted[first];
      append_event(out, {span.name, span.start_ns, span.end_ns}, span);
    }
  }
  return out + "\n]}\n";
}

}  // namespace cambium
