// Rendezvous and signature check of the simulated communicator.
#include "sim/sim_communicator.h"

#include <algorithm>
#include <numeric>

#include "fmt/format.h"
#include "sim/comm_faults.h"
#include "sim/order_hazards.h"
#include "sim/race_detector.h"
#include "sim/scheduler.h"
#include "sim/virtual_time.h"
#include "src/comm/call_check.h"

namespace cambium::sim {

Group::Group(std::string name, std::vector<int> members, const ClusterOptions& options,
             Workers& workers, RaceDetector* races, OrderHazards* order_hazards,
             std::vector<DeviceSlots>& slots)
    : name_(std::move(name)),
      members_(std::move(members)),
      order_(options.reduction_order),
      poison_(options.poison),
      moves_data_(options.matching == nullptr),
      workers_(workers),
      races_(races),
      order_hazards_(order_hazards),
      slots_(slots),
      time_(options.time),
      joined_(members_.size()),
      posted_(members_.size()) {
  participants_ = static_cast<int>(
      std::ranges::count_if(members_, [&](int rank) { return is_simulated(options, rank); }));
}

std::string Group::describe() const {
  return fmt::format("'{}' {}", name_, describe_ranks(members_));
}

Transfer& Group::new_transfer(int member) {
  if (spare_transfers_.empty()) {
    transfers_.push_back(std::make_unique<Transfer>());
    spare_transfers_.push_back(transfers_.back().get());
  }
  Transfer& transfer = *spare_transfers_.back();
  spare_transfers_.pop_back();
  transfer.group = nullptr;
  transfer.member = member;
  transfer.meeting = nullptr;
  transfer.sends.clear();
  transfer.recvs.clear();
  transfer.started = false;
  transfer.done = false;
  transfer.moves_from_ns = 0;
  transfer.stage_ = 0;
  transfer.arrived_ = false;
  transfer.holds_slot_ = false;
  transfer.delay = {};
  transfer.delayed_until_ns_ = 0;
  return transfer;
}

void Group::bind(Transfer& transfer, CollectiveCall call) {
  retire();
  transfer.call = std::move(call);
  if (transfer.call.kind == CollectiveKind::exchange) {
    bind_exchange(transfer);
  } else {
    bind_collective(transfer);
  }
  transfer.group = this;
  if (order_hazards_ != nullptr) order_hazards_->launched(transfer);
}

void Group::bind_collective(Transfer& transfer) {
  const auto member = static_cast<size_t>(transfer.member);
  transfer.sequence = posted_[member]++;
  const auto index = static_cast<size_t>(transfer.sequence - first_);
  while (meetings_.size() <= index) {
    if (spare_meetings_.empty()) spare_meetings_.push_back(std::make_unique<Meeting>());
    meetings_.push_back(std::move(spare_meetings_.back()));
    spare_meetings_.pop_back();
    Meeting& fresh = *meetings_.back();
    fresh.transfers.assign(members_.size(), nullptr);
    fresh.posted = 0;
    for (auto& missing : fresh.missing) missing.store(participants());
    fresh.arrivals.store(0);
    fresh.left.store(0);
  }
  Meeting& meeting = *meetings_[index];
  for (const Transfer* peer : meeting.transfers) {
    if (peer == nullptr) continue;
    compare(transfer, *peer);
    // Those posted agree with each other; only the v-counts are pairwise.
    if (transfer.call.kind != CollectiveKind::all_to_all_v) break;
  }
  if (transfer.call.kind == CollectiveKind::all_to_all_v) compare(transfer, transfer);
  transfer.meeting = &meeting;
  meeting.transfers[member] = &transfer;
  ++meeting.posted;
}

const Transfer* Group::find(int member, uint64_t sequence) const {
  if (sequence < first_ || sequence - first_ >= meetings_.size()) return nullptr;
  return meetings_[static_cast<size_t>(sequence - first_)]->transfers[static_cast<size_t>(member)];
}

// Both directions of a pair, so that it does not matter who posts first.
void Group::compare(const Transfer& transfer, const Transfer& peer) const {
  std::string field = call_difference(transfer.call, peer.call);
  const auto own = static_cast<size_t>(transfer.member);
  const auto other = static_cast<size_t>(peer.member);
  const int own_rank = members_[own];
  const int other_rank = members_[other];
  if (field.empty() && transfer.call.kind == CollectiveKind::all_to_all_v) {
    const int64_t sent = transfer.call.send_counts[other];
    const int64_t expected = peer.call.recv_counts[own];
    const int64_t sent_back = peer.call.send_counts[own];
    const int64_t expected_back = transfer.call.recv_counts[other];
    if (sent != expected) {
      field = fmt::format("rank {} sends count {} to rank {}, which expects count {}", own_rank,
                          sent, other_rank, expected);
    } else if (sent_back != expected_back) {
      field = fmt::format("rank {} sends count {} to rank {}, which expects count {}", other_rank,
                          sent_back, own_rank, expected_back);
    }
  }
  if (field.empty()) return;
  fail(
      ExitCode::collective_mismatch,
      "collective mismatch in communicator {}, call #{}: {}: rank {} posts {} ({}), rank {} posted "
      "{} ({}).{} All ranks of a communicator must make the same calls in the same order",
      describe(), transfer.sequence + 1, field, own_rank, describe_call(transfer.call),
      describe_site(transfer.call.site), other_rank, describe_call(peer.call),
      describe_site(peer.call.site), hint(transfer, peer));
}

// Whether one side's call is what the other made one place earlier or later.
std::string Group::hint(const Transfer& transfer, const Transfer& peer) const {
  const auto equal = [](const Transfer* a, const Transfer* b) {
    return a != nullptr && b != nullptr && call_difference(a->call, b->call).empty() &&
           same_call_site(a->call, b->call);
  };
  const uint64_t number = transfer.sequence + 1;
  const int own_rank = members_[static_cast<size_t>(transfer.member)];
  const int other_rank = members_[static_cast<size_t>(peer.member)];
  if (equal(&transfer, find(peer.member, transfer.sequence + 1))) {
    return fmt::format(
        " Rank {}'s call #{} is rank {}'s call #{}: rank {} skipped or reordered one.", own_rank,
        number, other_rank, number + 1, own_rank);
  }
  if (transfer.sequence > 0 && equal(find(transfer.member, transfer.sequence - 1), &peer)) {
    return fmt::format(
        " Rank {}'s call #{} is rank {}'s call #{}: rank {} skipped or reordered one.", other_rank,
        number, own_rank, number - 1, other_rank);
  }
  if (!same_call_site(transfer.call, peer.call)) {
    return " The call sites differ: one of the ranks skipped, added or reordered a call.";
  }
  return "";
}

Mail& Group::mail(Channel& channel, uint64_t number) {
  while (number - channel.first >= channel.mails.size()) channel.mails.emplace_back();
  return channel.mails[static_cast<size_t>(number - channel.first)];
}

void Group::bind_exchange(Transfer& transfer) {
  const auto check = [&](const Mail& mail, int source, int destination, uint64_t number) {
    if (mail.send == nullptr || mail.recv == nullptr) return;
    const CollectiveCall& send = mail.send->call;
    const CollectiveCall& recv = mail.recv->call;
    std::string field;
    if (send.dtype != recv.dtype) {
      field = fmt::format("dtype {} vs {}", dtype_name(send.dtype), dtype_name(recv.dtype));
    } else if (mail.sent.count != mail.received.count) {
      field = fmt::format("count {} vs {}", mail.sent.count, mail.received.count);
    }
    if (field.empty()) return;
    fail(ExitCode::collective_mismatch,
         "exchange mismatch in communicator {}, message #{} from rank {} to rank {}: {}: sent at "
         "{}, "
         "received at {}. Both sides must list the same messages in the same order",
         describe(), number + 1, members_[static_cast<size_t>(source)],
         members_[static_cast<size_t>(destination)], field, describe_site(send.site),
         describe_site(recv.site));
  };
  const auto check_peer = [&](const Message& message) {
    if (message.peer >= 0 && message.peer < ranks() && message.count >= 0 &&
        (message.count == 0 || message.data != nullptr)) {
      return;
    }
    fail(ExitCode::internal, "{}: exchange in {}: peer {} of {}, count {}{}",
         describe_site(transfer.call.site), describe(), message.peer, ranks(), message.count,
         message.data == nullptr ? ", null buffer" : "");
  };
  for (const Message& message : transfer.call.sends) {
    check_peer(message);
    Channel& channel = channels_[{transfer.member, message.peer}];
    Mail& mail = this->mail(channel, channel.sends++);
    mail.channel = &channel;
    mail.send = &transfer;
    mail.sent = message;
    transfer.sends.push_back(&mail);
    check(mail, transfer.member, message.peer, channel.sends - 1);
  }
  for (const Message& message : transfer.call.recvs) {
    check_peer(message);
    Channel& channel = channels_[{message.peer, transfer.member}];
    Mail& mail = this->mail(channel, channel.recvs++);
    mail.channel = &channel;
    mail.recv = &transfer;
    mail.received = message;
    transfer.recvs.push_back(&mail);
    check(mail, message.peer, transfer.member, channel.recvs - 1);
  }
  exchanges_.push_back(&transfer);
}

// Takes back what every side is done with. Runs between compute phases, so nothing is in flight.
void Group::retire() {
  while (!meetings_.empty() && meetings_.front()->left.load() == participants()) {
    for (Transfer* transfer : meetings_.front()->transfers) {
      if (transfer != nullptr) spare_transfers_.push_back(transfer);
    }
    spare_meetings_.push_back(std::move(meetings_.front()));
    meetings_.pop_front();
    ++first_;
  }
  while (!exchanges_.empty() && exchanges_.front()->done) {
    Transfer* transfer = exchanges_.front();
    exchanges_.pop_front();
    const auto close = [](Mail* mail) {
      ++mail->closed_sides;
      Channel& channel = *mail->channel;
      while (!channel.mails.empty() && channel.mails.front().closed_sides == 2) {
        channel.mails.pop_front();
        ++channel.first;
      }
    };
    for (Mail* mail : transfer->sends) close(mail);
    for (Mail* mail : transfer->recvs) close(mail);
    spare_transfers_.push_back(transfer);
  }
}

Ticket SimCommunicator::post(CollectiveCall call) {
  check_call(call);
  if (hooks_.injector != nullptr) return hooks_.injector->post(*this, std::move(call));
  return submit(std::move(call));
}

namespace {

// The bytes of a call's buffers, touched until its ticket completes.
void declare_transfer(const CollectiveCall& call, const SimCommunicator& communicator) {
  const int64_t element = dtype_bytes(call.dtype);
  const int64_t ranks = communicator.ranks();
  const bool is_exchange = call.kind == CollectiveKind::exchange;
  const auto total = [](const std::vector<int64_t>& counts) {
    return std::accumulate(counts.begin(), counts.end(), int64_t{0});
  };
  int64_t sent = call.count, received = call.count;
  if (call.kind == CollectiveKind::all_gather) received *= ranks;
  if (call.kind == CollectiveKind::reduce_scatter) sent *= ranks;
  if (call.kind == CollectiveKind::all_to_all_v) {
    sent = total(call.send_counts);
    received = total(call.recv_counts);
  }
  std::vector<MemoryAccess> accesses;
  const auto add = [&](const void* data, int64_t count, Access access) {
    if (data == nullptr || count == 0) return;
    accesses.push_back(
        {data, count * element, access, access == Access::read ? "send" : "receive"});
  };
  if (!is_exchange && call.kind != CollectiveKind::barrier) {
    const bool is_broadcast = call.kind == CollectiveKind::broadcast;
    const bool is_root = communicator.rank() == call.root;
    if (!is_broadcast || is_root) add(call.send, sent, Access::read);
    if (!is_broadcast || !is_root) add(call.recv, received, Access::write);
  }
  for (const Message& message : call.sends) add(message.data, message.count, Access::read);
  for (const Message& message : call.recvs) add(message.data, message.count, Access::write);
  call.stream->observer()->declare({*call.stream, collective_name(call.kind), accesses, call.site,
                                    StreamObserver::Task::Kind::transfer});
}

}  // namespace

Ticket SimCommunicator::submit(CollectiveCall call, Delay delay) {
  Stream& stream = *call.stream;
  if (stream.observer() != nullptr) declare_transfer(call, *this);
  const char* op_name = collective_name(call.kind);
  Transfer& transfer = group_.new_transfer(rank_);
  if (delay.ns == 0 && hooks_.explored != nullptr) {
    delay = {hooks_.explored->drawn_latency_ns(), "is late", hooks_.explored};
  }
  transfer.delay = delay;
  group_.bind(transfer, std::move(call));
  if (group_.time() != nullptr) {
    VirtualRank& rank = static_cast<VirtualStream*>(stream.clock())->rank();
    transfer.issue_ns = rank.post();
    transfer.place = rank.place();
    stream.enqueue_gated(op_name, transfer, &group_.workers());
    return stream.record();
  }
  // A rank alone waits for nobody: on a GPU its call need not hold back what follows.
  stream.enqueue_gated(op_name, transfer, group_.ranks() == 1 ? &group_.workers() : nullptr);
  return stream.record();
}

}  // namespace cambium::sim
