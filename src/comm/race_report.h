// What race detection saw of a clean run (sim/race_detector.h).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace cambium {

// A place of the program that waits, and how many of its waits other orders implied.
struct WaitSite {
  std::string name;  // "src/train/train_step.cc:12 comm waits for compute"
  int64_t count = 0;
  int64_t implied = 0;
};

struct RaceReport {
  int64_t accesses = 0;  // checked
  int64_t launches = 0;  // of transfers, compared between two ranks each (sim/order_hazards.h)
  std::vector<WaitSite> waits;
};

}  // namespace cambium
