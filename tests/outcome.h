// What an expression ended with, for tests of errors.
#pragma once

#include <string>

#include "src/base/error.h"

namespace cambium {

struct Outcome {
  int code = 0;  // an exit code; 0 = no error
  std::string message;
};

// Runs `body`; an Error becomes its exit code and message.
template <class Body>
Outcome outcome_of(Body&& body) {
  try {
    body();
  } catch (const Error& error) {
    return {static_cast<int>(error.exit_code()), error.what()};
  }
  return {};
}

}  // namespace cambium
