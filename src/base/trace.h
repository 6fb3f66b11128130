// Trace: what ran when on which stream of which rank, and its file for Perfetto (ui.perfetto.dev).
//
// Filled by virtual time (sim/virtual_time.h): one span for every op and every transfer. In the
// file a rank is a process, a stream a thread, and spans of one stage lie within a span of the
// stage's name.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "src/base/work_place.h"

namespace cambium {

struct TraceSpan {
  int rank = 0;
  int lane = 0;           // stream of the rank: 0, 1, ..
  const char* name = "";  // of static lifetime
  WorkPlace place;
  int64_t start_ns = 0, end_ns = 0;
};

class Trace {
 public:
  void name_lane(int lane, const std::string& name);
  // Spans of one lane do not overlap and come in order of time.
  void add(const TraceSpan& span) { spans_.push_back(span); }
  const std::vector<TraceSpan>& spans() const { return spans_; }
  const std::vector<std::string>& lanes() const { return lanes_; }
  // Chrome's JSON: complete events in microseconds.
  std::string chrome_json() const;

 private:
  std::vector<TraceSpan> spans_;
  std::vector<std::string> lanes_;
};

// The trace as an SVG picture, the shares [from, to] of its time magnified (src/base/timeline.cc).
std::string timeline_svg(const Trace& trace, const std::string& title, double from, double to);

}  // namespace cambium
