#include "sim/comm_faults.h"

#include <algorithm>
#include <utility>

#include "sim/scheduler.h"
#include "src/comm/call_check.h"

namespace cambium::sim {

namespace {

struct FaultName {
  CommFaultKind kind;
  const char* name;
};
constexpr FaultName kFaultNames[] = {
    {CommFaultKind::wrong_count, "wrong_count"},
    {CommFaultKind::swapped_collectives, "swapped_collectives"},
    {CommFaultKind::skipped_collective, "skipped_collective"},
    {CommFaultKind::rank_crash, "rank_crash"},
    {CommFaultKind::stuck_rank, "stuck_rank"},
    {CommFaultKind::pause, "pause"},
    {CommFaultKind::slow_link, "slow_link"},
    {CommFaultKind::flapping_link, "flapping_link"},
};

// The count that a wrong_count fault falsifies, for a peer of `rank` where there is one for each.
int64_t& chosen_count(CollectiveCall& call, int rank, int ranks) {
  if (call.kind == CollectiveKind::all_to_all_v) {
    return call.send_counts[static_cast<size_t>((rank + 1) % ranks)];
  }
  if (call.kind == CollectiveKind::exchange) {
    return call.sends.empty() ? call.recvs.front().count : call.sends.front().count;
  }
  return call.count;
}

bool is_payload(const CollectiveCall& call) {
  return call.kind == CollectiveKind::all_to_all_v &&
         (call.dtype == DType::f32 || call.dtype == DType::bf16);
}

int shared_members(const Group& a, const Group& b) {
  return static_cast<int>(std::count_if(a.members().begin(), a.members().end(), [&](int member) {
    return std::count(b.members().begin(), b.members().end(), member) > 0;
  }));
}

}  // namespace

CommFaultKind comm_fault_kind(const std::string& name) {
  for (const FaultName& entry : kFaultNames) {
    if (name == entry.name) return entry.kind;
  }
  fail(ExitCode::usage,
       "fault kind '{}' is not one of the communicator's: wrong_count, swapped_collectives, "
       "skipped_collective, rank_crash, stuck_rank, pause, slow_link, flapping_link",
       name);
}

const char* comm_fault_name(CommFaultKind kind) {
  return std::find_if(std::begin(kFaultNames), std::end(kFaultNames),
                      [&](const FaultName& entry) { return entry.kind == kind; })
      ->name;
}

FaultInjector::FaultInjector(std::vector<CommFault> faults, Scheduler& scheduler, int rank)
    : scheduler_(scheduler), rank_(rank), pending_(std::move(faults)) {}

bool FaultInjector::fits(const CommFault& fault, const SimCommunicator& communicator,
                         const CollectiveCall& call) const {
  if (fault.step != step_ || communicator.ranks() < 2) return false;
  if (!fault.communicator.empty() && fault.communicator != communicator.name()) return false;
  switch (fault.kind) {
    case CommFaultKind::wrong_count:
      return call.kind != CollectiveKind::barrier &&
             (call.kind != CollectiveKind::exchange || !call.sends.empty() || !call.recvs.empty());
    case CommFaultKind::swapped_collectives:
      return call.kind != CollectiveKind::exchange;
    case CommFaultKind::skipped_collective:
      return !fault.communicator.empty() || is_payload(call);
    case CommFaultKind::rank_crash:
    case CommFaultKind::stuck_rank:
    case CommFaultKind::pause:
    case CommFaultKind::slow_link:
    case CommFaultKind::flapping_link:
      return true;
  }
  return false;
}

// Whether a pending fault of this kind strikes here; it is then no longer pending.
bool FaultInjector::strikes(CommFaultKind kind, const SimCommunicator& communicator,
                            const CollectiveCall& call) {
  for (auto fault = pending_.begin(); fault != pending_.end(); ++fault) {
    if (fault->kind != kind || !fits(*fault, communicator, call)) continue;
    if (fault->skip_calls-- > 0) continue;
    held_.fault = *fault;
    held_.fault.skip_calls = 0;
    pending_.erase(fault);
    return true;
  }
  return false;
}

Ticket FaultInjector::post(SimCommunicator& communicator, CollectiveCall call) {
  if (held_.communicator != nullptr) {
    if (swaps_with_held(communicator, call)) return post_swapped(communicator, std::move(call));
    flush();
  }
  if (strikes(CommFaultKind::rank_crash, communicator, call)) {
    fail(ExitCode::peer_lost,  // FAULT: rank_crash
         "this rank is lost before its call {} of {} ({}); its peers wait for it; next: train "
         "--resume goes on from the last checkpoint",
         describe_call(call), communicator.group().describe(), describe_site(call.site));
  }
  if (strikes(CommFaultKind::stuck_rank, communicator, call)) {
    scheduler_.hang(rank_, call.site);  // FAULT: stuck_rank
  }
  if (strikes(CommFaultKind::pause, communicator, call)) {
    scheduler_.pause(rank_, held_.fault.delay_ns, "is paused", call.site);  // FAULT: pause
  }
  if (strikes(CommFaultKind::wrong_count, communicator, call)) {
    chosen_count(call, communicator.rank(), communicator.ranks()) += 1;  // FAULT: wrong_count
  }
  if (strikes(CommFaultKind::skipped_collective, communicator, call)) {
    return Ticket{};  // FAULT: skipped_collective
  }
  if (strikes(CommFaultKind::swapped_collectives, communicator, call)) {
    return hold(communicator, std::move(call));
  }
  const Delay delay = link_delay(communicator, call);  // FAULT: slow_link, flapping_link
  return communicator.submit(std::move(call), delay);
}

// These strike call after call of their step.
Delay FaultInjector::link_delay(const SimCommunicator& communicator, const CollectiveCall& call) {
  Delay delay;
  for (CommFault& fault : pending_) {
    const bool flaps = fault.kind == CommFaultKind::flapping_link;
    if (!flaps && fault.kind != CommFaultKind::slow_link) continue;
    if (!fits(fault, communicator, call) || fault.skip_calls-- > 0) continue;
    if (!flaps || fault.struck % 2 == 0) delay.ns += fault.delay_ns;
    delay.why = flaps ? "waits for its flapping link" : "waits for its slow link";
    delay.scheduler = &scheduler_;
    ++fault.struck;
  }
  return delay;
}

const CommFault* FaultInjector::unstruck() const {
  const auto found = std::ranges::find(pending_, 0, &CommFault::struck);
  return found == pending_.end() ? nullptr : &*found;
}

Ticket FaultInjector::hold(SimCommunicator& communicator, CollectiveCall call) {
  held_.communicator = &communicator;
  held_.transfer = &communicator.group().new_transfer(communicator.rank());
  held_.call = std::move(call);
  Stream& stream = *held_.call.stream;
  stream.enqueue_gated(collective_name(held_.call.kind), *held_.transfer);
  return stream.record();
}

// Swapping must be seen by the peers: calls of one group that differ, or calls of two groups with a
// second rank in common, on one stream.
bool FaultInjector::swaps_with_held(const SimCommunicator& communicator,
                                    const CollectiveCall& call) const {
  if (call.kind == CollectiveKind::exchange || call.stream != held_.call.stream) return false;
  if (&communicator == held_.communicator) {
    return describe_call(call) != describe_call(held_.call);
  }
  return shared_members(communicator.group(), held_.communicator->group()) >= 2;
}

Ticket FaultInjector::post_swapped(SimCommunicator& communicator, CollectiveCall call) {
  Stream& stream = *call.stream;
  SimCommunicator* first = held_.communicator;
  SimCommunicator* second = &communicator;
  held_.communicator = nullptr;
  Transfer& transfer = second->group().new_transfer(second->rank());
  stream.enqueue_gated(collective_name(call.kind), transfer);
  std::swap(held_.call, call), std::swap(first, second);  // FAULT: swapped_collectives
  held_.transfer->member = first->rank();
  transfer.member = second->rank();
  first->group().bind(*held_.transfer, std::move(held_.call));
  second->group().bind(transfer, std::move(call));
  stream.wake();
  return stream.record();
}

void FaultInjector::flush() {
  if (held_.communicator == nullptr) return;
  SimCommunicator& communicator = *std::exchange(held_.communicator, nullptr);
  Stream& stream = *held_.call.stream;
  communicator.group().bind(*held_.transfer, std::move(held_.call));
  stream.wake();
  pending_.push_back(held_.fault);
}

}  // namespace cambium::sim
