#include "sim/deadlock.h"

#include <algorithm>

#include "fmt/format.h"
#include "src/comm/call_check.h"

namespace cambium::sim {

namespace {

constexpr int kMostRanksListed = 64;

// One reason why a rank cannot go on: it needs `rank`, or nobody (-1) can help.
struct Need {
  int rank = -1;
  std::string why;
};

// What blocks one rank: where its host stands and what its awaited stream stands at.
struct Block {
  std::string where;        // "waits at file:line"
  std::string what;         // "for call #3 of 'dp' [0,1], all_reduce ... (file:line)"
  std::vector<Need> needs;  // the first is reported
};

class Diagnosis {
 public:
  Diagnosis(const Scheduler& scheduler, const std::vector<const Group*>& groups,
            const std::vector<int64_t>& steps)
      : scheduler_(scheduler), groups_(groups), steps_(steps) {
    for (int rank = 0; rank < scheduler.ranks(); ++rank) blocks_.push_back(block_of(rank));
  }

  std::string text() const {
    std::string text = "deadlock: " + cause();
    const int listed = std::min(scheduler_.ranks(), kMostRanksListed);
    for (int rank = 0; rank < listed; ++rank) {
      const Block& block = blocks_[static_cast<size_t>(rank)];
      text += fmt::format("\n  rank {} (step {}): {}{}", rank, steps_[static_cast<size_t>(rank)],
                          block.where, block.what);
      for (const Need& need : block.needs) text += "; " + need.why;
    }
    if (listed < scheduler_.ranks()) {
      text += fmt::format("\n  ... and {} more ranks", scheduler_.ranks() - listed);
    }
    return text;
  }

 private:
  bool finished(int rank) const { return scheduler_.task(rank).state == RankState::finished; }

  Block block_of(int rank) const {
    Block block;
    const RankTask& task = scheduler_.task(rank);
    if (task.state == RankState::finished) {
      block.where = "finished its program";
      return block;
    }
    block.where = fmt::format("waits at {}", describe_site(task.site));
    follow(task.event, block);
    return block;
  }

  // From an event through waits of streams on each other to the task that blocks.
  void follow(Event event, Block& block) const {
    std::vector<const Stream*> seen;
    while (true) {
      const Stream& stream = *event.stream;
      if (std::count(seen.begin(), seen.end(), &stream) > 0) {
        block.what += fmt::format(" for stream '{}', which waits for itself", stream.name());
        block.needs.push_back({-1, "a cycle of stream waits"});
        return;
      }
      seen.push_back(&stream);
      if (event.sequence > stream.enqueued()) {
        block.what += fmt::format(" for event {} of stream '{}'", event.sequence, stream.name());
        block.needs.push_back(
            {-1, fmt::format("the event was never recorded: the stream has only {} tasks",
                             stream.enqueued())});
        return;
      }
      const Stream::Head head = stream.head();
      if (head.gated != nullptr) {
        describe(static_cast<const Transfer&>(*head.gated), stream, block);
        return;
      }
      if (head.event.stream == nullptr) {
        block.what += fmt::format(" for op '{}' of stream '{}'", head.op_name, stream.name());
        return;
      }
      block.what += fmt::format(" for stream '{}', which waits", stream.name());
      event = head.event;
    }
  }

  void describe(const Transfer& transfer, const Stream& stream, Block& block) const {
    if (transfer.group == nullptr) {
      block.what += fmt::format(" for a call of stream '{}' that was not posted", stream.name());
      return;
    }
    const Group& group = *transfer.group;
    if (transfer.call.kind == CollectiveKind::exchange) {
      block.what += fmt::format(" for {} of communicator {} ({}), in stream '{}'",
                                describe_call(transfer.call), group.describe(),
                                describe_site(transfer.call.site), stream.name());
      for (size_t i = 0; i < transfer.recvs.size(); ++i) {
        const Mail& mail = *transfer.recvs[i];
        if (!mail.copied.load()) {
          need_mail(group, transfer.call.recvs[i].peer, "send to", mail.send, transfer, block);
        }
      }
      for (size_t i = 0; i < transfer.sends.size(); ++i) {
        const Mail& mail = *transfer.sends[i];
        if (!mail.copied.load()) {
          need_mail(group, transfer.call.sends[i].peer, "receive from", mail.recv, transfer, block);
        }
      }
      return;
    }
    block.what += fmt::format(" for call #{} of communicator {}, {} ({}), in stream '{}'",
                              transfer.sequence + 1, group.describe(), describe_call(transfer.call),
                              describe_site(transfer.call.site), stream.name());
    for (int member = 0; member < group.ranks(); ++member) {
      const Transfer* peer = group.find(member, transfer.sequence);
      if (peer != nullptr && peer->started) continue;
      block.needs.push_back(need_member(group, member, peer));
    }
  }

