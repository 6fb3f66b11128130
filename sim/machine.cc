#include "sim/machine.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <sstream>

#include "fmt/format.h"
#include "sim/machine_files.h"
#include "src/base/fmath.h"
#include "toml++/toml.h"

namespace cambium::sim {

namespace {

constexpr double kLog2OfE = 1.4426950408889634;

enum class Unit { bytes, bytes_per_s, flops_per_s, time_ns, count };

struct UnitName {
  const char* name;
  Unit unit;
  double factor;
};
constexpr UnitName kUnits[] = {
    {"B", Unit::bytes, 1},
    {"KB", Unit::bytes, 1e3},
    {"MB", Unit::bytes, 1e6},
    {"GB", Unit::bytes, 1e9},
    {"TB", Unit::bytes, 1e12},
    {"KiB", Unit::bytes, 1024},
    {"MiB", Unit::bytes, 1048576},
    {"GiB", Unit::bytes, 1073741824},
    {"MB/s", Unit::bytes_per_s, 1e6},
    {"GB/s", Unit::bytes_per_s, 1e9},
    {"TB/s", Unit::bytes_per_s, 1e12},
    {"GFLOP/s", Unit::flops_per_s, 1e9},
    {"TFLOP/s", Unit::flops_per_s, 1e12},
    {"PFLOP/s", Unit::flops_per_s, 1e15},
    {"ns", Unit::time_ns, 1},
    {"us", Unit::time_ns, 1e3},
    {"ms", Unit::time_ns, 1e6},
    {"s", Unit::time_ns, 1e9},
};

const char* unit_example(Unit unit) {
  switch (unit) {
    case Unit::bytes:
      return "a size such as \"141 GB\"";
    case Unit::bytes_per_s:
      return "a rate such as \"4.8 TB/s\"";
    case Unit::flops_per_s:
      return "a rate such as \"989 TFLOP/s\"";
    case Unit::time_ns:
      return "a time such as \"4 us\"";
    case Unit::count:
      return "a plain number";
  }
  return "";
}

// Reads one machine file; every refusal names file and key.
class MachineReader {
 public:
  MachineReader(const std::string& text, std::string path) : path_(std::move(path)) {
    try {
      root_ = toml::parse(text);
    } catch (const toml::parse_error& error) {
      fail(ExitCode::usage, "machine file {}:{}: {}; next: see sim/machines/laptop.toml", path_,
           error.source().begin.line, error.description());
    }
  }
  Machine read();

 private:
  [[noreturn]] void refuse(const std::string& key, const std::string& why) const {
    fail(ExitCode::usage, "machine file {}: {}: {}; next: see sim/machines/laptop.toml", path_, key,
         why);
  }
  const toml::table& table(const char* name) const {
    const toml::table* found = root_[name].as_table();
    if (found == nullptr) refuse(fmt::format("[{}]", name), "is missing");
    return *found;
  }
  std::string text(const toml::table& from, const std::string& key) const {
    const auto value = from[key].value<std::string>();
    if (!value || value->empty()) refuse(key, "is missing or no text");
    return *value;
  }
  // { value = "376 GB/s", source = "..." }
  double quantity(const char* section, const char* key, Unit unit) const {
    const std::string where = fmt::format("{}.{}", section, key);
    const toml::table* entry = table(section)[key].as_table();
    if (entry == nullptr) {
      refuse(where, fmt::format("expected {{ value = {}, source = \"...\" }}", unit_example(unit)));
    }
    if (entry->get_as<std::string>("source") == nullptr ||
        entry->get_as<std::string>("source")->get().empty()) {
      refuse(where, "has no source: say where the figure comes from");
    }
    double number = 0;
    if (unit == Unit::count) {
      const auto value = (*entry)["value"].value_exact<int64_t>();
      if (!value) refuse(where, "expected a plain number");
      number = static_cast<double>(*value);
    } else {
      number = parse(where, (*entry)["value"].value_or(std::string()), unit);
    }
    if (!std::isfinite(number) || number < 0) refuse(where, "is negative or not finite");
    return number;
  }
  double parse(const std::string& where, const std::string& value, Unit unit) const {
    char* end = nullptr;
    const double number = std::strtod(value.c_str(), &end);
    while (*end == ' ') ++end;
    for (const UnitName& known : kUnits) {
      if (known.name != std::string_view(end) || end == value.c_str()) continue;
      if (known.unit == unit) return number * known.factor;
    }
    refuse(where, fmt::format("\"{}\" is not {}", value, unit_example(unit)));
  }
  double positive(const char* section, const char* key, Unit unit) const {
    const double value = quantity(section, key, unit);
    if (value <= 0) refuse(fmt::format("{}.{}", section, key), "must be above 0");
    return value;
  }
  LinkModel link(const char* section) const;
  void op(const toml::table& entry, Machine& machine) const;
  CollectiveCurve collective(const toml::table& entry) const;

