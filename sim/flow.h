// Flow: one transfer, or one message of an exchange, on the links of virtual time's network.
#pragma once

#include "sim/virtual_time.h"

namespace cambium::sim {

struct VirtualTime::Flow {
  std::vector<Transfer*> members;  // those of this run
  Mail* mail = nullptr;            // of an exchange
  int64_t start_ns = 0;            // all members are there
  int64_t settled_ns = 0;
  double remaining_ns = 0;  // alone
  double rate = 1;
  uint32_t version = 0;
  // Share of a link's capacity that it takes when alone, and what those links are.
  std::vector<std::pair<int64_t, double>> uses;
};

}  // namespace cambium::sim