  // A member that has not reached the collective.
  Need need_member(const Group& group, int member, const Transfer* posted) const {
    const int rank = group.members()[static_cast<size_t>(member)];
    if (posted != nullptr) {
      return {rank, fmt::format("rank {} has posted it but {}", rank, stuck_before(*posted))};
    }
    if (!group.joined(member)) return {rank, never_made(group, rank)};
    const uint64_t count = group.posted(member);
    std::string why =
        fmt::format("missing participant rank {}: it has posted {} calls there", rank, count);
    if (count > 0) {
      const Transfer* last = group.find(member, count - 1);
      if (last != nullptr) why += fmt::format(", last {}", describe_site(last->call.site));
    }
    return {rank, why + (finished(rank) ? " and finished its program" : "")};
  }

  std::string never_made(const Group& group, int rank) const {
    std::string why =
        fmt::format("missing participant rank {}: it never made this communicator", rank);
    for (const Group* other : groups_) {
      if (other == &group || other->name() != group.name()) continue;
      const auto& members = other->members();
      const auto place = std::find(members.begin(), members.end(), rank) - members.begin();
      if (place < std::ssize(members) && other->joined(static_cast<int>(place))) {
        why += fmt::format(", it made {}", other->describe());
      }
    }
    return why + (finished(rank) ? " and finished its program" : "");
  }

  void need_mail(const Group& group, int member, const char* verb, const Transfer* peer,
                 const Transfer& transfer, Block& block) const {
    const int rank = group.members()[static_cast<size_t>(member)];
    const int own = group.members()[static_cast<size_t>(transfer.member)];
    if (peer == nullptr) {
      block.needs.push_back(
          {rank, fmt::format("missing partner rank {}: it did not post the {} rank {}{}", rank,
                             verb, own, finished(rank) ? " and finished its program" : "")});
    } else if (!peer->started) {
      block.needs.push_back({rank, fmt::format("rank {} has posted the {} rank {} but {}", rank,
                                               verb, own, stuck_before(*peer))});
    }
  }

  // Why a posted transfer is not at its stream's head.
  std::string stuck_before(const Transfer& posted) const {
    const Stream& stream = *posted.call.stream;
    const Stream::Head head = stream.head();
    if (head.gated != nullptr && head.gated != &posted) {
      const auto& before = static_cast<const Transfer&>(*head.gated);
      if (before.group != nullptr) {
        return fmt::format(
            "behind call #{} of communicator {}, {} ({}): the two are issued in "
            "another order",
            before.sequence + 1, before.group->describe(), describe_call(before.call),
            describe_site(before.call.site));
      }
    }
    if (head.gated == &posted) {
      return "its device has no room: other transfers that wait for their peers hold every slot; "
             "the order of the two is fixed by no event";
    }
    return stream.blocked_on();
  }

  // The chain of first needs from `rank` to one that nobody can help, or that closes a cycle.
  std::vector<int> chain_from(int rank) const {
    std::vector<int> chain;
    while (rank >= 0 && std::count(chain.begin(), chain.end(), rank) == 0) {
      chain.push_back(rank);
      const auto& needs = blocks_[static_cast<size_t>(rank)].needs;
      if (needs.empty()) return chain;
      // A finished rank explains more than one that waits itself.
      const auto gone = std::find_if(needs.begin(), needs.end(), [&](const Need& need) {
        return need.rank < 0 || finished(need.rank);
      });
      rank = gone != needs.end() ? gone->rank : needs.front().rank;
    }
    chain.push_back(rank);
    return chain;
  }

  std::string cause() const {
    std::vector<int> cycle;
    for (int rank = 0; rank < scheduler_.ranks(); ++rank) {
      const Block& block = blocks_[static_cast<size_t>(rank)];
      for (const Need& need : block.needs) {
        if (need.rank < 0 || finished(need.rank)) {
          return fmt::format("rank {} waits{}; {}", rank, block.what, need.why);
        }
      }
      if (cycle.empty() && !finished(rank)) cycle = chain_from(rank);
    }
    return describe_cycle(cycle);
  }

  std::string describe_cycle(std::vector<int> chain) const {
    if (chain.size() < 2) return "no rank can go on and nothing is queued to run";
    const auto entry = std::find(chain.begin(), chain.end(), chain.back());
    chain.erase(chain.begin(), entry);
    std::string text = "cycle of ranks";
    for (size_t i = 0; i < chain.size(); ++i) {
      text += fmt::format("{} {}", i == 0 ? "" : " ->", chain[i]);
    }
    for (size_t i = 0; i + 1 < chain.size(); ++i) {
      const Block& block = blocks_[static_cast<size_t>(chain[i])];
      for (const Need& need : block.needs) {
        if (need.rank != chain[i + 1]) continue;
        text += fmt::format("; rank {} waits{}; {}", chain[i], block.what, need.why);
        break;
      }
    }
    return text;
  }

  const Scheduler& scheduler_;
  const std::vector<const Group*>& groups_;
  const std::vector<int64_t>& steps_;
  std::vector<Block> blocks_;
};

}  // namespace

std::string describe_deadlock(const Scheduler& scheduler, const std::vector<const Group*>& groups,
                              const std::vector<int64_t>& steps) {
  return Diagnosis(scheduler, groups, steps).text();
}

}  // namespace cambium::sim
