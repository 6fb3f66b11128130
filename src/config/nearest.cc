// Damerau-Levenshtein distance over three rows of the classic table.
#include "src/config/nearest.h"

#include <algorithm>
#include <vector>

namespace cambium {

int edit_distance(std::string_view left, std::string_view right) {
  const size_t columns = right.size() + 1;
  std::vector<int> before(columns), previous(columns), current(columns);
  for (size_t j = 0; j < columns; ++j) previous[j] = static_cast<int>(j);
  for (size_t i = 1; i <= left.size(); ++i) {
    current[0] = static_cast<int>(i);
    for (size_t j = 1; j < columns; ++j) {
      const int substitution = previous[j - 1] + (left[i - 1] == right[j - 1] ? 0 : 1);
      current[j] = std::min({previous[j] + 1, current[j - 1] + 1, substitution});
      const bool swapped =
          i > 1 && j > 1 && left[i - 1] == right[j - 2] && left[i - 2] == right[j - 1];
      if (swapped) current[j] = std::min(current[j], before[j - 2] + 1);
    }
    before.swap(previous);
    previous.swap(current);
  }
  return previous[columns - 1];
}

std::string nearest_name(std::string_view word, std::span<const std::string> candidates) {
  const auto lowered = [](std::string_view text) {
    std::string result(text);
    for (char& letter : result) {
      if (letter >= 'A' && letter <= 'Z') letter = static_cast<char>(letter - 'A' + 'a');
    }
    return result;
  };
  constexpr size_t kLongestWord = 200;  // bounds the quadratic cost on hostile input
  if (word.size() > kLongestWord) return "";
  const auto shared_start = [](std::string_view left, std::string_view right) {
    return std::mismatch(left.begin(), left.end(), right.begin(), right.end()).first - left.begin();
  };
  std::string best;
  int best_distance = 0;
  for (const std::string& candidate : candidates) {
    const int distance = edit_distance(lowered(word), lowered(candidate));
    const int longer = static_cast<int>(std::max(word.size(), candidate.size()));
    if (distance > std::max(2, longer / 3) || distance >= longer) continue;
    const bool nearer =
        distance < best_distance ||
        (distance == best_distance && shared_start(word, candidate) > shared_start(word, best));
    if (best.empty() || nearer) {
      best = candidate;
      best_distance = distance;
    }
  }
  return best;
}

std::string joined_names(std::span<const std::string> names, std::string_view separator) {
  std::string text;
  for (const std::string& name : names) {
    if (!text.empty()) text += separator;
    text += name;
  }
  return text;
}

}  // namespace cambium
