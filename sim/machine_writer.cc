#include "sim/machine_writer.h"

#include <algorithm>
#include <cmath>
#include <map>

#include "fmt/format.h"
#include "sim/machine.h"
#include "sim/machine_files.h"
#include "src/base/fmath.h"

namespace cambium::sim {

namespace {

constexpr double kComputeBoundFlopsPerByte = 20;  // of an op: products and attention are above
constexpr int64_t kLargeBytes = 200'000;          // of a call that shows the device's rates
constexpr double kPanelRowsCpu = 16, kTileRowsCuda = 128;

// From [overlap] up to the first op of a built-in file: its links.
std::string links_of(const std::string& name) {
  for (const MachineFile& file : machine_files()) {
    if (name != file.name) continue;
    const std::string text = file.text;
    const size_t first = text.find("[overlap]"), end = text.find("[[op]]");
    return "# Links: those of " + name + ", not measured here.\n" + text.substr(first, end - first);
  }
  return "";
}

std::string measured_links(const Measurements& m) {
  const std::string curve = fmt::format(
      "efficiency = {{ points = [[\"1 KiB\", 1.0], [\"1 GiB\", 1.0]], source = \"{}\" }}\n",
      m.command);
  std::string text = fmt::format(
      "[overlap]\nmultiprocessors = {{ value = 0, source = \"copies run where ops do\" }}\n"
      "memory_percent = {{ value = 0, source = \"copies run where ops do\" }}\n\n"
      "[node]\ndevices = {{ value = 65536, source = \"simulated ranks of one process\" }}\n"
      "nics = {{ value = 1, source = \"one process\" }}\n");
  for (const char* tier : {"near", "far"}) {
    text += fmt::format(
        "\n[{0}]\nlatency = {{ value = \"{1:.0f} ns\", source = \"{4}\" }}\n"
        "rank_latency = {{ value = \"{2:.0f} ns\", source = \"{4}\" }}\n"
        "bandwidth = {{ value = \"{3:.2f} GB/s\", source = \"{4}\" }}\n{5}",
        tier, m.call_ns, m.call_rank_ns, 1e-9 * m.copy_bytes_per_s, m.command, curve);
  }
  return text + "\n";
}

struct OpFit {
  OpTable table;
  std::string points;
};

OpFit fit_op(const Machine& machine, const std::vector<const MeasuredOp*>& calls) {
  OpFit fit;
  double intensity = 0;
  for (const MeasuredOp* call : calls) {
    const double of = static_cast<double>(call->cost.flops) /
                      static_cast<double>(std::max<int64_t>(1, call->cost.bytes));
    intensity = std::max(intensity, of);
  }
  fit.table.bound =
      intensity > kComputeBoundFlopsPerByte ? TimedOp::Bound::compute : TimedOp::Bound::memory;
  if (std::string_view(calls.front()->cost.op).starts_with("grouped_")) {
    fit.table.row_tile =
        static_cast<int64_t>(machine.device == "cuda" ? kTileRowsCuda : kPanelRowsCpu);
  }
  for (const MeasuredOp* call : calls) {
    std::string shape;
    int64_t dims = 6;
    while (dims > 1 && call->cost.shape_key[static_cast<size_t>(dims - 1)] == 0) --dims;
    for (int64_t i = 0; i < dims; ++i) {
      shape +=
          fmt::format("{}{}", i == 0 ? "" : ", ", call->cost.shape_key[static_cast<size_t>(i)]);
    }
    fit.points +=
        fmt::format("  {{ shape = [{}], flops = {:.6e}, bytes = {:.6e}, us = {:.4g} }},\n", shape,
                    static_cast<double>(call->cost.flops), static_cast<double>(call->cost.bytes),
                    1e-3 * call->ns);
    const double ratio = call->ns / roofline_ns(machine, &fit.table, call->cost, {});
    fit.table.points.push_back({log_extents(call->cost.shape_key), fmath::log(ratio)});
  }
  // Every point predicted from the others.
  double error = 0;
  for (int64_t p = 0; p < std::ssize(fit.table.points); ++p) {
    const OpTable::Point& point = fit.table.points[static_cast<size_t>(p)];
    const double gap = interpolated_log_ratio(fit.table, point.log_extent, p) - point.log_ratio;
    error += std::abs(fmath::exp(gap) - 1);
  }
  if (fit.table.points.size() > 1) {
    fit.table.residual = error / static_cast<double>(fit.table.points.size());
  }
  return fit;
}

}  // namespace

std::string machine_text(const Measurements& m) {
  Machine machine;
  machine.device = m.device == DeviceKind::cuda ? "cuda" : "cpu";
  machine.peak_flops_per_s = m.peak_flops_per_s;
  double shortest_ns = 1e9;
  std::map<std::string, std::vector<const MeasuredOp*>> by_op;
  for (const MeasuredOp& call : m.ops) {
    if (call.cost.bytes <= 0) continue;
    by_op[call.cost.op].push_back(&call);
    const double ns = std::max(1.0, call.ns);
    shortest_ns = std::min(shortest_ns, ns);
    // Of large calls: small ones run from caches, and count what they do not do.
    if (call.cost.bytes < kLargeBytes) continue;
    const std::string_view op = call.cost.op;
    if (m.peak_flops_per_s == 0 && op == "linear") {
      machine.peak_flops_per_s =
          std::max(machine.peak_flops_per_s, 1e9 * static_cast<double>(call.cost.flops) / ns);
    }
    if (op != "copy_bytes" && op != "adamw") continue;
    machine.bytes_per_s =
        std::max(machine.bytes_per_s, 1e9 * static_cast<double>(call.cost.bytes) / ns);
  }
  if (machine.peak_flops_per_s == 0 || machine.bytes_per_s == 0) {
    fail(ExitCode::internal, "no call of linear, or of copy_bytes or adamw, was large enough");
  }
  const double copy = m.copy_bytes_per_s > 0 ? m.copy_bytes_per_s : 0.45 * machine.bytes_per_s;
  std::string text = fmt::format(
      "# Measured by `{}`. Shapes beyond those of an op's points count as extrapolated.\n"
      "name = \"{}\"\n\n[device]\nkind = \"{}\"\ncompute = \"{}\"\nshared = {}\n"
      "memory = {{ value = \"{:.3f} GB\", source = \"{}\" }}\n"
      "reserved = {{ value = \"{} MB\", source = \"estimate: context and libraries\" }}\n"
      "peak = {{ value = \"{:.4g} GFLOP/s\", source = \"{}\" }}\n"
      "memory_bandwidth = {{ value = \"{:.4g} GB/s\", source = \"{}: the most bytes a second\" }}\n"
      "copy_bandwidth = {{ value = \"{:.4g} GB/s\", source = \"{}\" }}\n"
      "launch = {{ value = \"{:.0f} ns\", source = \"{}\" }}\n"
      "shortest_op = {{ value = \"{:.0f} ns\", source = \"{}\" }}\n"
      "host_wait = {{ value = \"{:.0f} ns\", source = \"{}\" }}\n"
      "multiprocessors = {{ value = {}, source = \"the device\" }}\n\n",
      m.command, m.name, machine.device, choice_name(m.compute), m.device == DeviceKind::cpu,
      1e-9 * m.memory_bytes, m.command, m.device == DeviceKind::cpu ? 100 : 700,
      1e-9 * machine.peak_flops_per_s,
      m.peak_flops_per_s > 0 ? "data sheet" : m.command + ": the fastest product",
      1e-9 * machine.bytes_per_s, m.command, 1e-9 * copy, m.command, m.launch_ns, m.command,
      shortest_ns, m.command, m.host_wait_ns, m.command, m.multiprocessors);
  text += m.call_ns > 0 ? measured_links(m) : links_of("dgx-h200");
  for (const auto& [name, calls] : by_op) {
    const OpFit fit = fit_op(machine, calls);
    text += fmt::format("[[op]]\nname = \"{}\"\nbound = \"{}\"\n", name,
                        fit.table.bound == TimedOp::Bound::compute ? "compute" : "memory");
    if (fit.table.row_tile > 1) text += fmt::format("row_tile = {}\n", fit.table.row_tile);
    text += fmt::format("residual = {:.3f}\nsource = \"{}\"\npoints = [\n{}]\n\n",
                        fit.table.residual, m.command, fit.points);
  }
  return text;
}

std::string machine_text(const MeasuredLinks& m) {
  std::string text = machine_source(m.base);
  // Curves are written last, and `name` is the first key.
  text = text.substr(0, text.find("[[collective]]"));
  const size_t name = text.find("name = \""), end = text.find('\n', name);
  if (name == std::string::npos || end == std::string::npos) {
    fail(ExitCode::usage, "machine file {}: name is missing", m.base);
  }
  text.replace(name, end - name, fmt::format("name = \"{}\"", m.name));
  while (text.ends_with('\n')) text.pop_back();
  text += "\n";
  std::map<std::pair<CollectiveKind, int64_t>, std::vector<const MeasuredCollective*>> curves;
  for (const MeasuredCollective& call : m.collectives) {
    curves[{call.kind, call.ranks}].push_back(&call);
  }
  for (auto& [key, calls] : curves) {
    std::ranges::sort(calls, {}, [](const MeasuredCollective* call) { return call->bytes; });
    text +=
        fmt::format("\n[[collective]]\nkind = \"{}\"\nranks = {}\nsource = \"{}\"\npoints = [\n",
                    collective_name(key.first), key.second, m.source);
    for (const MeasuredCollective* call : calls) {
      text += fmt::format("  [\"{:.0f} B\", \"{:.6g} us\"],\n", call->bytes, 1e-3 * call->ns);
    }
    text += "]\n";
  }
  parse_machine(text, m.base);  // what is written can be read
  return text;
}

}  // namespace cambium::sim
