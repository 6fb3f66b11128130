#include "src/checkpoint/strict_json.h"

#include <vector>

#include "nlohmann/json.hpp"
#include "src/base/error.h"

namespace cambium {
namespace {

using nlohmann::json;

// Builds the document from the parser's events and checks each as it comes.
// NOTE: json::parse with a callback does not serve: its time is quadratic in an object's keys.
class StrictBuilder {
 public:
  explicit StrictBuilder(const std::string& where) : where_(where) {}
  json take() { return std::move(root_); }

  bool null() { return add(nullptr); }
  template <class Boolean>
  bool boolean(Boolean value) {
    return add(value);
  }
  bool number_integer(json::number_integer_t value) { return add(value); }
  bool number_unsigned(json::number_unsigned_t value) { return add(value); }
  bool number_float(json::number_float_t value, const std::string&) { return add(value); }
  bool string(std::string& value) { return add(std::move(value)); }
  bool binary(json::binary_t&) { return false; }  // not in JSON text

  bool start_object(size_t) { return open(json::object()); }
  bool start_array(size_t) { return open(json::array()); }
  bool end_object() { return close(); }
  bool end_array() { return close(); }
  bool key(std::string& value) {
    if (open_.back()->contains(value)) {
      fail(ExitCode::corrupt_file, "'{}': key '{}' appears twice in one JSON object", where_,
           value);
    }
    key_ = std::move(value);
    return true;
  }
  bool parse_error(size_t position, const std::string&, const json::exception&) {
    // The library's message quotes the input, which may hold anything; the position suffices.
    fail(ExitCode::corrupt_file, "'{}': broken JSON at byte {}", where_, position);
  }

 private:
  template <class Value>
  bool add(Value&& value) {
    place(json(std::forward<Value>(value)));
    return true;
  }
  json* place(json value) {
    if (open_.empty()) return &(root_ = std::move(value));
    json& parent = *open_.back();
    if (parent.is_object()) return &(parent[key_] = std::move(value));
    parent.push_back(std::move(value));
    return &parent.back();
  }
  bool open(json empty) {
    if (open_.size() >= size_t{kMostJsonDepth}) {
      fail(ExitCode::corrupt_file, "'{}': JSON nested deeper than {}", where_, kMostJsonDepth);
    }
    open_.push_back(place(std::move(empty)));
    return true;
  }
  bool close() {
    open_.pop_back();
    return true;
  }

  const std::string& where_;
  json root_;
  std::vector<json*> open_;  // a parent does not move while a child of it is open
  std::string key_;
};

}  // namespace

json parse_strict_json(std::string_view text, const std::string& where) {
  StrictBuilder builder(where);
  if (!json::sax_parse(text.begin(), text.end(), &builder)) {
    fail(ExitCode::corrupt_file, "'{}': broken JSON", where);
  }
  return builder.take();
}

}  // namespace cambium
