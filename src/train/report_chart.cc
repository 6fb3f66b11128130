#include "src/train/report_chart.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "src/base/check.h"

namespace cambium {
namespace {

constexpr size_t kMostPoints = 800;  // more cannot be told apart on a screen
constexpr double kViewBox = 1000;    // shapes live in a square that CSS stretches

struct Range {
  double low = 0;
  double high = 1;
  double step = 0.25;  // between grid lines
  double fraction(double value) const { return (value - low) / (high - low); }
};

// 1, 2 or 5 times a power of ten, so that about `ticks` of them span `extent`.
double nice_step(double extent, int ticks) {
  constexpr std::array<double, 4> kSteps = {1, 2, 5, 10};
  double power = 1;
  while (power * 10 <= extent / ticks) power *= 10;
  while (power > extent / ticks) power /= 10;
  for (const double step : kSteps) {
    if (step * power * ticks >= extent) return step * power;
  }
  return 10 * power;
}

Range y_range(const ChartSpec& chart) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  Range range{kInfinity, -kInfinity, 0};
  const auto widen = [&](double value) {
    if (!std::isfinite(value)) return;
    range.low = std::min(range.low, value);
    range.high = std::max(range.high, value);
  };
  for (const ChartSeries& series : chart.series) {
    for (const double value : series.y) widen(value);
  }
  for (const ChartLevel& level : chart.levels) widen(level.y);
  if (chart.floor == ChartFloor::zero) widen(0);
  if (range.low > range.high) return {};
  if (range.low == range.high) range.high = range.low + (range.low == 0 ? 1 : std::abs(range.low));
  const double step = nice_step(range.high - range.low, 4);
  return {std::floor(range.low / step) * step, std::ceil(range.high / step) * step, step};
}

Range x_range(const ChartSpec& chart) {
  double last = 1;
  for (const ChartSeries& series : chart.series) {
    for (const double x : series.x) last = std::max(last, x);
  }
  return {0, last, std::max(1.0, nice_step(last, 4))};
}

// The lowest and the highest point of each bucket, in order: spikes stay visible.
ChartSeries thinned(const ChartSeries& series) {
  if (series.x.size() <= kMostPoints) return series;
  ChartSeries thin = series;
  thin.x.clear();
  thin.y.clear();
  const size_t buckets = kMostPoints / 2;
  for (size_t bucket = 0; bucket < buckets; ++bucket) {
    const size_t begin = bucket * series.x.size() / buckets;
    const size_t end = (bucket + 1) * series.x.size() / buckets;
    const auto [low, high] = std::minmax_element(series.y.begin() + static_cast<ptrdiff_t>(begin),
                                                 series.y.begin() + static_cast<ptrdiff_t>(end));
    auto first = static_cast<size_t>(low - series.y.begin());
    auto second = static_cast<size_t>(high - series.y.begin());
    if (first > second) std::swap(first, second);
    for (const size_t index : {first, second}) {
      thin.x.push_back(series.x[index]);
      thin.y.push_back(series.y[index]);
      if (first == second) break;
    }
  }
  return thin;
}

std::string path_data(const ChartSeries& series, const Range& x, const Range& y) {
  std::string data;
  bool pen_down = false;
  for (size_t index = 0; index < series.x.size(); ++index) {
    if (!std::isfinite(series.y[index])) {
      pen_down = false;
      continue;
    }
    data +=
        fmt::format("{}{:.1f} {:.1f}", pen_down ? "L" : "M", x.fraction(series.x[index]) * kViewBox,
                    (1 - y.fraction(series.y[index])) * kViewBox);
    pen_down = true;
  }
  return data;
}

std::string series_svg(const ChartSeries& series, const Range& x, const Range& y) {
  if (series.mark != SeriesMark::points) {
    return fmt::format("<path class='line{}' stroke='var(--{})' d='{}'/>",
                       series.mark == SeriesMark::faint_line ? " faint" : "", series.color,
                       path_data(series, x, y));
  }
  std::string dots;  // zero-length strokes with round caps stay round however the box stretches
  for (size_t index = 0; index < series.x.size(); ++index) {
    if (!std::isfinite(series.y[index])) continue;
    dots += fmt::format("M{0:.1f} {1:.1f}L{0:.1f} {1:.1f}", x.fraction(series.x[index]) * kViewBox,
                        (1 - y.fraction(series.y[index])) * kViewBox);
  }
  return fmt::format(
      "<path class='line thin' stroke='var(--{0})' d='{1}'/>"
      "<path class='dots' stroke='var(--{0})' d='{2}'/>",
      series.color, path_data(series, x, y), dots);
}

std::string axis_label(double value) {
  const double size = std::abs(value);
  if (size >= 1000) return count_text(value);
  return size != 0 && size < 0.001 ? fmt::format("{:.3g}", value) : fmt::format("{:.4g}", value);
}

// Grid lines go into the SVG, their labels beside it.
struct Axes {
  std::string grid;
  std::string labels;
};

Axes make_axes(const Range& x, const Range& y) {
  Axes axes;
  const int y_ticks = static_cast<int>(std::lround((y.high - y.low) / y.step));
  for (int tick = 0; tick <= y_ticks; ++tick) {
    const double value = y.low + tick * y.step;
    const double top = (1 - y.fraction(value)) * 100;
    axes.grid += fmt::format("<path class='grid' d='M0 {0:.1f}H1000'/>", top * 10);
    const double shown = std::abs(value) < y.step * 1e-6 ? 0 : value;
    axes.labels +=
        fmt::format("<span class='y' style='top:{:.2f}%'>{}</span>", top, axis_label(shown));
  }
  for (double value = 0; value <= x.high; value += x.step) {
    axes.labels += fmt::format("<span class='x' style='left:{:.2f}%'>{}</span>",
                               x.fraction(value) * 100, count_text(value));
  }
  return axes;
}

std::string level_html(const ChartSpec& chart, const Range& y, std::string& svg) {
  std::string labels;
  std::vector<double> taken;
  for (const ChartLevel& level : chart.levels) {
    if (!std::isfinite(level.y)) continue;
    const double top = (1 - y.fraction(level.y)) * 100;
    svg += fmt::format("<path class='level' d='M0 {0:.1f}H1000'/>", top * 10);
    const bool crowded = std::any_of(taken.begin(), taken.end(),
                                     [&](double other) { return std::abs(other - top) < 9; });
    labels += fmt::format("<span class='level{}' style='top:{:.2f}%'>{} {:.3f}</span>",
                          crowded ? " under" : "", top, html_text(level.name), level.y);
    taken.push_back(top);
  }
  return labels;
}

std::string number_list(const std::vector<double>& values) {
  std::string list;
  for (const double value : values) {
    if (!list.empty()) list += ',';
    list += std::isfinite(value) ? fmt::format("{:.6g}", value) : std::string("null");
  }
  return list;
}

// What the hover script reads: ranges and points of one chart.
std::string chart_data(const std::vector<ChartSeries>& all, const Range& x, const Range& y) {
  std::string series_list;
  for (const ChartSeries& series : all) {
    if (series.mark == SeriesMark::faint_line) continue;
    if (!series_list.empty()) series_list += ',';
    series_list +=
        fmt::format("{{\"name\":\"{}\",\"color\":\"{}\",\"x\":[{}],\"y\":[{}]}}", series.name,
                    series.color, number_list(series.x), number_list(series.y));
  }
  return fmt::format("{{\"x\":[{},{}],\"y\":[{},{}],\"series\":[{}]}}", x.low, x.high, y.low,
                     y.high, series_list);
}

std::string legend_html(const ChartSpec& chart) {
  if (chart.series.size() < 2) return "";
  std::string legend = "<div class='legend'>";
  for (const ChartSeries& series : chart.series) {
    legend += fmt::format("<span><i class='{}' style='background:var(--{})'></i>{}</span>",
                          series.mark == SeriesMark::faint_line ? "faint" : "", series.color,
                          html_text(series.name));
  }
  return legend + "</div>";
}

enum class CellText { shown, hidden };

std::string heat_cell(double load, double mean, CellText text) {
  if (mean <= 0) return "<td></td>";
  const double ratio = load / mean;
  // One colour above the mean, one below; twice the mean and an idle expert are the full colours.
  const double strength = std::min(1.0, ratio >= 1 ? ratio - 1 : 1 - ratio);
  const std::string shown = fmt::format("{:.2f}", ratio);
  return fmt::format("<td class='{}' style='--a:{:.2f}' title='{} of the mean'>{}</td>",
                     ratio >= 1 ? "over" : "under", 0.04 + 0.86 * strength, shown,
                     text == CellText::shown ? "<b>" + shown + "</b>" : "");
}

}  // namespace

