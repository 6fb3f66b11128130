#include "sim/routing.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <numeric>

#include "src/base/error.h"
#include "src/base/fmath.h"
#include "src/base/philox.h"
#include "src/train/routing_trace.h"

namespace cambium::sim {

namespace {

constexpr int64_t kSampledTokens = 512;  // of a layer: the ratio's error is below one percent

constexpr double kLeastLoad = 1e-6;  // of an expert that nobody chose

// A draw in (0, 1) of (seed, what, i).
double uniform(uint64_t seed, uint64_t what, uint64_t i) {
  return random_uniform({seed, RandomStream::routing_noise, what}, i);
}

// A sum of four uniform draws, of mean 0 and variance 1: close enough to normal for counts.
double scatter(uint64_t seed, uint64_t what, uint64_t i) {
  double sum = -2;
  for (uint64_t part = 0; part < 4; ++part) sum += uniform(seed, what, 4 * i + part);
  return sum * 1.7320508075688772;
}

}  // namespace

RoutingModel::RoutingModel(const Config& config, int64_t tokens)
    : is_uniform_(config.plan.routing == "uniform"),
      is_concentrated_(config.plan.routing == "concentrated"),
      mesh_(make_mesh(config.parallel)),
      seed_(config.run.seed),
      tokens_(tokens),
      top_k_(config.model.top_k),
      experts_(config.model.experts),
      ranks_(config.parallel.ep),
      layers_(config.model.layers) {
  const auto E = static_cast<size_t>(experts_);
  tokens_by_row_.assign(static_cast<size_t>(layers_),
                        std::vector<double>(static_cast<size_t>(ranks_), 1.0));
  if (is_concentrated_) return;
  if (is_uniform_) {
    // The chance that none of a token's top_k experts is among a rank's e.
    const int64_t e = experts_ / ranks_;
    double none = 1;
    for (int64_t k = 0; k < top_k_; ++k) {
      none *= static_cast<double>(std::max<int64_t>(0, experts_ - e - k)) /
              static_cast<double>(experts_ - k);
    }
    const double rows = static_cast<double>(top_k_) / static_cast<double>(ranks_);
    for (auto& layer : tokens_by_row_) std::fill(layer.begin(), layer.end(), (1 - none) / rows);
    return;
  }
  share_.assign(static_cast<size_t>(layers_), std::vector<double>(E, 0.0));
  if (config.plan.routing.ends_with(".h5")) {
    share_ = traced_loads(config.plan.routing, config);
    for (std::vector<double>& layer : share_) {
      for (double& load : layer) load += kLeastLoad;
    }
  } else if (config.plan.routing != "zipf") {
    read_shares(config.plan.routing);
  }
  for (int64_t layer = 0; layer < layers_; ++layer) {
    std::vector<double>& share = share_[static_cast<size_t>(layer)];
    if (config.plan.routing == "zipf") {
      std::vector<size_t> order(E);
      std::iota(order.begin(), order.end(), size_t{0});
      for (size_t i = E - 1; i > 0; --i) {
        const double u = uniform(seed_, (uint64_t{1} << 62) + static_cast<uint64_t>(layer), i);
        std::swap(order[i], order[static_cast<size_t>(u * static_cast<double>(i + 1))]);
      }
      for (size_t i = 0; i < E; ++i) {
        share[order[i]] = fmath::pow(static_cast<double>(i + 1), -config.plan.zipf);
      }
    }
    sample_tokens(layer);
  }
}

// The last line with loads counts.
void RoutingModel::read_shares(const std::string& path) {
  std::ifstream file(path);
  if (!file) {
    fail(ExitCode::usage,
         "plan.routing = '{}' is neither uniform, zipf, concentrated nor a readable file; next: "
         "metrics.jsonl "
         "of a run, or a routing trace (.h5)",
         path);
  }
  bool found = false;
  std::string line;
  while (std::getline(file, line)) {
    const nlohmann::json object = nlohmann::json::parse(line, nullptr, false);
    if (object.is_discarded() || !object.is_object() || !object.contains("expert_load")) continue;
    const auto& load = object["expert_load"];
    if (!load.is_array() || std::ssize(load) != layers_) {
      fail(ExitCode::usage, "plan.routing = '{}': loads of {} layers, the model has {}", path,
           load.size(), layers_);
    }
    for (int64_t layer = 0; layer < layers_; ++layer) {
      const auto& row = load[static_cast<size_t>(layer)];
      if (!row.is_array() || std::ssize(row) != experts_) {
        fail(ExitCode::usage, "plan.routing = '{}': loads of {} experts, the model has {}", path,
             row.size(), experts_);
      }
      for (int64_t e = 0; e < experts_; ++e) {
        const auto& value = row[static_cast<size_t>(e)];
        const double load_of = value.is_number() ? value.get<double>() : -1;
        if (!(load_of >= 0)) fail(ExitCode::usage, "plan.routing = '{}': a load is no count", path);
        share_[static_cast<size_t>(layer)][static_cast<size_t>(e)] = load_of + kLeastLoad;
      }
    }
    found = true;
  }
  if (!found) {
    fail(ExitCode::usage, "plan.routing = '{}' holds no expert_load; next: metrics.jsonl of a run",
         path);
  }
}

// Tokens choose their experts by weight, without replacement (Gumbel keys): the layer's shares and
// the ratio of tokens to rows of each rank.
void RoutingModel::sample_tokens(int64_t layer) {
  std::vector<double>& share = share_[static_cast<size_t>(layer)];
  const std::vector<double> weight = share;
  std::vector<double> chosen(weight.size(), 0.0), rows(static_cast<size_t>(ranks_), 1e-9),
      tokens(static_cast<size_t>(ranks_), 1e-9);
  std::vector<std::pair<double, size_t>> keys(weight.size());
  const int64_t e = experts_ / ranks_;
  for (int64_t token = 0; token < kSampledTokens; ++token) {
    const auto what = (uint64_t{2} << 61) + static_cast<uint64_t>(layer * kSampledTokens + token);
    for (size_t i = 0; i < weight.size(); ++i) {
      const double u = std::max(1e-12, uniform(seed_, what, i));
      keys[i] = {-fmath::log(u) / weight[i], i};
    }
    std::nth_element(keys.begin(), keys.begin() + top_k_, keys.end());
    std::vector<bool> here(static_cast<size_t>(ranks_), false);
    for (int64_t k = 0; k < top_k_; ++k) {
      const size_t expert = keys[static_cast<size_t>(k)].second;
      chosen[expert] += 1;
      const size_t rank = expert / static_cast<size_t>(e);
      rows[rank] += 1;
      if (!here[rank]) tokens[rank] += 1;
      here[rank] = true;
    }
  }
  for (size_t i = 0; i < share.size(); ++i) {
    share[i] = (chosen[i] + 0.5) / static_cast<double>(kSampledTokens);
  }
  for (size_t p = 0; p < tokens.size(); ++p) {
    tokens_by_row_[static_cast<size_t>(layer)][p] = tokens[p] / rows[p];
  }
}

std::vector<int32_t> RoutingModel::draw(int64_t layer, int64_t micro_batch, int64_t source) const {
  std::vector<int32_t> rows(static_cast<size_t>(experts_));
  const int64_t total = tokens_ * top_k_;
  if (is_uniform_) {
    for (int64_t e = 0; e < experts_; ++e) {
      const int64_t extra =
          (e - source % experts_ + experts_) % experts_ < total % experts_ ? 1 : 0;
      rows[static_cast<size_t>(e)] = static_cast<int32_t>(total / experts_ + extra);
    }
    return rows;
  }
  if (is_concentrated_) {
    for (int64_t k = 0; k < top_k_; ++k) {
      rows[static_cast<size_t>((layer * top_k_ + k) % experts_)] = static_cast<int32_t>(tokens_);
    }
    return rows;
  }
  const std::vector<double>& share = share_[static_cast<size_t>(layer)];
  const double sum = std::accumulate(share.begin(), share.end(), 0.0);
  const auto what = static_cast<uint64_t>(layer) << 48 | static_cast<uint64_t>(micro_batch) << 24 |
                    static_cast<uint64_t>(source);
  const auto T = static_cast<double>(tokens_);
  int64_t given = 0;
  for (int64_t e = 0; e < experts_; ++e) {
    const double p =
        std::min(1.0, share[static_cast<size_t>(e)] / sum * static_cast<double>(top_k_));
    const double count =
        T * p + std::sqrt(T * p * (1 - p)) * scatter(seed_, what, static_cast<uint64_t>(e));
    rows[static_cast<size_t>(e)] = static_cast<int32_t>(std::clamp(std::round(count), 0.0, T));
    given += rows[static_cast<size_t>(e)];
  }
  // What rounding and scatter left over goes round.
  for (int64_t e = 0; given != total; e = (e + 1) % experts_) {
    int32_t& count = rows[static_cast<size_t>(e)];
    const int64_t part = std::max<int64_t>(1, std::abs(total - given) / experts_);
    const int64_t to = std::clamp<int64_t>(count + (total > given ? part : -part), 0, tokens_);
    given += to - count;
    count = static_cast<int32_t>(to);
  }
  return rows;
}

const std::vector<int32_t>& RoutingModel::expert_rows(int64_t layer, int64_t micro_batch,
                                                      int64_t source) {
  const std::array<int64_t, 3> key = is_uniform_ ? std::array<int64_t, 3>{0, 0, source % experts_}
                                     : is_concentrated_ ? std::array<int64_t, 3>{layer, 0, 0}
                                                        : std::array{layer, micro_batch, source};
  const auto found = drawn_.find(key);
  if (found != drawn_.end()) return found->second;
  return drawn_.emplace(key, draw(layer, micro_batch, source)).first->second;
}

DispatchCounts RoutingModel::dispatch_counts(int rank, const WorkPlace& place) {
  const MeshCoordinates at = mesh_coordinates(mesh_, rank);
  const std::vector<int> group = expert_group(mesh_, at);
  const int64_t e = experts_ / ranks_;
  const auto count = [&](int source, int64_t destination, std::vector<int64_t>& tokens,
                         std::vector<int64_t>& rows) {
    const std::vector<int32_t>& drawn = expert_rows(place.layer, place.micro_batch, source);
    int64_t sum = 0;
    for (int64_t i = destination * e; i < (destination + 1) * e; ++i) sum += drawn[i];
    rows.push_back(sum);
    tokens.push_back(tokens_of(sum, place.layer, destination));
  };
  DispatchCounts counts;
  for (int64_t p = 0; p < ranks_; ++p) {
    count(rank, p, counts.send_tokens, counts.send_rows);
    count(group[static_cast<size_t>(p)], at.ep_index, counts.recv_tokens, counts.recv_rows);
  }
  return counts;
}

int64_t RoutingModel::tokens_of(int64_t rows, int64_t layer, int64_t index) const {
  const int64_t most = std::min(rows, tokens_);
  const int64_t most_per_token = std::min(top_k_, experts_ / ranks_);
  const int64_t least = (rows + most_per_token - 1) / most_per_token;
  const double ratio = tokens_by_row_[static_cast<size_t>(layer)][static_cast<size_t>(index)];
  return std::clamp<int64_t>(std::llround(static_cast<double>(rows) * ratio), std::min(least, most),
                             most);
}

}  // namespace cambium::sim
