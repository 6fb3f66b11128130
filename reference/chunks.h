// Work cut into ranges by the problem alone, so that results never depend on the thread count.
#pragma once

#include <algorithm>
#include <cstdint>

#include "src/base/workers.h"

namespace cambium::reference {

constexpr int64_t chunk_count(int64_t items, int64_t items_per_chunk) {
  return (items + items_per_chunk - 1) / items_per_chunk;
}

// Items whose `elements_per_item` elements together make about 4,096: some microseconds of work.
constexpr int64_t items_per_chunk(int64_t elements_per_item, int64_t elements = 4096) {
  return std::max<int64_t>(1, elements / std::max<int64_t>(1, elements_per_item));
}

// body(begin, end) for consecutive ranges of [0, items).
template <class Body>
void for_ranges(Workers& workers, int64_t items, int64_t per_chunk, Body&& body) {
  workers.parallel_for(chunk_count(items, per_chunk), [&](int64_t chunk, Scratch&) {
    body(chunk * per_chunk, std::min(items, (chunk + 1) * per_chunk));
  });
}

}  // namespace cambium::reference
