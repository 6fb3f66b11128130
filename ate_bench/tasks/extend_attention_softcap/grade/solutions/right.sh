python3 - <<'P'
def edit(path, old, new, count=1):
    text = open(path).read()
    assert text.count(old) == count, (path, old, text.count(old))
    open(path, "w").write(text.replace(old, new))

h = "kernels/attention.h"
edit(h, "// over the tokens j <= t of", """// with a logit cap scale * q . k becomes cap * tanh(scale * q . k / cap) (arXiv 2408.00118, section 2)
// over the tokens j <= t of""")
edit(h, "  ContextShare share = {};\n",
     "  ContextShare share = {};\n  float logit_cap = 0.0f;  // 0 = none\n", 2)
blocks = "reference/attention_blocks.h"
edit(blocks, "        scale(a.scale),\n", "        scale(a.scale),\n        cap(a.logit_cap),\n")
edit(blocks, "  float scale;\n  ContextShare share;\n", "  float scale;\n  float cap;  // 0 = none\n  ContextShare share;\n")
cc = "reference/attention.cc"
edit(cc, "// The score of (key, 8 lanes): scaled,", """// cap * tanh(score / cap), by 1 - 2 / (exp(2 x) + 1): the exponential may overflow to infinity.
inline Lanes capped(Lanes score, float cap) {
  if (cap <= 0) return score;
  const Lanes one = broadcast(1.0f), two = broadcast(2.0f);
  return cap * (one - two / (exp_lanes(score * (2.0f / cap)) + one));
}

// The score of (key, 8 lanes): scaled, capped,""")
edit(cc, "inline Lanes masked_score(Lanes score, float scale, const", "inline Lanes masked_score(Lanes score, float scale, float cap, const")
edit(cc, "  const Lanes scaled = score * scale;\n", "  const Lanes scaled = capped(score * scale, cap);\n")
edit(cc, "masked_score(load_lanes(at), in.scale, keys,", "masked_score(load_lanes(at), in.scale, in.cap, keys,")
edit(cc, "masked_score(product, in.scale, keys,", "masked_score(product, in.scale, in.cap, keys,")
edit(cc, """    const auto score = [&](int64_t key) {
      const Lanes product""", """    // 1 - (score / cap)^2, through which the gradient of a capped score goes.
    const auto slope = [&](int64_t key) {
      if (in.cap <= 0) return broadcast(1.0f);
      const Lanes product = load_lanes(p.probs + key * query.padded + lane);
      const Lanes share = capped(product * in.scale, in.cap) * (1.0f / in.cap);
      return broadcast(1.0f) - share * share;
    };
    const auto score = [&](int64_t key) {
      const Lanes product""")
edit(cc, "      const LaneFloats probs = exp_lanes(LaneFloats::of([&](int i) { return score(key + i); }));\n",
     "      const LaneFloats slopes = LaneFloats::of([&](int i) { return slope(key + i); });\n"
     "      const LaneFloats probs = exp_lanes(LaneFloats::of([&](int i) { return score(key + i); }));\n")
edit(cc, "in.operand(probs * (d_probs - delta)) * in.scale;", "in.operand(probs * (d_probs - delta) * slopes) * in.scale;")
edit(cc, "      const Lanes prob = exp_lanes(score(key));\n", "      const Lanes slopes = slope(key);\n      const Lanes prob = exp_lanes(score(key));\n")
edit(cc, "in.operand(prob * (load_lanes(p.d_scores + at) - delta));", "in.operand(prob * (load_lanes(p.d_scores + at) - delta) * slopes);")
cap = ".logit_cap = static_cast<float>(c.model.attention_logit_cap)"
edit("src/model/qwen3_attend.cc", "\n                     .share = context_share(c.rank)};", f"""
                     .share = context_share(c.rank),
                     {cap}}};""")
edit("src/model/qwen3_attend.cc", "\n      .share = context_share(c.rank),\n", f"""
      .share = context_share(c.rank),
      {cap},
""")
edit("src/config/config.h", "  double norm_epsilon = 1e-6;\n",
     "  double attention_logit_cap = 0.0;  // cap * tanh(score / cap); 0 = none\n  double norm_epsilon = 1e-6;\n")
edit("src/config/schema.cc", """    {"model",
     "norm_epsilon",""", """    {"model", "attention_logit_cap", in_section<kModel, &Model::attention_logit_cap>, kWeight,
     kNoChoices, kSame, "of the path, else 0.0", "bound of attention's scores, by tanh; 0 = none"},
    {"model",
     "norm_epsilon",""")
edit("src/checkpoint/hf_config.cc", '  if (!family.dense_layers && !model.dense_layers.empty()) refuse("model.dense_layers");\n',
     '  if (!family.dense_layers && !model.dense_layers.empty()) refuse("model.dense_layers");\n'
     '  if (model.attention_logit_cap > 0) refuse("model.attention_logit_cap");\n')
P
