// A gradient forest as a trainer keeps it, and the plain-loop oracle of the canonical tree sum.
//
// `Forest::plan_call` makes the node table of one wgrad call over a range of blocks; ranges may
// come in any order. `Forest::remaining_merges` are the merges that no call could fold.
#pragma once

#include <map>
#include <utility>

#include "kernels/grad_merge.h"
#include "kernels/grad_target.h"
#include "tests/ops/op_test.h"

namespace cambium::test {

// Slots 0 .. slot_count - 1 of complete nodes, keyed by their range.
class Forest {
 public:
  Forest(int64_t total_blocks, int64_t slot_count) : total_(total_blocks) {
    for (int64_t slot = slot_count - 1; slot >= 0; --slot) free_.push_back(slot);
  }

  // The table of a call over blocks [first, end): its maximal canonical nodes, each folded with the
  // left siblings that are complete by then.
  TestTensor plan_call(int64_t first, int64_t end) {
    std::vector<std::vector<int64_t>> rows;
    append_nodes(0, total_, first, end, rows);
    TestTensor table(Shape(rows.size(), kNodeColumns), DType::i32);
    table.fill(0);
    for (size_t row = 0; row < rows.size(); ++row) {
      for (size_t column = 0; column < rows[row].size(); ++column) {
        table.set(static_cast<int64_t>(row) * kNodeColumns + static_cast<int64_t>(column),
                  static_cast<double>(rows[row][column]));
      }
    }
    return table;
  }

  struct Merge {
    int64_t left, right, destination;
  };
  // Merges siblings until one node is left; its slot is `root_slot` afterwards.
  std::vector<Merge> remaining_merges() {
    std::vector<Merge> merges;
    merge_range(0, total_, merges);
    return merges;
  }
  int64_t root_slot() const { return nodes_.at({0, total_}); }

 private:
  using Range = std::pair<int64_t, int64_t>;

  void append_nodes(int64_t low, int64_t high, int64_t first, int64_t end,
                    std::vector<std::vector<int64_t>>& rows) {
    if (end <= low || high <= first) return;
    if (first <= low && high <= end) return append_row({low, high}, rows);
    const int64_t middle = low + canonical_split(high - low);
    append_nodes(low, middle, first, end, rows);
    append_nodes(middle, high, first, end, rows);
  }
  void append_row(Range node, std::vector<std::vector<int64_t>>& rows) {
    std::vector<int64_t> folds;
    Range whole = node;
    for (Range left = left_sibling(whole); nodes_.contains(left); left = left_sibling(whole)) {
      folds.push_back(nodes_.at(left));
      nodes_.erase(left);
      whole.first = left.first;
    }
    // The destination is the last left slot when there is one; the other slots become free.
    int64_t destination = 0;
    if (folds.empty()) {
      destination = take_slot();
    } else {
      destination = folds.back();
      free_.insert(free_.end(), folds.begin(), folds.end() - 1);
    }
    nodes_[whole] = destination;
    std::vector<int64_t> row = {node.first, node.second, destination,
                                static_cast<int64_t>(folds.size())};
    row.insert(row.end(), folds.begin(), folds.end());
    rows.push_back(row);
  }
  // The left sibling of a right child; an empty range, never in the forest, for others.
  Range left_sibling(Range node) const {
    int64_t low = 0, high = total_;
    while (high - low > node.second - node.first) {
      const int64_t middle = low + canonical_split(high - low);
      if (middle == node.first && high == node.second) return {low, middle};
      (node.first < middle ? high : low) = middle;
    }
    return {-1, -1};
  }
  int64_t take_slot() {
    CHECK(!free_.empty());
    const int64_t slot = free_.back();
    free_.pop_back();
    return slot;
  }
  void merge_range(int64_t low, int64_t high, std::vector<Merge>& merges) {
    if (nodes_.contains({low, high})) return;
    CHECK_GE(high - low, 2);
    const int64_t middle = low + canonical_split(high - low);
    merge_range(low, middle, merges);
    merge_range(middle, high, merges);
    const int64_t left = nodes_.at({low, middle}), right = nodes_.at({middle, high});
    merges.push_back({left, right, right});
    nodes_[{low, high}] = right;
  }

  int64_t total_;
  std::map<Range, int64_t> nodes_;
  std::vector<int64_t> free_;
};

// The oracle: value of [first, end) by the definition, or empty when absent. contribution(block)
// returns a vector, empty when the block contributes nothing.
template <class Contribution>
std::vector<float> tree_sum_oracle(int64_t first, int64_t end, Contribution&& contribution) {
  if (end - first == 1) return contribution(first);
  int64_t split = 1;
  while (split * 2 < end - first) split *= 2;
  std::vector<float> left = tree_sum_oracle(first, first + split, contribution);
  const std::vector<float> right = tree_sum_oracle(first + split, end, contribution);
  if (left.empty()) return right;
  for (size_t i = 0; i < right.size(); ++i) left[i] = left[i] + right[i];
  return left;
}

// Ways to spread `total` blocks over calls: ranges of `width` blocks, in the order that `order`
// gives (ascending, descending, or odd ranges first).
enum class CallOrder { ascending, descending, odd_first };

inline std::vector<std::pair<int64_t, int64_t>> call_ranges(int64_t total, int64_t width,
                                                            CallOrder order) {
  std::vector<std::pair<int64_t, int64_t>> ranges, result;
  for (int64_t first = 0; first < total; first += width) {
    ranges.emplace_back(first, std::min(total, first + width));
  }
  if (order == CallOrder::descending) std::reverse(ranges.begin(), ranges.end());
  if (order != CallOrder::odd_first) return ranges;
  for (const size_t parity : {1, 0}) {
    for (size_t i = parity; i < ranges.size(); i += 2) result.push_back(ranges[i]);
  }
  return result;
}

}  // namespace cambium::test
