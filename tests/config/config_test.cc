// Parsing: every key against wrong types, ranges and choices; --set; suggestions; round trips.
#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "fmt/format.h"
#include "gtest/gtest.h"
#include "src/base/error.h"
#include "src/config/nearest.h"
#include "src/config/presets.h"
#include "src/config/schema.h"

namespace cambium {
namespace {

constexpr const char* kTiny = "[model]\npreset = \"tiny\"\n";

// The message of the usage error that parsing gives; empty when it succeeds.
std::string refusal(const std::string& text, std::vector<std::string> sets = {}) {
  try {
    parse_config(text, "some.toml", sets);
  } catch (const Error& error) {
    EXPECT_EQ(error.exit_code(), ExitCode::usage) << error.what();
    return error.what();
  }
  return "";
}

testing::AssertionResult mentions(const std::string& message, const std::string& part) {
  if (message.find(part) != std::string::npos) return testing::AssertionSuccess();
  return testing::AssertionFailure() << "'" << message << "' lacks '" << part << "'";
}

bool is_number_type(const KeySpec& spec) {
  const std::string type = type_name(spec);
  return type == "integer" || type == "number";
}

// A --set text for the key; [[faults]] keys need the list form.
std::string set_text(const KeySpec& spec, const std::string& value) {
  if (std::string_view(spec.section) != "faults") return spec.key() + "=" + value;
  const std::string kind = std::string_view(spec.name) == "kind" ? "" : ", kind=\"rng_rank\"";
  return fmt::format("faults=[{{{}={}{}}}]", spec.name, value, kind);
}

TEST(ConfigFile, ReadsEverySection) {
  const Config config = parse_config(
      "[model]\npreset = \"quickstart\"\nlayers = 3\n[train]\nsteps = 7\n[optimizer]\nlr = 1\n"
      "[parallel]\nschedule = \"1f1b\"\nsharding = \"none\"\n[data]\ntrain = \"a.txt\"\n"
      "[[faults]]\nkind = \"rng_rank\"\nrank = 3\n[[faults]]\nkind = \"wrong_count\"\n",
      "runs/my.test.toml", {});
  EXPECT_EQ(config.name, "my.test");
  EXPECT_EQ(config.model.preset, "quickstart");
  EXPECT_EQ(config.model.layers, 3);
  EXPECT_EQ(config.model.hidden, 128);
  EXPECT_EQ(config.train.steps, 7);
  EXPECT_EQ(config.optimizer.lr, 1.0);
  EXPECT_EQ(config.parallel.schedule, PipelineSchedule::one_f_one_b);
  EXPECT_EQ(config.parallel.sharding, Sharding::none);
  EXPECT_EQ(config.data.train, std::vector<std::string>{"a.txt"});
  ASSERT_EQ(config.faults.size(), 2u);
  EXPECT_EQ(config.faults[0].kind, "rng_rank");
  EXPECT_EQ(config.faults[0].rank, 3);
  EXPECT_EQ(config.faults[1].kind, "wrong_count");
}

TEST(ConfigFile, BrokenTomlNamesTheLine) {
  EXPECT_TRUE(mentions(refusal("[train\nsteps = 3\n"), "some.toml:1:"));
  EXPECT_TRUE(mentions(refusal("[train]\nsteps = 3\nsteps = 4\n"), "some.toml:3:"));
  EXPECT_TRUE(mentions(refusal("[train]\n[train]\n"), "some.toml:2:"));
  EXPECT_TRUE(mentions(refusal("[train]\nsteps = \n"), "some.toml:2:"));
  EXPECT_TRUE(mentions(refusal("[train]\nsteps = 99999999999999999999\n"), "some.toml:2:"));
  EXPECT_TRUE(mentions(refusal(std::string("[train]\nname = \"\xff\xfe\"\n")), "some.toml:2:"));
  EXPECT_NE(refusal("x = " + std::string(100000, '[')), "");
}

TEST(ConfigFile, MissingFileAndDirectory) {
  for (const std::string& path : {std::string("nosuch.toml"), std::string("/")}) {
    try {
      load_config(path, {});
      FAIL() << path;
    } catch (const Error& error) {
      EXPECT_EQ(error.exit_code(), ExitCode::usage);
      EXPECT_TRUE(mentions(error.what(), path));
    }
  }
}

TEST(ConfigFile, UnknownNamesAreAnsweredWithTheNearest) {
  const std::string tiny = kTiny;
  EXPECT_TRUE(mentions(refusal(tiny + "[train]\nstepz = 3\n"),
                       "some.toml:4:1: unknown key train.stepz; did you mean train.steps?"));
  EXPECT_TRUE(mentions(refusal(tiny + "[trian]\nsteps = 3\n"), "some.toml:3:"));
  EXPECT_TRUE(mentions(refusal(tiny + "[trian]\nsteps = 3\n"), "did you mean train?"));
  EXPECT_TRUE(mentions(refusal(tiny + "[train]\nlr = 1.0\n"), "did you mean optimizer.lr?"));
  EXPECT_TRUE(mentions(refusal(tiny + "steps = 3\n"), "did you mean train.steps?"));
  EXPECT_TRUE(mentions(refusal("steps = 3\n" + tiny), "did you mean train.steps?"));
  EXPECT_TRUE(mentions(refusal(tiny + "[parallel]\nsharding = \"zero\"\n"),
                       "some.toml:4:12: parallel.sharding"));
  EXPECT_TRUE(
      mentions(refusal(tiny + "[parallel]\nsharding = \"zreo1\"\n"), "did you mean zero1?"));
  EXPECT_TRUE(mentions(refusal("[model]\npreset = \"quikstart\"\n"), "did you mean quickstart?"));
  EXPECT_TRUE(mentions(refusal(tiny + "[[faults]]\nkind = \"rng\"\n"), "faults.kind"));
  EXPECT_TRUE(mentions(refusal(tiny + "[[faults]]\nrank = 1\n"), "faults.kind is missing"));
  EXPECT_TRUE(mentions(refusal(tiny, {"paralel.dp=2"}), "did you mean parallel?"));
  EXPECT_TRUE(mentions(refusal(tiny, {"parallel.dpp=2"}), "did you mean parallel.dp?"));
  EXPECT_TRUE(mentions(refusal(tiny, {"parallel.dp.x=2"}), "parallel.dp"));
  EXPECT_TRUE(mentions(refusal(tiny + "[zzzzzzzzz]\n"), "there are: model, data, train"));
}

TEST(ConfigFile, ReportsAllMistakesInFileOrder) {
  const std::string message =
      refusal("[optimizer]\nlr = true\n[data]\ntrain = 3\n[model]\nhidden = 0\n");
  const size_t lr = message.find("some.toml:2:6: optimizer.lr");
  const size_t train = message.find("some.toml:4:9: data.train");
  const size_t hidden = message.find("some.toml:6:10: model.hidden");
  EXPECT_LT(lr, train) << message;
  EXPECT_LT(train, hidden) << message;
  EXPECT_NE(hidden, std::string::npos) << message;
}

TEST(ConfigKeys, WrongTypesAreRefusedForEveryKey) {
  for (const KeySpec& spec : key_specs()) {
    const std::string type = type_name(spec);
    std::vector<std::string> wrong = {"{a=1}", "[[1]]", "1979-05-27"};
    if (type != "list of texts") wrong.emplace_back("[\"x\"]");
    if (is_number_type(spec) || type == "boolean") wrong.emplace_back("fast");
    if (type == "integer") wrong.insert(wrong.end(), {"1.5", "true", "2.0"});
    if (type == "number") wrong.emplace_back("true");
    if (type == "boolean") wrong.insert(wrong.end(), {"1", "yes"});
    if (type == "choice") wrong.insert(wrong.end(), {"no-such-choice", "7"});
    for (const std::string& value : wrong) {
      const bool is_text = type == "text" || type == "list of texts";
      if (is_text && value == "1979-05-27") continue;  // a --set text may be anything
      if (std::string_view(spec.section) == "faults" && value == "no-such-choice") continue;
      if (std::string_view(spec.section) == "faults" && (value == "fast" || value == "yes"))
        continue;
      const std::string message = refusal(kTiny, {set_text(spec, value)});
      EXPECT_TRUE(mentions(message, spec.key())) << value;
    }
  }
}

TEST(ConfigKeys, NumbersOutsideTheirRangeAreRefusedForEveryKey) {
  for (const KeySpec& spec : key_specs()) {
    if (!is_number_type(spec)) continue;
    const bool whole = std::string(type_name(spec)) == "integer";
    std::vector<std::string> wrong = {"-1", "99999999999999999999", "-99999999999999999999"};
    if (spec.range.minimum > 0) wrong.emplace_back("0");
    if (!whole) wrong.insert(wrong.end(), {"-1e-3", "1e300", "nan", "-nan", "inf", "-inf", "+inf"});
    if (whole) wrong.insert(wrong.end(), {"nan", "inf"});
    if (spec.range.maximum < 9e18) {
      wrong.push_back(fmt::format("{:.0f}", std::floor(spec.range.maximum) + 1));
    }
    if (spec.range.ends == RangeEnds::open_above) {
      wrong.push_back(fmt::format("{:.1f}", spec.range.maximum));
    }
    for (const std::string& value : wrong) {
      EXPECT_TRUE(mentions(
          refusal(kTiny, {set_text(spec, value)}),
          std::string_view(spec.section) == "faults" && value.size() > 19 ? "faults" : spec.key()))
          << spec.key() << " " << value;
    }
  }
}

TEST(ConfigKeys, BoundsThemselvesAreAccepted) {
  for (const KeySpec& spec : key_specs()) {
    if (!is_number_type(spec)) continue;
    EXPECT_EQ(refusal(kTiny, {set_text(spec, fmt::format("{}", std::ceil(spec.range.minimum)))}),
              "");
    if (spec.range.ends == RangeEnds::open_above || spec.range.maximum > 9e18) continue;
    EXPECT_EQ(
        refusal(kTiny, {set_text(spec, fmt::format("{:.0f}", std::floor(spec.range.maximum)))}),
        spec.range.maximum < 1 ? "" : "");
  }
}

TEST(ConfigKeys, EveryKeyIsNamedOnce) {
  std::vector<std::string> keys;
  for (const KeySpec& spec : key_specs()) {
    EXPECT_EQ(std::count(keys.begin(), keys.end(), spec.key()), 0) << spec.key();
    keys.push_back(spec.key());
    EXPECT_EQ(find_key(spec.section, spec.name), &spec);
    EXPECT_GT(std::strlen(spec.meaning), 3u) << spec.key();
    EXPECT_TRUE(mentions(schema_text(), spec.key()));
    EXPECT_TRUE(mentions(schema_json(), "\"" + spec.key() + "\""));
  }
}

TEST(ConfigSet, LaterWinsAndTextIsText) {
  const std::vector<std::string> sets = {"train.steps=3",
                                         "train.steps=5",
                                         "run.out=2024",
                                         "optimizer.name=adamw",
                                         "optimizer.lr=1e-4",
                                         "data.train=[\"a\", \"b\"]",
                                         "run.name=x y = z",
                                         "numerics.reduction=\"fast\"",
                                         "logging.tensorboard=false"};
  const Config config = parse_config(kTiny, "some.toml", sets);
  EXPECT_EQ(config.train.steps, 5);
  EXPECT_EQ(config.run.out, "2024");
  EXPECT_EQ(config.optimizer.lr, 1e-4);
  EXPECT_EQ(config.data.train, (std::vector<std::string>{"a", "b"}));
  EXPECT_EQ(config.name, "x y = z");
  EXPECT_EQ(config.numerics.reduction, ReductionMode::fast);
  EXPECT_FALSE(config.logging.tensorboard);
}

TEST(ConfigSet, MalformedTextsAreRefused) {
  EXPECT_TRUE(mentions(refusal(kTiny, {"train.steps"}), "--set train.steps"));
  EXPECT_TRUE(mentions(refusal(kTiny, {"=3"}), "--set"));
  EXPECT_TRUE(mentions(refusal(kTiny, {""}), "--set"));
  EXPECT_TRUE(mentions(refusal(kTiny, {"train=3"}), "not a section"));
  EXPECT_TRUE(mentions(refusal(kTiny, {"train.steps=3\ndata=4"}), "train.steps"));
  EXPECT_TRUE(mentions(refusal(kTiny, {"faults.kind=rng_rank"}), "faults is a list"));
  EXPECT_TRUE(mentions(refusal(kTiny, {"train.steps="}), "train.steps"));
  EXPECT_TRUE(mentions(refusal(kTiny, {".=1"}), "unknown section"));
}

TEST(ConfigModel, PresetInlinePathAndOverrides) {
  for (const char* name : preset_names()) {
    const Config config = parse_config(fmt::format("model = \"{}\"\n", name), "x.toml", {});
    EXPECT_EQ(config.model.preset, name);
    EXPECT_GT(config.model.layers, 0);
  }
  const std::string inline_model =
      "[model]\nlayers = 2\nhidden = 64\nheads = 4\nexperts = 4\ntop_k = 2\nexpert_hidden = 32\n"
      "vocab = 300\n";
  const Config config = parse_config(inline_model, "x.toml", {});
  EXPECT_EQ(config.model.kv_heads, 4);
  EXPECT_EQ(config.model.head_dim, 16);
  EXPECT_EQ(config.model.qk_norm, QkNorm::per_head);
  const Config olmoe = parse_config(inline_model + "family = \"olmoe\"\n", "x.toml", {});
  EXPECT_EQ(olmoe.model.qk_norm, QkNorm::full_width);
  EXPECT_FALSE(olmoe.model.normalize_top_k);
  EXPECT_TRUE(mentions(refusal("[train]\nsteps = 3\n"), "model.layers"));
  EXPECT_TRUE(mentions(refusal("[model]\npreset = \"tiny\"\npath = \"x\"\n"), "not both"));
  // Another model by --set takes the place of the file's, dimensions included.
  const Config other = parse_config(
      inline_model, "x.toml", std::vector<std::string>{"model.preset=tiny", "model.layers=5"});
  EXPECT_EQ(other.model.hidden, 32);
  EXPECT_EQ(other.model.layers, 5);
}

TEST(ConfigModel, ReductionFollowsTheDeviceUnlessGiven) {
  EXPECT_EQ(parse_config(kTiny, "x", {}).numerics.reduction, ReductionMode::exact);
  const std::vector<std::string> cuda = {"run.device=cuda"};
  EXPECT_EQ(parse_config(kTiny, "x", cuda).numerics.reduction, ReductionMode::fast);
  EXPECT_EQ(parse_config(kTiny, "x", cuda).numerics.compute, ComputeType::bf16);
  const std::vector<std::string> both = {"run.device=cuda", "numerics.reduction=exact"};
  EXPECT_EQ(parse_config(kTiny, "x", both).numerics.reduction, ReductionMode::exact);
}

// A random value of the key's type and range, as TOML.
std::string random_value(const KeySpec& spec, std::mt19937_64& generator) {
  const std::string type = type_name(spec);
  const auto pick = [&](uint64_t count) { return generator() % count; };
  if (type == "choice") return fmt::format("\"{}\"", spec.choices[pick(spec.choices.size())]);
  if (type == "boolean") return pick(2) == 0 ? "true" : "false";
  if (type == "text") return pick(2) == 0 ? "\"a \\\"b\\\" \\\\ \\u00e9\\n\\t\"" : "'x'";
  if (type == "list of integers") return pick(2) == 0 ? "[]" : "[3, 1]";
  if (type == "list of texts") return pick(2) == 0 ? "[]" : "[\"a.txt\", 'b \"c\"']";
  const double fraction = static_cast<double>(generator() >> 11) * 0x1p-53;
  const double span = std::min(spec.range.maximum, 9e15) - spec.range.minimum;
  const double value = spec.range.minimum + fraction * span;
  if (type == "integer") return fmt::format("{:.0f}", std::floor(value));
  return fmt::format("{:.17g}", std::pow(fraction, 8) * span + spec.range.minimum) +
         (value == std::floor(value) ? "" : "");
}

TEST(ConfigResolved, RandomConfigsRoundTrip) {
  std::mt19937_64 generator(7);
  for (int round = 0; round < 200; ++round) {
    std::vector<std::string> sets;
    for (const KeySpec& spec : key_specs()) {
      const std::string_view section = spec.section;
      const bool base = section == "model" && spec.resume == ResumeRule::may_differ;
      if (section == "faults" || base || generator() % 2 == 0) continue;
      sets.push_back(spec.key() + "=" + random_value(spec, generator));
    }
    if (round % 3 == 0) sets.emplace_back("faults=[{kind='rng_rank',rank=2},{kind='wrong_count'}]");
    const Config config = parse_config(kTiny, "first.toml", sets);
    const std::string text = resolved_toml(config);
    const Config again = parse_config(text, "config.resolved.toml", {});
    EXPECT_EQ(resolved_toml(again), text);
    EXPECT_EQ(again.name, config.name);
    EXPECT_EQ(std::memcmp(&again.optimizer.lr, &config.optimizer.lr, sizeof(double)), 0);
    EXPECT_EQ(std::memcmp(&again.model.rope_theta, &config.model.rope_theta, sizeof(double)), 0);
    EXPECT_TRUE(resume_differences(config, again).empty());
  }
}

TEST(ConfigResume, NamesWhatMayNotDiffer) {
  const Config saved = parse_config(kTiny, "a.toml", {});
  const auto differences = [&](const std::string& set) {
    return resume_differences(saved, parse_config(kTiny, "b.toml", std::vector<std::string>{set}));
  };
  for (const KeySpec& spec : key_specs()) {
    const std::string_view section = spec.section;
    const bool free_section = section == "parallel" || section == "run" ||
                              section == "checkpoint" || section == "logging" ||
                              section == "recompute" || section == "faults";
    const bool free_key = spec.key() == "train.steps" ||
                          spec.key() == "train.micro_batch_sequences" ||
                          spec.key() == "model.preset" || spec.key() == "model.path";
    EXPECT_EQ(spec.resume == ResumeRule::may_differ, free_section || free_key) << spec.key();
  }
  EXPECT_TRUE(differences("parallel.dp=4").empty());
  EXPECT_TRUE(differences("train.steps=400").empty());
  ASSERT_EQ(differences("optimizer.lr=0.5").size(), 1u);
  EXPECT_TRUE(mentions(differences("optimizer.lr=0.5")[0], "optimizer.lr = 0.001, now 0.5"));
  EXPECT_TRUE(mentions(differences("model.layers=3")[0], "model.layers"));
  EXPECT_TRUE(mentions(differences("train.sequence_length=64")[0], "train.sequence_length"));
  EXPECT_TRUE(differences("faults=[{kind=\"rng_rank\"}]").empty());  // go on without it
}

TEST(NearestName, CountsSwapsAsOne) {
  EXPECT_EQ(edit_distance("", ""), 0);
  EXPECT_EQ(edit_distance("abc", ""), 3);
  EXPECT_EQ(edit_distance("trian", "train"), 1);
  EXPECT_EQ(edit_distance("kitten", "sitting"), 3);
  const std::vector<std::string> names = {"train", "tokenizer"};
  EXPECT_EQ(nearest_name("trian", names), "train");
  EXPECT_EQ(nearest_name("TRAIN", names), "train");
  EXPECT_EQ(nearest_name("quux", names), "");
  EXPECT_EQ(nearest_name(std::string(100000, 'x'), names), "");
}

}  // namespace
}  // namespace cambium