std::string html_text(const std::string& text) {
  std::string out;
  for (const char letter : text) {
    switch (letter) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      case '\'':
        out += "&#39;";
        break;
      default: {
        const auto code = static_cast<unsigned char>(letter);
        if ((code >= 32 && code != 127) || letter == '\n' || letter == '\t') out += letter;
      }
    }
  }
  return out;
}

std::string count_text(double count) {
  const double size = std::abs(count);
  if (size >= 1e12) return fmt::format("{:.2e}", count);
  if (size >= 999.5e6) return fmt::format("{:.3g} G", count / 1e9);
  if (size >= 999.5e3) return fmt::format("{:.3g} M", count / 1e6);
  std::string digits = fmt::format("{:.0f}", size);
  for (auto at = static_cast<ptrdiff_t>(digits.size()) - 3; at > 0; at -= 3) {
    digits.insert(static_cast<size_t>(at), ",");
  }
  return (count < 0 ? "-" : "") + digits;
}

std::string chart_html(const ChartSpec& chart) {
  const Range x = x_range(chart);
  const Range y = y_range(chart);
  Axes axes = make_axes(x, y);
  std::vector<ChartSeries> all;
  std::string shapes = axes.grid;
  const std::string level_labels = level_html(chart, y, shapes);
  for (const ChartSeries& series : chart.series) {
    CHECK_EQ(series.x.size(), series.y.size());
    all.push_back(thinned(series));
    shapes += series_svg(all.back(), x, y);
  }
  return fmt::format(
      "<section class='card chart'><h2>{0}</h2><p class='note'>{1}</p>{2}"
      "<div class='plot' role='img' aria-label='{0}'>"
      "<svg viewBox='0 0 1000 1000' preserveAspectRatio='none' aria-hidden='true'>{3}</svg>"
      "{4}{5}<div class='cross' hidden></div><div class='tip' hidden></div>"
      "<script type='application/json'>{6}</script></div></section>\n",
      html_text(chart.title), html_text(chart.note), legend_html(chart), shapes, axes.labels,
      level_labels, chart_data(all, x, y));
}

