// ReductionOrder::ring against a ring in plain loops: partial sums travel from rank to rank and are
// rounded to their type at every hop. Bit for bit, in fp32 and bf16.
#include <bit>
#include <cmath>

#include "tests/sim/run_error.h"

namespace cambium::sim {
namespace {

float round_at_hop(float value, DType dtype) {
  if (dtype == DType::f32) return value;
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return std::bit_cast<float>((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
}

// Numbers of many magnitudes, so that every order of sums rounds differently.
float element(int rank, int64_t i, DType dtype) {
  const uint64_t bits =
      (static_cast<uint64_t>(rank) * 1000003 + static_cast<uint64_t>(i) + 1) * 0x9e3779b97f4a7c15u;
  const float value = static_cast<float>(static_cast<int32_t>(bits >> 32)) * 0x1p-31f;
  return round_at_hop(std::ldexp(value, static_cast<int>(bits % 12)), dtype);
}

struct RingCase {
  int ranks = 2;
  int64_t count = 0;  // of the whole buffer
  DType dtype = DType::f32;
  ReduceOp reduce = ReduceOp::sum;
};

// Chunk c leaves rank c + 1 first. After n - 1 hops rank c holds it whole.
std::vector<float> ring_oracle(const RingCase& c) {
  const int64_t chunk = (c.count + c.ranks - 1) / c.ranks;
  std::vector<std::vector<float>> held(static_cast<size_t>(c.ranks));
  for (int rank = 0; rank < c.ranks; ++rank) {
    for (int64_t i = 0; i < c.count; ++i) {
      held[static_cast<size_t>(rank)].push_back(element(rank, i, c.dtype));
    }
  }
  for (int hop = 0; hop + 1 < c.ranks; ++hop) {
    for (int from = 0; from < c.ranks; ++from) {
      const int part = (from - 1 - hop + 2 * c.ranks) % c.ranks;
      const auto to = static_cast<size_t>((from + 1) % c.ranks);
      for (int64_t i = part * chunk; i < std::min(c.count, (part + 1) * chunk); ++i) {
        const auto at = static_cast<size_t>(i);
        const float sent = held[static_cast<size_t>(from)][at], own = held[to][at];
        held[to][at] =
            c.reduce == ReduceOp::max ? std::max(sent, own) : round_at_hop(sent + own, c.dtype);
      }
    }
  }
  std::vector<float> whole;
  for (int64_t i = 0; i < c.count; ++i) {
    whole.push_back(held[static_cast<size_t>(i / chunk)][static_cast<size_t>(i)]);
  }
  return whole;
}

class Packed {  // a buffer of c.dtype
 public:
  Packed(int64_t count, DType dtype) : dtype_(dtype), words_(static_cast<size_t>(count)) {}
  void* data() { return words_.data(); }
  void set(int64_t i, float value) {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    if (dtype_ == DType::f32) {
      words_[static_cast<size_t>(i)] = bits;
    } else {
      reinterpret_cast<uint16_t*>(words_.data())[i] = static_cast<uint16_t>(bits >> 16);
    }
  }
  uint32_t bits(int64_t i) const {
    if (dtype_ == DType::f32) return words_[static_cast<size_t>(i)];
    return uint32_t{reinterpret_cast<const uint16_t*>(words_.data())[i]} << 16;
  }

 private:
  DType dtype_;
  std::vector<uint32_t> words_;
};

// Elements whose bits differ from the oracle's, of all_reduce and of reduce_scatter, over all
// ranks.
int64_t differences(const RingCase& c, ReductionOrder order) {
  const std::vector<float> want = ring_oracle(c);
  int64_t differing = 0;
  run_cluster({.ranks = c.ranks, .reduction_order = order}, [&](RankEnvironment& environment) {
    RankBench bench(environment);
    const int rank = environment.rank();
    Packed send(c.count, c.dtype), reduced(c.count, c.dtype), part(c.count, c.dtype);
    for (int64_t i = 0; i < c.count; ++i) send.set(i, element(rank, i, c.dtype));
    bench.wait(all_reduce({.communicator = *bench.world,
                           .stream = bench.stream,
                           .send = send.data(),
                           .recv = reduced.data(),
                           .count = c.count,
                           .dtype = c.dtype,
                           .reduce = c.reduce}));
    for (int64_t i = 0; i < c.count; ++i) {
      differing += reduced.bits(i) != std::bit_cast<uint32_t>(want[static_cast<size_t>(i)]);
    }
    if (c.count % c.ranks != 0) return;
    const int64_t share = c.count / c.ranks;
    bench.wait(reduce_scatter({.communicator = *bench.world,
                               .stream = bench.stream,
                               .send = send.data(),
                               .recv = part.data(),
                               .count = share,
                               .dtype = c.dtype,
                               .reduce = c.reduce}));
    for (int64_t i = 0; i < share; ++i) {
      const float whole = want[static_cast<size_t>(rank * share + i)];
      differing += part.bits(i) != std::bit_cast<uint32_t>(whole);
    }
  });
  return differing;
}

TEST(Ring, AllReduceAndReduceScatterHaveTheBitsOfARingInPlainLoops) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const ReduceOp reduce : {ReduceOp::sum, ReduceOp::max}) {
      for (const int ranks : {2, 3, 4, 7, 8, 16}) {
        for (const int64_t count : {int64_t{1}, int64_t{5}, int64_t{37}, int64_t{840 * 5},
                                    int64_t{16 * 2049}, int64_t{100'003}}) {
          const RingCase c{ranks, count, dtype, reduce};
          EXPECT_EQ(differences(c, ReductionOrder::ring), 0)
              << dtype_name(dtype) << " " << ranks << " ranks, " << count;
        }
      }
    }
  }
}

// The oracle tells orders apart: sums in rank order, rounded once, are others.
TEST(Ring, MustFailInRankOrder) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    EXPECT_GT(differences({4, 4096, dtype, ReduceOp::sum}, ReductionOrder::rank), 100);
  }
}

}  // namespace
}  // namespace cambium::sim
