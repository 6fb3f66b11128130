// Something that holds canonical tensors: a checkpoint, a Hugging Face directory, a model.
#pragma once

#include <cstdint>
#include <span>
#include <string>

namespace cambium {

class TensorSource {
 public:
  virtual ~TensorSource() = default;
  // Elements [first, first + values.size()) of canonical tensor `name`.
  virtual void read(const std::string& name, int64_t first, std::span<float> values) = 0;
};

}  // namespace cambium
