// Cases and oracle of the dispatch plan.
#pragma once

#include "kernels/dispatch_plan.h"
#include "tests/ops/op_test.h"
#include "tests/ops/routing_test.h"

namespace cambium::test {

struct DispatchPlanCase {
  RoutingCase routing;
  int64_t ranks;
};

inline const std::vector<DispatchPlanCase> kDispatchPlanCases = {
    {{0, 4, 2, Spread::random}, 2},   {{1, 4, 2, Spread::random}, 4},
    {{1, 1, 1, Spread::random}, 1},   {{13, 6, 3, Spread::random}, 2},
    {{40, 8, 2, Spread::one}, 4},     {{31, 8, 2, Spread::lower}, 4},
    {{33, 8, 4, Spread::random}, 8},  {{20, 8, 2, Spread::random}, 1},
    {{128, 8, 2, Spread::random}, 4}, {{5000, 64, 6, Spread::random}, 16}};

struct DispatchPlanExpected {
  std::vector<double> count_P2, token_M, expert_MK, weight_MK, return_row_TK, part_TP;
};

// Loops over destinations, tokens, choices: the definition, as written in the contract.
inline DispatchPlanExpected dispatch_plan_oracle(const TestTensor& index_TK,
                                                 const TestTensor& weight_TK, int64_t ranks,
                                                 int64_t experts_per_rank) {
  const int64_t T = index_TK.shape()[0], K = index_TK.shape()[1];
  const int64_t M = dispatch_capacity(T, K, ranks);
  DispatchPlanExpected expected;
  expected.token_M = std::vector<double>(M, -1.0);
  expected.expert_MK = std::vector<double>(M * K, -1.0);
  expected.weight_MK = std::vector<double>(M * K, 0.0);
  expected.return_row_TK = std::vector<double>(T * K, -1.0);
  expected.part_TP = std::vector<double>(T * ranks, -1.0);
  int64_t entry = 0, row = 0;
  for (int64_t rank = 0; rank < ranks; ++rank) {
    const int64_t first_entry = entry, first_row = row;
    for (int64_t t = 0; t < T; ++t) {
      bool is_sent = false;
      for (int64_t k = 0; k < K; ++k) {
        const auto expert = static_cast<int64_t>(index_TK.at(t * K + k));
        if (expert / experts_per_rank != rank) continue;
        is_sent = true;
        expected.expert_MK[entry * K + k] = static_cast<double>(expert % experts_per_rank);
        expected.weight_MK[entry * K + k] = weight_TK.at(t * K + k);
        expected.return_row_TK[t * K + k] = static_cast<double>(row++);
      }
      if (!is_sent) continue;
      expected.token_M[entry] = static_cast<double>(t);
      expected.part_TP[t * ranks + rank] = static_cast<double>(entry++);
    }
    expected.count_P2.push_back(static_cast<double>(entry - first_entry));
    expected.count_P2.push_back(static_cast<double>(row - first_row));
  }
  return expected;
}

struct DispatchPlanOutputs {
  TestTensor count_P2, token_M, expert_MK, weight_MK, return_row_TK, part_TP;
};

inline DispatchPlanOutputs run_dispatch_plan(TestTensor& index_TK, TestTensor& weight_TK,
                                             int64_t ranks, int64_t experts_per_rank,
                                             int threads = 2) {
  const int64_t T = index_TK.shape()[0], K = index_TK.shape()[1];
  const int64_t M = dispatch_capacity(T, K, ranks);
  DispatchPlanOutputs out{make_index_output(Shape(ranks, 2)), make_index_output(Shape(M)),
                          make_index_output(Shape(M, K)),     TestTensor(Shape(M, K)),
                          make_index_output(Shape(T, K)),     make_index_output(Shape(T, ranks))};
  run_op(dispatch_plan,
         {.expert_index_TK = index_TK.in<int32_t>(),
          .weight_TK = weight_TK.in<float>(),
          .ranks = ranks,
          .experts_per_rank = experts_per_rank,
          .send_count_P2 = out.count_P2.out<int32_t>(),
          .send_token_M = out.token_M.out<int32_t>(),
          .send_expert_MK = out.expert_MK.out<int32_t>(),
          .send_weight_MK = out.weight_MK.out<float>(),
          .return_row_TK = out.return_row_TK.out<int32_t>(),
          .token_part_TP = out.part_TP.out<int32_t>()},
         threads);
  return out;
}

}  // namespace cambium::test
