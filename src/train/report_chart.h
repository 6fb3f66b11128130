// Charts and heat maps of report.html as HTML fragments: SVG shapes with labels in HTML around
// them, so that a chart stretches to any width while its text keeps its size.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace cambium {

enum class SeriesMark { line, faint_line, points };

struct ChartSeries {
  std::string name;
  std::string color;  // a CSS variable of the page: "blue", "orange"
  SeriesMark mark = SeriesMark::line;
  std::vector<double> x;
  std::vector<double> y;  // NaN and infinities leave a gap
};

// A dashed horizontal line with its name.
struct ChartLevel {
  std::string name;
  double y = 0;
};

enum class ChartFloor { data, zero };

struct ChartSpec {
  std::string title;
  std::string note;  // below the title: unit, meaning
  ChartFloor floor = ChartFloor::data;
  std::vector<ChartSeries> series;
  std::vector<ChartLevel> levels;
};

// Tokens by [layer][expert], shown as load over the layer's mean.
struct HeatMapSpec {
  std::string title;
  std::string note;
  std::vector<std::vector<double>> load;
};

std::string chart_html(const ChartSpec& chart);
std::string heat_map_html(const HeatMapSpec& map);

// Escapes &, <, >, " and '; drops control characters other than newline and tab.
std::string html_text(const std::string& text);
// 1234 -> "1,234"; 1234567 -> "1.23 M".
std::string count_text(double count);

}  // namespace cambium
