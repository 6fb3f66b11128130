// Streams, hosts and events of virtual time; what transfers cost is in network_time.cc.
#include "sim/virtual_time.h"

#include <algorithm>
#include <cmath>

#include "sim/flow.h"
#include "src/config/derive.h"
#include "src/parallel/mesh.h"

namespace cambium::sim {

size_t VirtualTime::CostHash::operator()(const CostKey& key) const {
  auto hash = reinterpret_cast<uint64_t>(key.op) ^ static_cast<uint64_t>(key.bytes) ^
              static_cast<uint64_t>(key.flops) << 1;
  for (const int64_t extent : key.shape) {
    hash = (hash ^ static_cast<uint64_t>(extent)) * 0x9e3779b97f4a7c15u;
    hash ^= hash >> 29;
  }
  return hash;
}

VirtualTime::VirtualTime(const Machine& machine, const Config& config, Trace* trace)
    : machine_(machine),
      config_(config),
      trace_(trace),
      routing_(config, derive(config, ConfigUse::planned).tokens_per_micro_batch),
      tokens_(derive(config, ConfigUse::planned).tokens_per_micro_batch) {}
VirtualTime::~VirtualTime() = default;

// The roofline's numbers once per shape; products of experts' rows depend on the draw.
OpTime VirtualTime::price_op(const Cost& cost, std::span<const int64_t> expert_rows) {
  if (!expert_rows.empty()) return op_time(machine_, cost, expert_rows);
  const CostKey key{cost.op, cost.shape_key, cost.flops, cost.bytes};
  const auto found = priced_.find(key);
  if (found != priced_.end()) return found->second;
  return priced_.emplace(key, op_time(machine_, cost, {})).first->second;
}

void VirtualTime::push(int64_t time_ns, Event::Kind kind, void* subject, uint32_t version) {
  events_.push({time_ns, events_pushed_++, kind, version, subject});
}

bool VirtualTime::advance() {
  if (events_.empty()) return false;
  const Event event = events_.top();
  events_.pop();
  switch (event.kind) {
    case Event::Kind::op_end:
      static_cast<VirtualStream*>(event.subject)->op_ended(event.time_ns, event.version);
      break;
    case Event::Kind::kernel_start:
      for (const auto& stream : static_cast<VirtualRank*>(event.subject)->streams_) {
        stream->settle(event.time_ns);
      }
      break;
    case Event::Kind::flow_start:
      start_flow(*static_cast<Flow*>(event.subject));
      break;
    case Event::Kind::flow_end: {
      Flow& flow = *static_cast<Flow*>(event.subject);
      if (flow.version == event.version) end_flow(flow);
      break;
    }
  }
  return true;
}

void VirtualTime::begin(Transfer& transfer) {
  auto& stream = *static_cast<VirtualStream*>(transfer.call.stream->clock());
  VirtualRank& rank = stream.rank();
  transfer.ready_ns = std::max(stream.now_ns(), transfer.issue_ns);
  if (transfer.group->ranks() == 1 && transfer.meeting != nullptr) {
    transfer.moves_from_ns = transfer.ready_ns;
    transfer.end_ns = transfer.ready_ns + alone_ns(transfer.call);
    transfer.done = true;
    return;
  }
  rank.kernels_.push_back({&transfer, transfer.ready_ns});
  push(transfer.ready_ns, Event::Kind::kernel_start, &rank, 0);
  if (transfer.call.kind == CollectiveKind::exchange) {
    for (const auto* mails : {&transfer.sends, &transfer.recvs}) {
      for (Mail* mail : *mails) {
        if (mail->missing.fetch_sub(1) == 1) begin_flow({mail->send, mail->recv}, mail);
      }
    }
    return;
  }
  if (transfer.meeting->missing[0].fetch_sub(1) == 1)
    begin_flow(transfer.meeting->transfers, nullptr);
}

bool VirtualTime::advance_transfer(Transfer& transfer) {
  if (!transfer.started) {
    transfer.started = true;
    begin(transfer);
  }
  if (!transfer.done) return false;
  auto& stream = *static_cast<VirtualStream*>(transfer.call.stream->clock());
  stream.complete_transfer(transfer.moves_from_ns, transfer.end_ns);
  if (trace_ != nullptr) {
    const auto span = [&](const char* name, int64_t from, int64_t to) {
      if (from < to)
        trace_->add({stream.rank().rank_, stream.lane(), name, transfer.place, from, to});
    };
    span("waits for peers", transfer.ready_ns, transfer.moves_from_ns);
    span(collective_name(transfer.call.kind), transfer.moves_from_ns, transfer.end_ns);
  }
  if (transfer.meeting != nullptr) transfer.meeting->left.fetch_add(1);
  return true;
}

// All that `transfer` waits for has moved.
void VirtualTime::finish(Transfer& transfer, int64_t start, int64_t end) {
  VirtualRank& rank = static_cast<VirtualStream*>(transfer.call.stream->clock())->rank();
  transfer.moves_from_ns = start;
  transfer.end_ns = end;
  transfer.done = true;
  rank.times_.transfer_ns += end - start;
  std::erase_if(rank.kernels_, [&](const auto& kernel) { return kernel.transfer == &transfer; });
  for (const auto& stream : rank.streams_) stream->settle(end);
  transfer.call.stream->wake();
}

void VirtualRank::add_stream(Stream& stream) {
  const int lane = static_cast<int>(streams_.size());
  streams_.push_back(std::make_unique<VirtualStream>(*this, stream, lane));
  stream.set_clock(streams_.back().get());
  if (time_.trace_ != nullptr) {
    time_.trace_->name_lane(lane, stream.name().substr(stream.name().rfind(' ') + 1));
  }
}

void VirtualRank::charge(const Cost& cost, Stream& stream) {
  const bool has_rows = cost.op[0] == 'g' && std::string_view(cost.op).starts_with("grouped_");
  OpTime time = time_.price_op(cost, has_rows ? expert_rows(place_) : std::span<const int64_t>());
  // Where ops run on the host's own cores, handing them over takes their time.
  const auto launch = static_cast<int64_t>(time_.machine_.launch_ns);
  if (time_.machine_.is_shared) {
    time.ns += launch;
  } else {
    host_ns_ += launch;
  }
  if (time.is_extrapolated) times_.extrapolated_ns += time.ns;
  times_.op_ns[cost.op] += time.ns;
  stream.charge({cost.op, host_ns_, time.ns, place_, time.bound});
}

int64_t VirtualRank::post() { return host_ns_ += static_cast<int64_t>(time_.machine_.launch_ns); }

void VirtualRank::host_waited(const Event& event) {
  if (event.stream == nullptr) return;
  const int64_t ended = event.stream->clock()->ended_ns(event.sequence);
  host_ns_ = std::max(host_ns_, ended) + static_cast<int64_t>(time_.machine_.wait_ns);
}

void VirtualRank::restart() {
  times_ = {};
  started_ns_ = host_ns_;
}

RankTimes VirtualRank::times() const {
  RankTimes times = times_;
  times.step_ns = host_ns_ - started_ns_;
  return times;
}

DispatchCounts VirtualRank::dispatch_counts(const WorkPlace& place) {
  return time_.routing_.dispatch_counts(rank_, place);
}

// Rows of this rank's experts, from all ranks of its group.
std::span<const int64_t> VirtualRank::expert_rows(const WorkPlace& place) {
  std::vector<int64_t>& rows =
      expert_rows_[static_cast<int64_t>(place.micro_batch) << 20 | place.layer];
  if (!rows.empty()) return rows;
  const Mesh mesh = make_mesh(time_.config_.parallel);
  const MeshCoordinates at = mesh_coordinates(mesh, rank_);
  const int64_t e = time_.config_.model.experts / mesh.ep;
  rows.assign(static_cast<size_t>(e), 0);
  for (const int source : expert_group(mesh, at)) {
    const std::vector<int32_t>& drawn =
        time_.routing_.expert_rows(place.layer, place.micro_batch, source);
    for (int64_t i = 0; i < e; ++i) rows[i] += drawn[at.ep_index * e + i];
  }
  return rows;
}

// The share of full speed that an op has at time `at`, beside the rank's transfers.
double VirtualRank::rate(TimedOp::Bound bound, int64_t at) const {
  const auto running = static_cast<double>(
      std::ranges::count_if(kernels_, [&](const Kernel& kernel) { return kernel.ready_ns <= at; }));
  const Machine& machine = time_.machine_;
  const double taken = bound == TimedOp::Bound::compute
                           ? machine.comm_multiprocessors / machine.multiprocessors
                           : machine.comm_memory_share;
  return std::max(0.1, 1 - running * taken);
}

bool VirtualStream::run(const TimedOp& op) {
  VirtualTime& time = rank_.time_;
  if (in_progress_) {
    if (!ended_) return false;
    in_progress_ = false;
    finish_op(op, start_ns_);
    return true;
  }
  int64_t start = std::max(now_ns_, op.issue_ns);
  if (lane_ == 0) rank_.times_.host_ns += start - now_ns_;
  if (time.machine_.is_shared) {
    start = std::max(start, time.device_free_ns_);
    time.device_free_ns_ = start + op.duration_ns;
  } else if (!rank_.kernels_.empty()) {
    in_progress_ = true;
    ended_ = false;
    op_ = op;
    start_ns_ = settled_ns_ = start;
    remaining_ns_ = static_cast<double>(op.duration_ns);
    rate_ = rank_.rate(op.bound, start);
    schedule_end();
    return false;
  }
  now_ns_ = start + op.duration_ns;
  finish_op(op, start);
  return true;
}

void VirtualStream::finish_op(const TimedOp& op, int64_t start) {
  if (lane_ == 0) rank_.times_.busy_ns += now_ns_ - start;
  if (rank_.time_.trace_ != nullptr && start < now_ns_) {
    rank_.time_.trace_->add({rank_.rank_, lane_, op.name, op.place, start, now_ns_});
  }
}

void VirtualStream::schedule_end() {
  now_ns_ = settled_ns_ + std::llround(std::ceil(remaining_ns_ / rate_));
  rank_.time_.push(now_ns_, VirtualTime::Event::Kind::op_end, this, ++version_);
}

void VirtualStream::settle(int64_t now) {
  if (!in_progress_ || ended_) return;
  const int64_t at = std::max(now, start_ns_);
  const double rate = rank_.rate(op_.bound, at);
  if (rate == rate_) return;
  remaining_ns_ = std::max(0.0, remaining_ns_ - static_cast<double>(at - settled_ns_) * rate_);
  settled_ns_ = at;
  rate_ = rate;
  schedule_end();
}

void VirtualStream::op_ended(int64_t, uint32_t version) {
  if (version != version_ || !in_progress_) return;
  ended_ = true;
  stream_.wake();
}

void VirtualStream::complete_transfer(int64_t start, int64_t end) {
  now_ns_ = end;
  moved_from_.emplace_back(stream_.completed() + 1, start);
}

void VirtualStream::wait_for(const StreamClock& other_clock, uint64_t sequence) {
  const auto& other = static_cast<const VirtualStream&>(other_clock);
  const int64_t until = other.ended_ns(sequence);
  if (until <= now_ns_) return;
  if (lane_ == 0) {
    // What of the gap lies before the transfer began to move.
    const auto after =
        std::upper_bound(other.moved_from_.begin(), other.moved_from_.end(), sequence,
                         [](uint64_t number, const auto& entry) { return number < entry.first; });
    const int64_t moves = after == other.moved_from_.begin() ? now_ns_ : std::prev(after)->second;
    const int64_t from = std::clamp(moves, now_ns_, until);
    RankTimes& times = rank_.times_;
    times.exposed_ns += until - from;
    (other.lane_ == 2 ? times.pipeline_ns : times.peers_ns) += from - now_ns_;
  }
  now_ns_ = until;
}

}  // namespace cambium::sim
