// The table of wrong inputs: what a user may do wrong, the exit code, and what the message names.
//
// To add a row: arguments (separated by blanks; $Q is the quickstart configuration, $S the
// tiny one on a small corpus of its own, $A cuDNN's attention in fast mode, $T the scratch
// directory that make_files() fills), the exit code of design.md section 4, and a pattern that the
// message must match, whatever the case.
#include <fstream>
#include <regex>
#include <set>
#include <sstream>

#include "gtest/gtest.h"
#include "tests/cli/run_binary.h"

namespace cambium {
namespace {

struct WrongInput {
  const char* arguments;
  int exit_code;
  const char* pattern;
};

// Corpora, tokenizers, token files and goldens that hold something else.
void make_data_files(const ScratchDirectory& scratch) {
  std::string garbage(3000, '\0');
  for (size_t index = 0; index < garbage.size(); ++index) {
    garbage[index] = static_cast<char>(index * 2654435761u >> 7);
  }
  scratch.write("garbage.h5", garbage);
  scratch.write("garbage.model", garbage);
  scratch.write("garbage_golden/golden.json", "{\"loss\": ");
  scratch.write("empty.txt", "");
  scratch.write("bad.jsonl", "{\"text\": \"a\"}\n{\"txt\": 1}\n");
  scratch.write("torn.jsonl", "{\"text\": \"a\"}\n{\"text\": ");
  scratch.write("not_zstd.jsonl.zst", garbage);
  std::string text;
  for (int line = 0; line < 500; ++line) text += "It is a truth universally acknowledged.\n";
  scratch.write("novel.txt", text);
  scratch.write("used/notes.txt", "somebody's file");
}

void make_files(const ScratchDirectory& scratch) {
  scratch.write("bad.toml", "[train\nsteps = 3\n");
  scratch.write("twice.toml", "model = \"tiny\"\n[train]\nsteps = 3\nsteps = 4\n");
  scratch.write("empty.toml", "");
  scratch.write("binary.toml", std::string("\x89PNG\r\n\x1a\n\0\0\0", 11));
  scratch.write("bom.toml", "\xef\xbb\xbfmodel = \"tiny\"\n[train]\nstepz = 1\n");
  scratch.write("huge.toml", std::string(3 << 20, '#'));
  scratch.write("deep.toml", "x = " + std::string(50000, '['));
  scratch.write("unknown.toml", "model = \"tiny\"\n[train]\nsteps = 3\nsetps = 4\n");
  scratch.write("section.toml", "model = \"tiny\"\n\n[optimiser]\nlr = 0.1\n");
  scratch.write("type.toml", "model = \"tiny\"\n[train]\nsteps = \"many\"\n");
  scratch.write("range.toml", "model = \"tiny\"\n[optimizer]\nbeta1 = 1.0\n");
  scratch.write("nan.toml", "model = \"tiny\"\n[optimizer]\nlr = nan\n");
  scratch.write("fault.toml", "model = \"tiny\"\n[[faults]]\nkind = \"rng\"\n");
  scratch.write("dimensions.toml", "[model]\nlayers = 2\nhidden = 64\n");
  scratch.write("no_model.toml", "[train]\nsteps = 3\n");
  scratch.write("hf/config.json", "{\"model_type\": \"bert\"}");
  scratch.write("broken_hf/config.json", "{\"model_type\": ");
  make_data_files(scratch);
  const std::string device =
      "name = \"m\"\n[device]\nkind = \"cpu\"\ncompute = \"fp32\"\nmemory = ";
  scratch.write("no_source.toml", device + "{ value = \"4 GB\" }\n");
  scratch.write("wrong_unit.toml", device + "{ value = \"4 GB/s\", source = \"x\" }\n");
  scratch.write("no_unit.toml", device + "4\n");
  std::stringstream machine_text;
  machine_text << std::ifstream("sim/machines/laptop.toml").rdbuf();
  const std::string machine = machine_text.str();
  scratch.write("bad_curve.toml", machine + "\n[[collective]]\nkind = \"broadcast\"\n");
  scratch.write("no_op.toml", machine.substr(0, machine.find("[[op]]")));
}

const WrongInput kWrongInputs[] = {
    // Commands and flags.
    {"", 2, "train, check"},
    {"trian", 2, "'trian'.*did you mean train\\?"},
    {"chekpoint verify x", 2, "did you mean checkpoint"},
    {"zzzzzzzz", 2, "there are: train"},
    {"--josn", 2, "unknown command '--josn'"},
    {"data", 2, "build, inspect"},
    {"data bild x", 2, "did you mean data build"},
    {"checkpoint export", 2, "export-hf"},
    {"tokenizer", 2, "train, inspect"},
    {"config", 2, "show, schema"},
    {"train", 2, "CONFIG is required"},
    {"train $Q --stop-after-stpe 3", 2, "--stop-after-stpe.*--stop-after-step"},
    {"train $Q --stop-after-step", 2, "stop-after-step"},
    {"train $Q --stop-after-step -1", 2, "stop-after-step.*-1"},
    {"train $Q --stop-after-step 0", 2, "stop-after-step"},
    {"train $Q --stop-after-step three", 2, "stop-after-step.*three"},
    {"train $Q --trace-steps 3", 2, "--trace-steps.*--trace-routing"},
    {"train $Q --trace-routing t.h5 --trace-steps 0", 2, "--trace-steps"},
    {"train $S --out $T/traced --trace-routing $T/novel.txt/t.h5", 31, "novel\\.txt"},
    {"train $Q --profile 0", 2, "--profile"},
    {"train $Q --profile 3", 2, "run.device = cpu; next: run.device = cuda"},
    {"train $Q --resmue", 2, "did you mean --resume"},
    {"train $Q --ouput x", 2, "unknown flag --ouput"},
    {"train $Q extra.toml", 2, "unexpected argument 'extra.toml'"},
    {"train $Q --set", 2, "--set"},
    {"train $Q --resume=maybe", 2, "resume"},
    {"check $Q --seeds 0", 2, "--seeds"},
    {"check $Q --seed 3", 2, "did you mean --seeds"},
    {"generate", 2, "MODEL is required"},
    {"generate x --temperature -1", 2, "--temperature"},
    {"generate x --temperature nan", 2, "--temperature"},
    {"eval", 2, "MODEL is required"},
    {"eval x --sequences -5", 2, "--sequences"},
    {"parity", 2, "DIR is required"},
    {"parity x --device tpu", 2, "--device.*tpu"},
    {"compare x", 2, "RUN_B is required"},
    {"compare $T/nosuch $T/nosuch", 2, "nosuch"},
    {"report $T/nosuch", 2, "nosuch"},
    {"report", 2, "RUN is required"},
    {"checkpoint import-hf x", 2, "OUT is required"},
    {"checkpoint export-hf x y --storage fp8", 2, "fp8"},
    {"data build", 2, "required"},
    {"data build x", 2, "--out is required"},
    {"tokenizer train x --out y --vocab 0", 2, "--vocab"},
    // Configuration files.
    {"train nosuch.toml", 2, "nosuch\\.toml"},
    {"train $T", 2, "is a directory"},
    {"train $T/bad.toml", 2, "bad\\.toml:1:"},
    {"train $T/twice.toml", 2, "twice\\.toml:4:"},
    {"train $T/empty.toml", 2, "model"},
    {"train $T/binary.toml", 2, "binary\\.toml:1:"},
    {"train $T/bom.toml", 2, "bom\\.toml:3:.*train\\.steps"},
    {"train $T/huge.toml", 2, "huge\\.toml: larger"},
    {"train $T/deep.toml", 2, "deep\\.toml:1:"},
    {"check $T/unknown.toml", 2, "unknown\\.toml:4:1: unknown key train\\.setps.*train\\.steps"},
    {"train $T/section.toml", 2, "section\\.toml:3:.*optimiser.*optimizer"},
    {"train $T/type.toml", 2, "type\\.toml:3:9: train\\.steps.*integer"},
    {"train $T/range.toml", 2, "range\\.toml:3:9: optimizer\\.beta1.*below 1"},
    {"train $T/nan.toml", 2, "nan\\.toml:3:6: optimizer\\.lr.*finite"},
    {"train $T/fault.toml", 2, "faults\\.kind.*rng_rank"},
    {"train $T/dimensions.toml", 2, "model\\.heads"},
    {"train $T/no_model.toml", 2, "model\\.layers"},
    {"config show $T/no_model.toml", 2, "preset"},
    // --set.
    {"train $Q --set train.steps", 2, "--set section\\.key=value"},
    {"train $Q --set =3", 2, "--set"},
    {"train $Q --set paralel.dp=2", 2, "did you mean parallel"},
    {"train $Q --set parallel.dpp=2", 2, "did you mean parallel\\.dp"},
    {"train $Q --set train.lr=1", 2, "did you mean optimizer\\.lr"},
    {"train $Q --set steps=4", 2, "did you mean train\\.steps"},
    {"train $Q --set optimizer.lr=fast", 2, "optimizer\\.lr"},
    {"train $Q --set optimizer.lr=nan", 2, "optimizer\\.lr"},
    {"train $Q --set optimizer.lr=-inf", 2, "optimizer\\.lr"},
    {"train $Q --set optimizer.lr=1e999", 2, "optimizer\\.lr"},
    {"train $Q --set train.steps=-1", 2, "train\\.steps"},
    {"train $Q --set train.steps=0", 2, "train\\.steps"},
    {"train $Q --set train.steps=2.5", 2, "train\\.steps"},
    {"train $Q --set train.steps=99999999999999999999", 2, "train\\.steps"},
    {"train $Q --set run.seed=-1", 2, "run\\.seed"},
    {"train $Q --set run.device=gpu", 2, "run\\.device.*cpu"},
    {"train $Q --set run.watchdog_s=0", 2, "run\\.watchdog_s"},
    {"train $Q --set run.cuda_graphs=3", 2, "run\\.cuda_graphs"},
    {"train $Q --set run.transport=nccl", 2, "run\\.device = cuda"},
    {"train $Q --set numerics.compute=fp16", 2, "numerics\\.compute.*fp32"},
    {"train $Q --set parallel.context=rings", 2, "did you mean ring"},
    {"train $Q --set parallel.schedule=1f1", 2, "did you mean 1f1b"},
    {"train $Q --set model.preset=quickstrat", 2, "did you mean quickstart"},
    {"train $Q --set model.path=$T/nosuch", 2, "model\\.path"},
    {"train $Q --set model.path=$T/hf", 2, "model\\.path.*bert"},
    {"train $Q --set model.path=$T/broken_hf", 30, "model\\.path.*config\\.json"},
    {"train $Q --set faults.kind=rng_rank", 2, "faults"},
    {"train $Q --set data=none", 2, "data is a text, not a section"},
    // Rules between keys.
    {"train $Q --set parallel.dp=8 --set parallel.ep=3", 2, "parallel\\.ep = 3.*2 or 4"},
    {"train $Q --set parallel.dp=2 --set parallel.ep=4", 2, "parallel\\.ep = 4.*parallel\\.dp"},
    {"train $Q --set parallel.dp=3", 2, "parallel\\."},
    {"train $Q --set train.micro_batch_sequences=3", 2, "train\\.micro_batch_sequences = 3"},
    {"train $Q --set train.sequence_length=100", 2, "train\\.sequence_length = 100.*96 or 128"},
    {"train $Q --set model.dense_layers=[9]", 2, "model\\.dense_layers.*9.*model\\.layers = 4"},
    {"train $Q --set model.dense_layers=[0]", 2, "model\\.dense_hidden"},
    {"train $Q --set model.shared_expert_gate=true", 2, "model\\.shared_expert_hidden"},
    {"train $Q --set model.dense_layers=0", 2, "model\\.dense_layers.*list of integers"},
    {"train $Q --set model.rope_kind=dynamic", 2, "model\\.rope_kind.*default | linear | yarn"},
    {"train $Q --set model.rope_kind=yarn --set model.rope_beta_fast=0.5", 2,
     "model\\.rope_beta_fast = 0\\.5.*model\\.rope_beta_slow = 1"},
    {"train $Q --set model.top_k=9", 2, "model\\.top_k = 9.*model\\.experts = 8"},
    {"train $Q --set model.head_dim=33", 2, "model\\.head_dim = 33"},
    {"train $Q --set model.kv_heads=3", 2, "model\\.kv_heads = 3.*2 or 4"},
    {"train $Q --set balance.routing=evne", 2, "balance\\.routing.*did you mean even"},
    {"train $Q --set balance.routing=replay", 2, "balance\\.routing_file.*--trace-routing"},
    {"train $Q --set balance.routing_file=$T/garbage.h5", 2, "routing_file.*learned"},
    {"train $Q --set balance.routing=replay --set balance.routing_file=$T/nosuch.h5", 31,
     "nosuch\\.h5"},
    {"train $Q --set balance.routing=replay --set balance.routing_file=$T/garbage.h5", 30,
     "garbage\\.h5"},
    {"plan $Q --machine laptop --set plan.routing=$T/garbage.h5", 30, "garbage\\.h5"},
    {"train $Q --set balance.loss=micro_batch", 2, "balance\\.loss.*exact"},
    {"train $Q --set parallel.pp=2 --set parallel.schedule=dualpipev", 2,
     "dualpipev.*4 micro-batches.*there are 1"},
    {"train $Q --set parallel.pp=8", 2, "model\\.layers = 4.*8 stages.*at least 6"},
    {"check $Q --set faults=[{kind='rng_rank',rank=8}]", 2, "faults\\.rank = 8.*8 ranks"},
    {"check $Q --set faults=[{kind='rank_crash',site='world#x'}]", 2,
     "'world#x'.*number of a place"},
    {"check $Q --set faults=[{kind='rank_crash',site='nowhere'}]", 2,
     "no call to strike.*'nowhere'"},
    {"check $Q --set faults=[{kind='rank_crash',probability=2}]", 2,
     "faults\\.probability.*0 \\.\\. 1"},
    {"check $Q --set faults=[{kind='rank_crash',rank=3,probability=0.5}]", 2, "faults\\.rank = 3"},
    {"check $Q --set faults=[{kind='rank_crash',seconds=3}]", 2, "faults\\.seconds = 3"},
    {"check $Q --set faults=[{kind='pause',seconds=0}]", 2, "faults\\.seconds"},
    {"check $Q --set faults=[{kind='torn_write',step=200}]", 2, "`check` makes none"},
    {"train $Q --set faults=[{kind='disk_full',step=200,site='world'}]", 2, "no communicator"},
    {"train $Q --set faults=[{kind='disk_full',step=7}]", 2, "step 7 has none.*every"},
    {"plan $Q --machine laptop --set faults=[{kind='pause'}]", 2, "without \\[\\[faults\\]\\]"},
    {"train $Q --set numerics.fast_order=ring", 2,
     "fast_order = ring.*numerics\\.reduction = fast"},
    {"train $Q --set numerics.fast_order=tree", 2, "fast_order.*rank | ring"},
    {"train $Q --set numerics.attention=flash", 2, "attention.*own | cudnn"},
    {"train $Q --set numerics.attention=cudnn", 2, "run\\.device = cpu.*attention = own"},
    {"train $Q --set numerics.attention=cudnn --set run.device=cuda", 2,
     "reduction = exact.*reduction = fast"},
    {"train $Q $A", 2, "document_mask = true.*document_mask = false"},
    {"train $Q $A --set data.document_mask=false --set model.sliding_window=64", 2,
     "sliding_window = 64.*sliding_window = 0"},
    {"train $Q $A --set data.document_mask=false --set model.head_dim=12", 2,
     "head_dim = 12.*multiple of 8"},
    {"train $Q $A --set data.document_mask=false --set parallel.cp=2 --set parallel.dp=4 --set "
     "train.sequence_length=512 --set model.max_positions=512",
     2, "parallel\\.cp = 2.*parallel\\.cp = 1"},
    {"check $Q --schedule 3", 2, "'3' is no schedule"},
    {"check $Q --schedule 9:1,3:1", 2, "no schedule.*ascending"},
    {"check $Q --schedule fifo:1", 2, "no schedule"},
    {"check $Q --seeds -1", 2, "seeds"},
    {"train $Q --set run.device=cuda", 2, "numerics\\.compute = fp32.*numerics\\.compute = bf16"},
    {"check $Q --set run.device=cuda", 2, "numerics\\.compute = fp32.*numerics\\.compute = bf16"},
    {"eval x --device tpu", 2, "--device.*tpu"},
    // Corpora, tokenizers, directories.
    {"train $S --set data.train=$T/nosuch.txt", 32, "data\\.train.*nosuch\\.txt"},
    {"train $S --set data.train=$T/empty.txt", 32, "empty\\.txt"},
    {"train $S --set data.train=$T/bad.jsonl", 32, "bad\\.jsonl: record 2"},
    {"train $S --set data.train=$T/torn.jsonl", 32, "torn\\.jsonl: record 2"},
    {"train $S --set data.train=$T/not_zstd.jsonl.zst", 32, "not_zstd"},
    {"train $S --set data.train=$T/novel.pdf", 32, "novel\\.pdf.*\\.jsonl"},
    {"train $S --set data.train=$T/garbage.h5", 30, "garbage\\.h5"},
    {"train $S --set data.train=[]", 32, "data\\.train"},
    {"train $S --out $T/used", 33, "used.*--resume"},
    {"train $S --out $T/novel.txt/run", 31, "novel\\.txt/run"},
    {"train $S --set faults=[{kind='rng_rank'}]", 2, "run\\.allow_faults"},
    {"data build $T/nosuch.txt --out $T/o.h5", 32, "nosuch\\.txt"},
    {"data build $T/empty.txt --out $T/o.h5", 32, "empty\\.txt"},
    {"data build $T/novel.txt --out $T/o.h5 --tokenizer $T/nosuch.model", 31, "nosuch\\.model"},
    {"calibrate --links laptop", 2, "--links requires --out"},
    {"calibrate --links nosuch --out $T/a.toml", 2, "no machine 'nosuch'"},
    {"calibrate --links laptop --ranks 1 --out $T/a.toml", 2, "--ranks"},
    {"calibrate --links laptop --device cuda --out $T/a.toml", 2, "torchrun"},
    {"plan $Q --machine $T/bad_curve.toml", 2, "collective broadcast: kind is"},
    {"calibrate", 2, "--out FILE.*--check FILE"},
    {"calibrate --out $T/a.toml --check $T/b.toml", 2, "--out"},
    {"calibrate --check $T/nosuch.toml --device tpu", 2, "tpu"},
    {"plan $Q", 2, "--machine"},
    {"plan $Q --machine nosuch", 2, "nosuch.*laptop"},
    {"plan $Q --machine dgx-h200", 2, "dgx-h200.*run\\.device"},
    {"plan $Q --machine laptop --set numerics.compute=bf16", 2, "fp32.*calibrate"},
    {"plan $Q --machine laptop --ranks 3 --set parallel.pp=2", 2, "--ranks = 3"},
    {"plan $Q --machine laptop --fold", 2, "folded.*exact"},
    {"plan $Q --machine laptop --fold --set parallel.dp=4 --set parallel.cp=2 --set "
     "parallel.context=ring",
     2, "folded.*parallel\\.context = ring"},
    {"plan $Q --machine laptop --set plan.routing=$T/nosuch.jsonl", 2, "nosuch.*metrics"},
    {"plan $Q --machine laptop --set plan.routing=$T/bad.jsonl", 2, "no expert_load"},
    {"plan $Q --machine $T/bad.toml", 2, "bad\\.toml"},
    {"plan $Q --machine $T/no_source.toml", 2, "device\\.memory: has no source"},
    {"plan $Q --machine $T/wrong_unit.toml", 2, "device\\.memory.*4 GB/s.*is not a size"},
    {"plan $Q --machine $T/no_unit.toml", 2, "device\\.memory"},
    {"plan $Q --machine $T/no_op.toml", 2, "no op was measured"},
    {"data inspect $T/garbage.h5", 30, "garbage\\.h5"},
    {"data inspect $T/nosuch.h5", 31, "nosuch\\.h5"},
    {"data inspect $T", 34, "not a regular file"},
    {"tokenizer train $T/empty.txt --out $T/o.model", 32, "empty\\.txt"},
    {"tokenizer train $T/novel.txt --out $T/o.model --vocab 100", 2, "at least 260"},
    {"checkpoint inspect $T/nosuch", 2, "nosuch.*no checkpoint"},
    {"checkpoint verify $T/used", 2, "used.*no checkpoint"},
    {"checkpoint import-hf $T/used $T/o", 2, "config\\.json"},
    {"checkpoint import-hf $T/hf $T/o", 2, "bert"},
    {"parity $T/nosuch", 31, "golden\\.json"},
    {"parity $T/garbage_golden", 30, "golden\\.json"},
    {"eval $T/used", 2, "used.*no run directory"},
    {"generate $T/nosuch", 2, "nosuch.*no run directory"},
};

std::vector<std::string> split(const std::string& text, const std::string& scratch) {
  std::vector<std::string> words;
  std::istringstream stream(text);
  for (std::string word; stream >> word;) {
    if (word == "$Q") word = "configs/quickstart.toml";
    if (word == "$S") {
      words.insert(words.end(), {"configs/tiny.toml", "--set", "train.steps=1", "--set"});
      word = "data.train=$T/novel.txt";
    }
    if (word == "$A") {
      words.insert(words.end(), {"--set", "numerics.attention=cudnn", "--set", "run.device=cuda",
                                 "--set", "numerics.compute=bf16", "--set"});
      word = "numerics.reduction=fast";
    }
    const size_t place = word.find("$T");
    if (place != std::string::npos) word.replace(place, 2, scratch);
    words.push_back(word);
  }
  return words;
}

TEST(WrongInputs, EachHasItsExitCodeAndMessage) {
  ScratchDirectory scratch;
  make_files(scratch);
  for (const WrongInput& row : kWrongInputs) {
    const BinaryRun run = run_binary(split(row.arguments, scratch.path()));
    EXPECT_EQ(run.exit_code, row.exit_code) << row.arguments << "\n" << run.output;
    const std::regex pattern(row.pattern, std::regex::icase);
    std::string line = run.output;
    std::replace(line.begin(), line.end(), '\n', ' ');
    EXPECT_TRUE(std::regex_search(line, pattern))
        << "'" << row.arguments << "' should say /" << row.pattern << "/ but says\n"
        << run.output;
    EXPECT_LT(run.output.size(), 4000u) << row.arguments;
  }
}

TEST(WrongInputs, TheTableIsLargeAndEachRowIsThereOnce) {
  std::set<std::string> arguments;
  for (const WrongInput& row : kWrongInputs) arguments.insert(row.arguments);
  EXPECT_EQ(arguments.size(), std::size(kWrongInputs));
  EXPECT_GE(arguments.size(), 60u);
}

TEST(WrongInputs, LaunchersThatDoNotFitTheLayoutAreRefused) {
  const std::vector<std::string> train = {"train", "configs/quickstart.toml"};
  const BinaryRun other = run_binary(train, {"RANK=0", "WORLD_SIZE=4"});
  EXPECT_EQ(other.exit_code, 2) << other.output;
  EXPECT_NE(other.output.find("4 processes, but the layout has 8 ranks"), std::string::npos);
  const BinaryRun same = run_binary(train, {"SLURM_PROCID=0", "SLURM_NTASKS=8"});
  EXPECT_EQ(same.exit_code, 2) << same.output;
  EXPECT_NE(same.output.find("run.device = cuda"), std::string::npos);
}

TEST(CommandLine, HelpHasAnExampleForEveryCommand) {
  const std::vector<std::vector<std::string>> commands = {{"train"},
                                                          {"check"},
                                                          {"plan"},
                                                          {"calibrate"},
                                                          {"eval"},
                                                          {"generate"},
                                                          {"data", "build"},
                                                          {"data", "inspect"},
                                                          {"tokenizer", "train"},
                                                          {"parity"},
                                                          {"compare"},
                                                          {"tokenizer", "inspect"},
                                                          {"config", "show"},
                                                          {"config", "schema"},
                                                          {"doctor"},
                                                          {"report"},
                                                          {"checkpoint", "inspect"},
                                                          {"checkpoint", "verify"},
                                                          {"checkpoint", "export-hf"},
                                                          {"checkpoint", "import-hf"}};
  const BinaryRun overview = run_binary({"--help"});
  EXPECT_EQ(overview.exit_code, 0);
  for (std::vector<std::string> command : commands) {
    std::string name = "cambium " + command[0];
    if (command.size() > 1) name += " " + command[1];
    EXPECT_NE(overview.output.find(name), std::string::npos) << name;
    command.emplace_back("--help");
    const BinaryRun help = run_binary(command);
    EXPECT_EQ(help.exit_code, 0) << help.output;
    EXPECT_NE(help.output.find("Example:\n  " + name), std::string::npos) << help.output;
  }
}

TEST(CommandLine, ConfigShowRoundTripsAndTheSchemaIsJson) {
  ScratchDirectory scratch;
  const BinaryRun first = run_binary({"config", "show", "configs/quickstart.toml"});
  EXPECT_EQ(first.exit_code, 0) << first.output;
  const std::string path = scratch.write("again.toml", first.output);
  const BinaryRun second = run_binary({"config", "show", path});
  EXPECT_EQ(second.output, first.output);
  EXPECT_EQ(run_binary({"config", "schema"}).exit_code, 0);
  const BinaryRun schema = run_binary({"config", "schema", "--json"});
  EXPECT_EQ(schema.exit_code, 0);
  EXPECT_EQ(schema.output.front(), '{');
  EXPECT_EQ(run_binary({"doctor", "--json"}).exit_code, 0);
}

// A run directory as compare reads it: two digested steps after the initial one.
void write_run(const ScratchDirectory& scratch, const std::string& name, const std::string& loss,
               const std::string& digest) {
  scratch.write(name + "/metrics.jsonl",
                "{\"step\":1,\"loss\":3.5,\"grad_norm\":1.0,\"lr\":0.1,\"tokens\":8}\n"
                "{\"step\":2,\"loss\":" +
                    loss + ",\"grad_norm\":1.0,\"lr\":0.1,\"tokens\":8}\n");
  scratch.write(name + "/digests.jsonl",
                "{\"step\":0,\"digests\":{\"a\":\"00\",\"b\":\"01\"}}\n"
                "{\"step\":1,\"digests\":{\"a\":\"10\",\"b\":\"" +
                    digest + "\"}}\n");
}

TEST(CommandCompare, NamesTheFirstDifferingStepAndTensor) {
  ScratchDirectory scratch;
  write_run(scratch, "a", "3.25", "11");
  write_run(scratch, "same", "3.25", "11");
  write_run(scratch, "loss", "3.2500000000000004", "11");
  write_run(scratch, "tensor", "3.25", "12");
  const auto compared = [&](const char* other) {
    return run_binary({"compare", scratch.path() + "/a", scratch.path() + "/" + other});
  };
  EXPECT_EQ(compared("same").exit_code, 0) << compared("same").output;
  EXPECT_NE(compared("same").output.find("equal"), std::string::npos);
  EXPECT_EQ(compared("loss").exit_code, 51);
  EXPECT_NE(compared("loss").output.find("step 2, loss"), std::string::npos)
      << compared("loss").output;
  EXPECT_EQ(compared("tensor").exit_code, 51);
  EXPECT_NE(compared("tensor").output.find("step 1, b: 11"), std::string::npos)
      << compared("tensor").output;
}

}  // namespace
}  // namespace cambium
