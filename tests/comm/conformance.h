// Conformance suite of communicators, written against comm.h and rank_environment.h alone.
//
// Every case is data: what is called, on how many ranks, with which dtype, count and variant. A
// rank runs its part with `run_cases`, which compares every received element with a plain-loop
// oracle. Values are small integers, so sums are exact in every dtype and every reduction order.
// The same cases run on the simulator (sim_conformance.cc) and, given memory that the device can
// reach, on NCCL.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "src/comm/rank_environment.h"

namespace cambium::conformance {

enum class Subject {
  all_gather,
  reduce_scatter,
  all_reduce_sum,
  all_reduce_max,
  broadcast_first,
  broadcast_last,
  all_to_all_even,
  all_to_all_ragged,     // every pair its own count, some zero
  all_to_all_zero_rank,  // one rank sends and receives nothing
  barrier,
  exchange_ring,
  exchange_pairs,
  exchange_self,
  exchange_several,  // several messages between the same two ranks in one call
  exchange_partial,  // a message completes although its receiver's other one is still open
  subgroups,         // disjoint groups of one name
  overlapping,       // world, rows and columns of a grid, in one stream
  two_streams,       // two communicators on two streams, awaited in the other order
  stream_waits,      // a chain through tickets that only streams wait on
  many_outstanding,  // 50 calls, one wait
};

enum class Placement { apart, in_place };

struct Case {
  Subject subject = Subject::barrier;
  int ranks = 1;
  DType dtype = DType::f32;
  int64_t count = 0;  // elements per rank or message
  Placement placement = Placement::apart;
  std::string name() const;
};

// All cases for up to `most_ranks` ranks, in a fixed order.
std::vector<Case> all_cases(int most_ranks);

// Large ones for exactly `ranks` ranks: fp32 and bf16, from 1 MiB to `most_bytes` per rank's send
// buffer. For transports whose path depends on the size.
std::vector<Case> large_cases(int ranks, int64_t most_bytes);

// Memory that the communicator can transfer, which host code need not reach: `copy` moves bytes
// between it and the host's, either way, and returns when done.
struct Memory {
  std::shared_ptr<void> (*allocate)(int64_t bytes);
  void (*copy)(const void* from, void* to, int64_t bytes);
};
Memory host_memory();

// This rank's part of `cases`, one after another; the job has exactly as many ranks as each of
// them. Throws an Error of exit code 51 at the first wrong element. Returns a hash of everything
// received, for comparing runs.
uint64_t run_cases(RankEnvironment& environment, std::span<const Case> cases, const Memory& memory);

}  // namespace cambium::conformance