  std::string path_;
  toml::table root_;
};

LinkModel MachineReader::link(const char* section) const {
  LinkModel link;
  link.latency_ns = quantity(section, "latency", Unit::time_ns);
  link.rank_latency_ns = quantity(section, "rank_latency", Unit::time_ns);
  link.bytes_per_s = positive(section, "bandwidth", Unit::bytes_per_s);
  const std::string where = fmt::format("{}.efficiency", section);
  const toml::table* curve = table(section)["efficiency"].as_table();
  if (curve == nullptr || (*curve)["source"].value_or(std::string()).empty()) {
    refuse(where, "expected { points = [[\"4 KiB\", 0.1], ...], source = \"...\" }");
  }
  const toml::array* points = (*curve)["points"].as_array();
  if (points == nullptr || points->empty()) refuse(where, "has no points");
  for (const toml::node& node : *points) {
    const toml::array* pair = node.as_array();
    if (pair == nullptr || pair->size() != 2) refuse(where, "a point is [\"4 KiB\", 0.1]");
    const double bytes = parse(where, (*pair)[0].value_or(std::string()), Unit::bytes);
    const double share = (*pair)[1].value_or(-1.0);
    if (!(share > 0 && share <= 1)) refuse(where, "a share is above 0 and at most 1");
    if (!link.efficiency.empty() && link.efficiency.back().first >= log2(bytes)) {
      refuse(where, "sizes must ascend");
    }
    link.efficiency.emplace_back(log2(bytes), share);
  }
  return link;
}

CollectiveCurve MachineReader::collective(const toml::table& entry) const {
  CollectiveCurve curve;
  const std::string name = text(entry, "kind");
  const std::string where = "collective " + name;
  bool known = false;
  for (const CollectiveKind kind : kMeasuredCollectives) {
    if (name != collective_name(kind)) continue;
    curve.kind = kind;
    known = true;
  }
  if (!known) refuse(where, "kind is all_to_all_v, all_gather, reduce_scatter or all_reduce");
  if (text(entry, "source").empty()) refuse(where, "has no source");
  curve.ranks = entry["ranks"].value_or(int64_t{0});
  if (curve.ranks < 2) refuse(where, "ranks is at least 2");
  const toml::array* points = entry["points"].as_array();
  if (points == nullptr || points->empty()) refuse(where, "has no points");
  for (const toml::node& node : *points) {
    const toml::array* pair = node.as_array();
    if (pair == nullptr || pair->size() != 2) refuse(where, "a point is [\"4 KiB\", \"21 us\"]");
    const double bytes = parse(where, (*pair)[0].value_or(std::string()), Unit::bytes);
    const double ns = parse(where, (*pair)[1].value_or(std::string()), Unit::time_ns);
    if (!(bytes >= 1) || !(ns > 0)) refuse(where, "a point's size and time are above 0");
    if (!curve.points.empty() && curve.points.back().first >= log2(bytes)) {
      refuse(where, "sizes must ascend");
    }
    curve.points.emplace_back(log2(bytes), fmath::log(ns));
  }
  return curve;
}

void MachineReader::op(const toml::table& entry, Machine& machine) const {
  const std::string name = text(entry, "name");
  const std::string where = "op " + name;
  if (text(entry, "source").empty()) refuse(where, "has no source");
  OpTable& made = machine.ops[name];
  if (!made.points.empty()) refuse(where, "is there twice");
  const std::string bound = text(entry, "bound");
  if (bound != "compute" && bound != "memory") refuse(where, "bound is compute or memory");
  made.bound = bound == "compute" ? TimedOp::Bound::compute : TimedOp::Bound::memory;
  made.row_tile = entry["row_tile"].value_or(int64_t{1});
  made.is_measured = entry["measured"].value_or(true);
  made.residual = entry["residual"].value_or(0.0);
  if (made.row_tile < 1) refuse(where, "row_tile is at least 1");
  const toml::array* points = entry["points"].as_array();
  if (points == nullptr || points->empty()) refuse(where, "has no points");
  for (const toml::node& node : *points) {
    const toml::table* point = node.as_table();
    const toml::array* shape = point == nullptr ? nullptr : (*point)["shape"].as_array();
    if (shape == nullptr || shape->empty() || shape->size() > 6) {
      refuse(where, "a point is { shape = [...], flops = .., bytes = .., us = .. }");
    }
    Cost cost{name.c_str(), {}, 0, 0, 0};
    for (size_t i = 0; i < shape->size(); ++i) cost.shape_key[i] = (*shape)[i].value_or(int64_t{0});
    cost.flops = static_cast<int64_t>((*point)["flops"].value_or(0.0));
    cost.bytes = static_cast<int64_t>((*point)["bytes"].value_or(0.0));
    const double us = (*point)["us"].value_or(0.0);
    if (!(us > 0) || cost.flops < 0 || cost.bytes <= 0) {
      refuse(where, "a point needs bytes and us above 0, and flops of 0 or more");
    }
    const OpTable::Point made_point{log_extents(cost.shape_key),
                                    fmath::log(us * 1e3 / roofline_ns(machine, &made, cost, {}))};
    if (made.points.empty()) made.least = made.most = made_point.log_extent;
    for (size_t i = 0; i < 6; ++i) {
      made.least[i] = std::min(made.least[i], made_point.log_extent[i]);
      made.most[i] = std::max(made.most[i], made_point.log_extent[i]);
    }
    made.points.push_back(made_point);
  }
}

Machine MachineReader::read() {
  Machine machine;
  machine.name = text(root_, "name");
  const toml::table& device = table("device");
  machine.device = text(device, "kind");
  machine.compute = text(device, "compute");
  if (machine.device != "cpu" && machine.device != "cuda") refuse("device.kind", "is cpu or cuda");
  if (machine.compute != "fp32" && machine.compute != "bf16") {
    refuse("device.compute", "is fp32 or bf16");
  }
  machine.is_shared = device["shared"].value_or(false);
  machine.memory_bytes = static_cast<int64_t>(positive("device", "memory", Unit::bytes));
  machine.reserved_bytes = static_cast<int64_t>(quantity("device", "reserved", Unit::bytes));
  machine.peak_flops_per_s = positive("device", "peak", Unit::flops_per_s);
  machine.bytes_per_s = positive("device", "memory_bandwidth", Unit::bytes_per_s);
  machine.launch_ns = quantity("device", "launch", Unit::time_ns);
  machine.least_op_ns = quantity("device", "shortest_op", Unit::time_ns);
  machine.wait_ns = quantity("device", "host_wait", Unit::time_ns);
  machine.copy_bytes_per_s = positive("device", "copy_bandwidth", Unit::bytes_per_s);
  machine.multiprocessors = positive("device", "multiprocessors", Unit::count);
  machine.comm_multiprocessors = quantity("overlap", "multiprocessors", Unit::count);
  machine.comm_memory_share = quantity("overlap", "memory_percent", Unit::count) / 100;
  if (machine.comm_multiprocessors >= machine.multiprocessors || machine.comm_memory_share >= 1) {
    refuse("overlap", "a transfer takes less than all of the device");
  }
  machine.node_ranks = static_cast<int64_t>(positive("node", "devices", Unit::count));
  machine.nics = static_cast<int64_t>(positive("node", "nics", Unit::count));
  machine.near = link("near");
  machine.far = link("far");
  const toml::array* ops = root_["op"].as_array();
  if (ops == nullptr || ops->empty()) refuse("[[op]]", "no op was measured");
  for (const toml::node& node : *ops) {
    if (node.as_table() == nullptr) refuse("[[op]]", "is no table");
    op(*node.as_table(), machine);
  }
  if (const toml::array* curves = root_["collective"].as_array()) {
    for (const toml::node& node : *curves) {
      if (node.as_table() == nullptr) refuse("[[collective]]", "is no table");
      machine.collectives.push_back(collective(*node.as_table()));
    }
  }
  return machine;
}

}  // namespace

CollectiveTime collective_time(const Machine& machine, const CollectiveSize& size) {
  const auto distance = [&](const CollectiveCurve& curve) {
    return std::abs(fmath::log(static_cast<double>(curve.ranks) / static_cast<double>(size.ranks)));
  };
  const CollectiveCurve* curve = nullptr;
  for (const CollectiveCurve& other : machine.collectives) {
    if (other.kind != size.kind) continue;
    if (curve == nullptr || distance(other) < distance(*curve)) curve = &other;
  }
  if (curve == nullptr || size.bytes <= 0) return {};
  CollectiveTime time{.is_measured = true};
  const double at = log2(size.bytes);
  const auto& points = curve->points;
  time.is_extrapolated =
      curve->ranks != size.ranks || at < points.front().first - 1 || at > points.back().first + 1;
  const auto above =
      std::ranges::lower_bound(points, at, {}, [](const auto& p) { return p.first; });
  double log_ns = 0;
  if (above == points.begin()) {
    log_ns = points.front().second;
  } else if (above == points.end()) {
    log_ns = points.back().second + (at - points.back().first) / kLog2OfE;
  } else {
    const auto below = std::prev(above);
    const double part = (at - below->first) / (above->first - below->first);
    log_ns = below->second + part * (above->second - below->second);
  }
  time.ns = fmath::exp(log_ns);
  return time;
}

std::string machine_source(const std::string& name_or_path) {
  for (const MachineFile& file : machine_files()) {
    if (name_or_path == file.name) return file.text;
  }
  std::ifstream file(name_or_path);
  if (!file) {
    std::string names;
    for (const MachineFile& known : machine_files()) names += std::string(" ") + known.name;
    fail(ExitCode::usage, "no machine '{}': neither a file nor one of{}; next: `cambium calibrate`",
         name_or_path, names);
  }
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

Machine load_machine(const std::string& name_or_path) {
  const bool built_in = std::ranges::any_of(
      machine_files(), [&](const MachineFile& file) { return name_or_path == file.name; });
  return parse_machine(machine_source(name_or_path),
                       built_in ? fmt::format("sim/machines/{}.toml", name_or_path) : name_or_path);
}

Machine parse_machine(const std::string& text, const std::string& path) {
  return MachineReader(text, path).read();
}

double log2(double value) { return fmath::log(value) * kLog2OfE; }

std::array<double, 6> log_extents(const std::array<int64_t, 6>& shape_key) {
  std::array<double, 6> logs{};
  for (size_t i = 0; i < 6; ++i) {
    logs[i] = log2(static_cast<double>(std::max<int64_t>(1, shape_key[i])));
  }
  return logs;
}

double roofline_ns(const Machine& machine, const OpTable* table, const Cost& cost,
                   std::span<const int64_t> expert_rows) {
  double flops = static_cast<double>(cost.flops);
  if (table != nullptr && table->row_tile > 1 && cost.shape_key[0] > 0) {
    // Without the experts' rows: as evenly spread as can be.
    const int64_t tile = table->row_tile, rows = cost.shape_key[0];
    const int64_t experts = std::max<int64_t>(1, cost.shape_key[1]);
    int64_t padded = 0;
    for (const int64_t count : expert_rows) padded += (count + tile - 1) / tile * tile;
    if (expert_rows.empty())
      padded = experts * ((rows + experts * tile - 1) / (experts * tile) * tile);
    flops *= static_cast<double>(padded) / static_cast<double>(rows);
  }
  return 1e9 * std::max(flops / machine.peak_flops_per_s,
                        static_cast<double>(cost.bytes) / machine.bytes_per_s);
}

double interpolated_log_ratio(const OpTable& table, const std::array<double, 6>& log_extent,
                              int64_t without) {
  double weights = 0, sum = 0;
  for (int64_t p = 0; p < std::ssize(table.points); ++p) {
    if (p == without) continue;
    double distance = 0;
    for (size_t i = 0; i < 6; ++i) {
      const double gap = table.points[p].log_extent[i] - log_extent[i];
      distance += gap * gap;
    }
    const double weight = 1.0 / (distance * distance + 1e-12);
    weights += weight;
    sum += weight * table.points[p].log_ratio;
  }
  return weights > 0 ? sum / weights : 0;
}

OpTime op_time(const Machine& machine, const Cost& cost, std::span<const int64_t> expert_rows) {
  const auto found = machine.ops.find(cost.op);
  const OpTable* table = found == machine.ops.end() ? nullptr : &found->second;
  OpTime time;
  double ns = roofline_ns(machine, table, cost, expert_rows);
  if (table == nullptr) {
    const bool computes = static_cast<double>(cost.flops) * machine.bytes_per_s >
                          static_cast<double>(cost.bytes) * machine.peak_flops_per_s;
    time.bound = computes ? TimedOp::Bound::compute : TimedOp::Bound::memory;
    time.is_extrapolated = true;
  } else {
    time.bound = table->bound;
    time.is_extrapolated = !table->is_measured;
    const std::array<double, 6> at = log_extents(cost.shape_key);
    const double measured_ns = ns * fmath::exp(interpolated_log_ratio(*table, at));
    // Small calls say nothing of the rate of ones far larger, which memory bounds.
    const bool is_larger = at[0] > table->most[0] + 1 && time.bound == TimedOp::Bound::memory;
    ns = is_larger ? std::min(measured_ns, ns + machine.least_op_ns) : measured_ns;
    for (size_t i = 0; i < 6; ++i) {
      // A factor of two beyond a measured extent is as good as measured.
      if (at[i] < table->least[i] - 1 || at[i] > table->most[i] + 1) time.is_extrapolated = true;
    }
  }
  time.ns = std::llround(std::max(ns, machine.least_op_ns));
  return time;
}

}  // namespace cambium::sim
