// Nearest names: the suggestion in "unknown key train.stepz; did you mean train.steps?".
#pragma once

#include <span>
#include <string>
#include <string_view>

namespace cambium {

// Damerau-Levenshtein distance (optimal string alignment): insertions, deletions, substitutions
// and swaps of neighbours, each counting one. O(|left| * |right|) time.
int edit_distance(std::string_view left, std::string_view right);

// The candidate with the least distance from `word`, case aside; of equals the one that starts
// like it, else the first. Empty when none is near: when more than a third of the longer word's
// letters, and more than two, would change.
std::string nearest_name(std::string_view word, std::span<const std::string> candidates);

// "a, b, c", with `separator` between the names.
std::string joined_names(std::span<const std::string> names, std::string_view separator);

}  // namespace cambium
