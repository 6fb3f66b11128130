// Transfers in virtual time: what they cost alone, and how they share links.
//
// A rank has a link into its node and a share of the node's NICs. A ring moves, per rank,
// (n-1)/n of the whole (twice that for all_reduce); a ring over nodes crosses them on all NICs of
// the ranks that take part. An all-to-all moves what the counts say, near and far at once; the
// slowest rank decides. Time alone = latency + bytes / (bandwidth * efficiency(bytes)).
#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <set>

#include "sim/flow.h"

namespace cambium::sim {

namespace {

constexpr int64_t kNear = 0, kFar = 1, kTiers = 2;

double efficiency(const LinkModel& link, double bytes, bool& extrapolated) {
  const double at = log2(std::max(1.0, bytes));
  const auto& curve = link.efficiency;
  // A factor of four beyond the measured sizes is as good as measured.
  if (at < curve.front().first - 2 || at > curve.back().first + 2) extrapolated = true;
  if (at <= curve.front().first) return curve.front().second;
  if (at >= curve.back().first) return curve.back().second;
  const auto above = std::ranges::lower_bound(curve, at, {}, [](const auto& p) { return p.first; });
  const auto below = std::prev(above);
  const double part = (at - below->first) / (above->first - below->first);
  return below->second + part * (above->second - below->second);
}

}  // namespace

double VirtualTime::link_ns(const LinkModel& link, double bytes, double ranks) {
  double ns = link.latency_ns + link.rank_latency_ns * ranks;
  if (bytes > 0) {
    ns += 1e9 * bytes / (link.bytes_per_s * efficiency(link, bytes, link_extrapolated_));
  }
  return ns;
}

int64_t VirtualTime::link_of(int rank, Tier tier) const {
  if (tier == Tier::near) return rank * kTiers + kNear;
  // Ranks of a node with fewer NICs than ranks share them: the first of each share's link.
  const int64_t node = rank / machine_.node_ranks, local = rank % machine_.node_ranks;
  const int64_t nic = local * machine_.nics / machine_.node_ranks;
  const int64_t first = (nic * machine_.node_ranks + machine_.nics - 1) / machine_.nics;
  return (node * machine_.node_ranks + first) * kTiers + kFar;
}

VirtualTime::Flow* VirtualTime::new_flow() {
  if (spare_flows_.empty()) {
    flows_.push_back(std::make_unique<Flow>());
    spare_flows_.push_back(flows_.back().get());
  }
  Flow* flow = spare_flows_.back();
  spare_flows_.pop_back();
  const uint32_t version = flow->version + 1;
  *flow = Flow{};
  flow->version = version;
  return flow;
}

void VirtualTime::begin_flow(std::vector<Transfer*> members, Mail* mail) {
  Flow& flow = *new_flow();
  std::erase(members, nullptr);
  if (mail != nullptr && mail->send == mail->recv) members.pop_back();
  flow.members = std::move(members);
  flow.mail = mail;
  for (const Transfer* member : flow.members) {
    flow.start_ns = std::max(flow.start_ns, member->ready_ns);
  }
  if (mail != nullptr) {
    price_message(flow, *mail);
  } else {
    price_collective(flow);
  }
  push(flow.start_ns, Event::Kind::flow_start, &flow, 0);
}

void VirtualTime::price_message(Flow& flow, const Mail& mail) {
  const Group& group = *mail.send->group;
  const int from = group.members()[static_cast<size_t>(mail.send->member)];
  const int to = group.members()[static_cast<size_t>(mail.recv->member)];
  const bool is_far = from / machine_.node_ranks != to / machine_.node_ranks;
  const double bytes =
      static_cast<double>(mail.received.count * dtype_bytes(mail.recv->call.dtype));
  flow.remaining_ns = link_ns(is_far ? machine_.far : machine_.near, bytes, 0);
  for (const int rank : {from, to}) {
    flow.uses.emplace_back(link_of(rank, is_far ? Tier::far : Tier::near), 1.0);
  }
}

// Nothing in place; else one copy.
int64_t VirtualTime::alone_ns(const CollectiveCall& call) const {
  if (call.send == call.recv || call.kind == CollectiveKind::barrier) return 0;
  const int64_t count = call.recv_counts.empty() ? call.count : call.recv_counts.front();
  const double bytes = static_cast<double>(count * dtype_bytes(call.dtype));
  return std::llround(1e9 * bytes / machine_.copy_bytes_per_s);
}

void VirtualTime::price_collective(Flow& flow) {
  const Group& group = *flow.members.front()->group;
  const CollectiveCall& call = flow.members.front()->call;
  const std::vector<int>& ranks = group.members();
  const auto n = static_cast<double>(ranks.size());
  const double element = static_cast<double>(dtype_bytes(call.dtype));
  const int64_t first_node = ranks.front() / machine_.node_ranks;
  const bool is_far = std::ranges::any_of(
      ranks, [&](int rank) { return rank / machine_.node_ranks != first_node; });
  double near = 0, far = 0;  // bytes of the slowest rank
  if (call.kind == CollectiveKind::all_to_all_v) {
    for (const Transfer* member : flow.members) {
      const int64_t node = ranks[static_cast<size_t>(member->member)] / machine_.node_ranks;
      double out[kTiers] = {}, in[kTiers] = {};
      for (size_t p = 0; p < ranks.size(); ++p) {
        if (static_cast<int>(p) == member->member) continue;
        const int64_t tier = ranks[p] / machine_.node_ranks == node ? kNear : kFar;
        out[tier] += static_cast<double>(member->call.send_counts[p]);
        in[tier] += static_cast<double>(member->call.recv_counts[p]);
      }
      near = std::max({near, element * out[kNear], element * in[kNear]});
      far = std::max({far, element * out[kFar], element * in[kFar]});
    }
  } else {
    double moved = static_cast<double>(call.count) * element;
    if (call.kind == CollectiveKind::all_gather || call.kind == CollectiveKind::reduce_scatter) {
      moved *= n - 1;
    } else if (call.kind == CollectiveKind::all_reduce) {
      moved *= 2 * (n - 1) / n;
    }
    near = moved;
    if (is_far) {
      // A ring enters a node once: its ranks' NICs share what every rank moves.
      std::map<int64_t, std::set<int64_t>> nics;
      for (const int rank : ranks)
        nics[rank / machine_.node_ranks].insert(link_of(rank, Tier::far));
      size_t fewest = SIZE_MAX;
      for (const auto& [node, of_node] : nics) fewest = std::min(fewest, of_node.size());
      far = moved / static_cast<double>(fewest);
    }
  }
  CollectiveTime measured;
  if (!is_far) measured = collective_time(machine_, {call.kind, std::ssize(ranks), near});
  link_extrapolated_ = link_extrapolated_ || measured.is_extrapolated;
  const double near_ns = measured.is_measured ? measured.ns : link_ns(machine_.near, near, n);
  const double far_ns = is_far ? link_ns(machine_.far, far, n) : 0;
  flow.remaining_ns = std::max(near_ns, far_ns);
  for (const Transfer* member : flow.members) {
    const int rank = ranks[static_cast<size_t>(member->member)];
    flow.uses.emplace_back(link_of(rank, Tier::near), near_ns / flow.remaining_ns);
    if (is_far) flow.uses.emplace_back(link_of(rank, Tier::far), far_ns / flow.remaining_ns);
  }
}

void VirtualTime::settle(Flow& flow, int64_t now) {
  flow.remaining_ns =
      std::max(0.0, flow.remaining_ns - static_cast<double>(now - flow.settled_ns) * flow.rate);
  flow.settled_ns = now;
}

void VirtualTime::start_flow(Flow& flow) {
  flow.settled_ns = flow.start_ns;
  bool meets = false;
  if (machine_.is_shared) {
    // Its copies run where the ops do.
    const int64_t start = std::max(flow.start_ns, device_free_ns_);
    device_free_ns_ = start + std::llround(flow.remaining_ns);
    flow.remaining_ns += static_cast<double>(start - flow.start_ns);
    flow.uses.clear();
  }
  for (const auto& [link, share] : flow.uses) {
    auto& flows = link_flows_[link];
    if (std::ranges::find(flows, &flow) == flows.end()) flows.push_back(&flow);
    meets = meets || flows.size() > 1;
  }
  if (meets) return rebalance(flow, flow.start_ns);
  push(flow.start_ns + std::llround(flow.remaining_ns), Event::Kind::flow_end, &flow,
       ++flow.version);
}

void VirtualTime::end_flow(Flow& flow) {
  const int64_t end = flow.settled_ns + std::llround(flow.remaining_ns / flow.rate);
  std::vector<Flow*> others;
  for (const auto& [link, share] : flow.uses) {
    auto& flows = link_flows_[link];
    std::erase(flows, &flow);
    for (Flow* other : flows) {
      if (std::ranges::find(others, other) == others.end()) others.push_back(other);
    }
  }
  if (flow.mail == nullptr) {
    for (Transfer* member : flow.members) finish(*member, flow.start_ns, end);
  } else {
    flow.mail->copied.store(true);
    for (Transfer* member : flow.members) {
      const auto is_copied = [](const Mail* mail) { return mail->copied.load(); };
      member->moves_from_ns = std::max(member->moves_from_ns, flow.start_ns);
      if (std::ranges::all_of(member->sends, is_copied) &&
          std::ranges::all_of(member->recvs, is_copied)) {
        finish(*member, member->moves_from_ns, end);
      }
    }
  }
  spare_flows_.push_back(&flow);
  ++flow.version;
  // Those that met it are faster now.
  for (Flow* other : others) rebalance(*other, end);
}

// Max-min shares of all flows that are linked with `changed`: rates rise together until a link is
// full, whose flows then keep theirs.
void VirtualTime::rebalance(Flow& changed, int64_t now) {
  std::vector<Flow*> linked{&changed};
  std::set<const Flow*> seen{&changed};
  std::set<int64_t> links;
  for (size_t i = 0; i < linked.size(); ++i) {
    for (const auto& [link, share] : linked[i]->uses) {
      if (!links.insert(link).second) continue;
      for (Flow* other : link_flows_[link]) {
        if (seen.insert(other).second) linked.push_back(other);
      }
    }
  }
  for (Flow* flow : linked) {
    settle(*flow, now);
    flow->rate = -1;  // rises
  }
  for (size_t frozen = 0; frozen < linked.size();) {
    double level = 1;
    int64_t full = -1;
    for (const int64_t link : links) {
      double fixed = 0, rising = 0;
      for (const Flow* flow : link_flows_[link]) {
        for (const auto& [of, share] : flow->uses) {
          if (of != link) continue;
          (flow->rate < 0 ? rising : fixed) += flow->rate < 0 ? share : share * flow->rate;
        }
      }
      if (rising > 0 && (1 - fixed) / rising < level) {
        level = std::max(1e-3, (1 - fixed) / rising);
        full = link;
      }
    }
    for (Flow* flow : linked) {
      const bool on_full =
          std::ranges::any_of(flow->uses, [&](const auto& use) { return use.first == full; });
      if (flow->rate >= 0 || (full >= 0 && !on_full)) continue;
      flow->rate = level;
      ++frozen;
    }
  }
  for (Flow* flow : linked) {
    push(now + std::llround(flow->remaining_ns / flow->rate), Event::Kind::flow_end, flow,
         ++flow->version);
  }
}

}  // namespace cambium::sim
