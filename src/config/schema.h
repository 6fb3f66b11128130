// The key table: one row per configuration key, from which come the parser, `config schema`, the
// nearest-name errors, the resolved file and the comparison on resume. To add a key: one field in
// config.h and one row in schema.cc.
#pragma once

#include <span>
#include <string>
#include <variant>

#include "src/config/config.h"

namespace cambium {

// An enum field seen as an index into its row's choices.
struct ChoiceField {
  void* target;
  int (*get)(const void* target);
  void (*set)(void* target, int index);
};

// Where a key's value lives in a Config. The alternative fixes the key's type.
using KeyField = std::variant<int64_t*, uint64_t*, double*, bool*, std::string*,
                              std::vector<std::string>*, std::vector<int64_t>*, ChoiceField>;

enum class RangeEnds { closed, open_above };

// Allowed numbers: minimum <= value <= maximum, or < maximum with `open_above`.
struct KeyRange {
  double minimum = 0.0;
  double maximum = 0.0;
  RangeEnds ends = RangeEnds::closed;
};

enum class ResumeRule { same, may_differ };

struct KeySpec {
  const char* section;
  const char* name;
  KeyField (*field)(Config& config, size_t element);  // element: which of [[faults]]; else 0
  KeyRange range;                                     // of numbers
  std::span<const char* const> choices;               // of texts and enums; empty = free text
  ResumeRule resume;
  const char* default_note;  // the default in words where it depends on other keys; else nullptr
  const char* meaning;
  std::string key() const { return std::string(section) + "." + name; }
};

// All rows, grouped by section, in the order in which resolved files and the schema list them.
std::span<const KeySpec> key_specs();

// The row of "section.name"; nullptr when there is none.
const KeySpec* find_key(std::string_view section, std::string_view name);

// One line on a section, for the schema and the heads of resolved files.
struct SectionSpec {
  const char* name;
  const char* meaning;
};
std::span<const SectionSpec> section_specs();

// "integer", "number", "boolean", "text", "list of texts", "list of integers" or "choice".
const char* type_name(const KeySpec& spec);
// "1 .. 1000", "[0, 1)", "a | b"; empty where anything goes.
std::string range_text(const KeySpec& spec);
// A value as TOML spells it; doubles in the shortest form that reads back to the same bits.
std::string value_toml(const KeySpec& spec, const KeyField& field);
// Why a value cannot stand in a Config ("1000 is above the largest allowed, 10"); empty when it
// can.
std::string range_problem(const KeySpec& spec, double value);

}  // namespace cambium
