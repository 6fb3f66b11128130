// Cuts one thread's scratch into panels.
#pragma once

#include "src/base/workers.h"

namespace cambium::reference {

class PanelCutter {
 public:
  PanelCutter(Scratch& scratch, int64_t floats) : next_(scratch.floats(0, floats)) {
    left_ = floats;
  }
  float* take(int64_t count) {
    const int64_t padded = round_up(count);
    CHECK_LE(padded, left_);
    float* taken = next_;
    next_ += padded;
    left_ -= padded;
    return taken;
  }
  static int64_t round_up(int64_t count) { return (count + 15) / 16 * 16; }

 private:
  float* next_;
  int64_t left_ = 0;
};

}  // namespace cambium::reference