std::string heat_map_html(const HeatMapSpec& map) {
  size_t experts = 0;
  for (const auto& layer : map.load) experts = std::max(experts, layer.size());
  const bool dense = experts > 16;
  const CellText text = dense ? CellText::hidden : CellText::shown;
  std::string rows;
  for (size_t layer = 0; layer < map.load.size(); ++layer) {
    const std::vector<double>& load = map.load[layer];
    if (load.empty()) continue;
    double sum = 0;
    for (const double tokens : load) sum += tokens;
    rows += fmt::format("<tr><th>{}</th>", layer);
    for (const double tokens : load) {
      rows += heat_cell(tokens, sum / static_cast<double>(load.size()), text);
    }
    rows += "</tr>\n";
  }
  std::string head = "<tr><th class='corner'>layer</th>";
  for (size_t expert = 0; expert < experts; ++expert) head += fmt::format("<th>{}</th>", expert);
  const char* density = dense ? "dense" : experts > 8 ? "close" : "roomy";
  return fmt::format(
      "<section class='card{}'><h2>{}</h2><p class='note'>{}</p>"
      "<table class='heat {}'>{}</tr>\n{}</table></section>\n",
      dense ? " full" : "", html_text(map.title), html_text(map.note), density, head, rows);
}

}  // namespace cambium
