// Cases and oracle of the routing sort.
#pragma once

#include "kernels/routing_sort.h"
#include "tests/ops/op_test.h"
#include "tests/ops/routing_test.h"

namespace cambium::test {

inline const std::vector<RoutingCase> kRoutingSortCases = {
    {0, 4, 2, Spread::random},    {1, 1, 1, Spread::random},     {1, 8, 2, Spread::random},
    {13, 7, 3, Spread::random},   {40, 8, 2, Spread::one},       {31, 8, 2, Spread::lower},
    {1024, 8, 2, Spread::random}, {5000, 128, 8, Spread::random}};

struct RoutingSortExpected {
  std::vector<double> offset_e1, token_R, slot_R, ordered_row_R, slot_row_TK;
};

// Sorts (expert, token, k) triples with the library's sort.
inline RoutingSortExpected routing_sort_oracle(const TestTensor& index_TK, int64_t experts,
                                               int64_t R) {
  const int64_t K = index_TK.shape()[1];
  std::vector<std::array<int64_t, 2>> rows;  // expert, slot
  for (int64_t slot = 0; slot < index_TK.elements(); ++slot) {
    if (index_TK.at(slot) >= 0) rows.push_back({static_cast<int64_t>(index_TK.at(slot)), slot});
  }
  std::sort(rows.begin(), rows.end());
  RoutingSortExpected expected;
  expected.token_R = expected.slot_R = expected.ordered_row_R = std::vector<double>(R, -1.0);
  expected.slot_row_TK = std::vector<double>(index_TK.elements(), -1.0);
  for (size_t row = 0; row < rows.size(); ++row) {
    expected.slot_R[row] = static_cast<double>(rows[row][1]);
    expected.token_R[row] = static_cast<double>(rows[row][1] / K);
    expected.slot_row_TK[rows[row][1]] = static_cast<double>(row);
  }
  int64_t ordered = 0;
  for (const double row : expected.slot_row_TK) {
    if (row >= 0) expected.ordered_row_R[ordered++] = row;
  }
  for (int64_t e = 0; e <= experts; ++e) {
    const auto before = [e](const std::array<int64_t, 2>& row) { return row[0] < e; };
    expected.offset_e1.push_back(
        static_cast<double>(std::count_if(rows.begin(), rows.end(), before)));
  }
  return expected;
}

struct RoutingSortOutputs {
  TestTensor offset_e1, token_R, slot_R, ordered_row_R, slot_row_TK;
};

inline RoutingSortOutputs run_routing_sort(TestTensor& index_TK, int64_t experts, int64_t R,
                                           RoutingOrder order, int threads = 2) {
  RoutingSortOutputs out{make_index_output(Shape(experts + 1)), make_index_output(Shape(R)),
                         make_index_output(Shape(R)), make_index_output(Shape(R)),
                         make_index_output(index_TK.shape())};
  run_op(routing_sort,
         {.expert_index_TK = index_TK.in<int32_t>(),
          .experts = experts,
          .expert_offset_e1 = out.offset_e1.out<int32_t>(),
          .row_token_R = out.token_R.out<int32_t>(),
          .row_slot_R = out.slot_R.out<int32_t>(),
          .ordered_row_R = out.ordered_row_R.out<int32_t>(),
          .slot_row_TK = out.slot_row_TK.out<int32_t>(),
          .order = order},
         threads);
  return out;
}

}  // namespace cambium::test
