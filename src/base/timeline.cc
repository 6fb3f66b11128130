// A trace as a picture (SVG): a row per stream of each rank, a colour per stage, forward full,
// backward darker, weight gradients pale; the whole step above, a part of it magnified below.
#include <algorithm>
#include <map>
#include <tuple>

#include "fmt/format.h"
#include "src/base/trace.h"

namespace cambium {

namespace {

constexpr int kWidth = 1500, kLeft = 110, kRight = 20, kRowHeight = 15, kRowGap = 2, kRankGap = 8;
constexpr int kPanelGap = 58, kTop = 64;
constexpr int kTenths = 10;  // coordinates are tenths of a pixel

constexpr int kStageColours[] = {0x9a9a9a, 0x3b76c4, 0xe08a1e, 0x3f9b57, 0xc2423d,
                                 0x8a5fbf, 0x6fb7c9, 0xb8a13a, 0x7a7a7a, 0x595959};

// Each channel moved towards black or white by a share.
int shaded(int colour, WorkPass pass) {
  int result = 0;
  for (int shift = 0; shift < 24; shift += 8) {
    int channel = colour >> shift & 0xff;
    if (pass == WorkPass::backward) channel = channel * 5 / 8;
    if (pass == WorkPass::weights) channel = 255 - (255 - channel) / 2;
    result |= channel << shift;
  }
  return result;
}

struct Window {
  int64_t begin_ns = 0, end_ns = 0;
};

// Rectangles of one stage and pass, as one SVG path.
using Paths = std::map<std::pair<WorkStage, WorkPass>, std::string>;
using Lane = std::vector<TraceSpan>;
using Lanes = std::map<std::pair<int, int>, Lane>;

bool same_colour(const WorkPlace& a, const WorkPlace& b) {
  return a.stage == b.stage && a.pass == b.pass;
}

int64_t tenth_of(const Window& window, int64_t ns) {
  const double share = static_cast<double>(ns - window.begin_ns) /
                       static_cast<double>(window.end_ns - window.begin_ns);
  return static_cast<int64_t>(share * kTenths * (kWidth - kLeft - kRight));
}

// Neighbours of one colour that touch within a tenth of a pixel become one rectangle.
void draw_lane(const Lane& lane, const Window& window, int64_t y, Paths& paths) {
  for (size_t first = 0; first < lane.size();) {
    const TraceSpan& head = lane[first];
    int64_t end_ns = head.end_ns;
    size_t next = first + 1;
    while (next < lane.size() && same_colour(lane[next].place, head.place) &&
           tenth_of(window, lane[next].start_ns) <= tenth_of(window, end_ns) + 1) {
      end_ns = lane[next++].end_ns;
    }
    first = next;
    const int64_t begin = tenth_of(window, std::max(head.start_ns, window.begin_ns));
    const int64_t width = tenth_of(window, std::min(end_ns, window.end_ns)) - begin;
    if (head.start_ns >= window.end_ns || end_ns <= window.begin_ns || width <= 0) continue;
    fmt::format_to(std::back_inserter(paths[{head.place.stage, head.place.pass}]),
                   "M{} {}h{}v{}h-{}z", kTenths * kLeft + begin, y, width, kTenths * kRowHeight,
                   width);
  }
}

// Messages between pipeline ranks are of no stage.
WorkPlace shown_place(const Trace& trace, const TraceSpan& span) {
  return trace.lanes()[static_cast<size_t>(span.lane)] == "pipe" ? WorkPlace{} : span.place;
}

// One panel; returns the pixels it takes.
int draw_panel(const Trace& trace, const Lanes& lanes, const Window& window, int top,
               std::string& out) {
  Paths paths;
  int y = top, rank = -1;
  for (const auto& [where, lane] : lanes) {
    if (where.first != rank && rank >= 0) y += kRankGap;
    rank = where.first;
    fmt::format_to(std::back_inserter(out), "<text x=\"4\" y=\"{}\">rank {} {}</text>\n",
                   y + kRowHeight - 3, rank, trace.lanes()[static_cast<size_t>(where.second)]);
    draw_lane(lane, window, int64_t{kTenths} * y, paths);
    y += kRowHeight + kRowGap;
  }
  for (const auto& [colour, path] : paths) {
    fmt::format_to(std::back_inserter(out),
                   "<path class=\"{} {}\" transform=\"scale(.1)\" d=\"{}\"/>\n",
                   work_stage_name(colour.first), work_pass_name(colour.second), path);
  }
  constexpr int kMarks = 8;
  for (int mark = 0; mark <= kMarks; ++mark) {
    const int x = kLeft + mark * (kWidth - kLeft - kRight) / kMarks;
    const int64_t ns = window.begin_ns + mark * (window.end_ns - window.begin_ns) / kMarks;
    fmt::format_to(std::back_inserter(out),
                   "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">{:.1f} ms</text>\n", x, y + 14,
                   1e-6 * static_cast<double>(ns));
  }
  return y - top;
}

std::string legend() {
  std::string out;
  int x = kLeft;
  for (const WorkStage stage : {WorkStage::attend, WorkStage::dispatch, WorkStage::expert,
                                WorkStage::combine, WorkStage::aggregate, WorkStage::embed,
                                WorkStage::head, WorkStage::reduce, WorkStage::update}) {
    for (const WorkPass pass : {WorkPass::forward, WorkPass::backward, WorkPass::weights}) {
      fmt::format_to(std::back_inserter(out), "<path class=\"{} {}\" d=\"M{} 30h14v14h-14z\"/>\n",
                     work_stage_name(stage), work_pass_name(pass), x);
      x += 15;
    }
    fmt::format_to(std::back_inserter(out), "<text x=\"{}\" y=\"41\">{}</text>\n", x + 2,
                   work_stage_name(stage));
    x += 80;
  }
  return out;
}

}  // namespace

std::string timeline_svg(const Trace& trace, const std::string& title, double from, double to) {
  Lanes lanes;
  int64_t end_ns = 1;
  for (const TraceSpan& span : trace.spans()) {
    Lane& lane = lanes[{span.rank, span.lane}];
    lane.push_back(span);
    lane.back().place = shown_place(trace, span);
    end_ns = std::max(end_ns, span.end_ns);
  }
  for (auto& [where, lane] : lanes) {
    std::ranges::stable_sort(lane, {}, &TraceSpan::start_ns);
  }
  std::string body = legend();
  int height = kTop + draw_panel(trace, lanes, {0, end_ns}, kTop, body) + kPanelGap;
  const auto at = [&](double share) {
    return static_cast<int64_t>(share * static_cast<double>(end_ns));
  };
  fmt::format_to(std::back_inserter(body),
                 "<text x=\"{}\" y=\"{}\">from {:.0f} % to {:.0f} %</text>\n", kLeft, height - 8,
                 100 * from, 100 * to);
  height += draw_panel(trace, lanes, {at(from), at(to)}, height, body) + 24;
  std::string style;
  for (size_t stage = 0; stage < std::size(kStageColours); ++stage) {
    for (const WorkPass pass : {WorkPass::forward, WorkPass::backward, WorkPass::weights}) {
      fmt::format_to(std::back_inserter(style), ".{}.{}{{fill:#{:06x}}}",
                     work_stage_name(static_cast<WorkStage>(stage)), work_pass_name(pass),
                     shaded(kStageColours[stage], pass));
    }
  }
  return fmt::format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {0} {1}\" width=\"{0}\" "
      "height=\"{1}\">\n<style>text{{font:11px sans-serif;fill:#222}}{2}</style>\n<rect "
      "width=\"{0}\" height=\"{1}\" "
      "fill=\"#fff\"/>\n<text x=\"{3}\" y=\"18\" style=\"font-size:14px\">{4}</text>\n{5}</svg>\n",
      kWidth, height, style, kLeft, title, body);
}

}  // namespace cambium
