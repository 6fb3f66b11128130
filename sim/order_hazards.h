// OrderHazards: two ranks that launch two transfers in different orders, whether this run hangs or
// not.
//
// A transfer holds part of its device until its peers came. Rank p launches A then B, rank q B then
// A, on communicators and streams of any kind: where p's device has room for A alone and q's for B
// alone, neither goes on. That the simulator's streams have room for both proves nothing, so the
// order in which each rank's program posts is compared for every pair of ranks. Transfers of one
// `exchange` start together and have no order among themselves.
#pragma once

#include <cstdint>
#include <source_location>
#include <vector>

#include "sim/sim_communicator.h"

namespace cambium::sim {

class OrderHazards {
 public:
  explicit OrderHazards(int ranks);
  // `transfer` is bound: the next that its rank launches. An inversion is an Error of exit code 23.
  void launched(Transfer& transfer);
  int64_t compared() const { return compared_; }

 private:
  // Of (rank, peer): the transfer of both that stands latest on the peer, among those that the rank
  // has launched.
  struct Latest {
    uint64_t peer_position = 0;  // counts from 1
    CollectiveKind kind = CollectiveKind::barrier;
    const Group* group = nullptr;
    std::source_location site;
  };
  Latest& latest(int rank, int peer) {
    return latest_[static_cast<size_t>(rank) * next_.size() + static_cast<size_t>(peer)];
  }
  void note(const Transfer& transfer, const Transfer& peer);
  [[noreturn]] void report(const Transfer& transfer, const Transfer& peer,
                           const Latest& between) const;

  std::vector<uint64_t> next_;  // by rank
  std::vector<Latest> latest_;
  int64_t compared_ = 0;
};

}  // namespace cambium::sim
