python3 - <<'P'
def edit(path, old, new):
    text = open(path).read()
    assert text.count(old) == 1, (path, old)
    open(path, "w").write(text.replace(old, new))

edit("src/config/config.h", "{ constant, cosine, wsd }", "{ constant, cosine, wsd, wsd_sqrt }")
edit("src/config/schema.cc", '{"constant", "cosine", "wsd"}', '{"constant", "cosine", "wsd", "wsd_sqrt"}')
edit("src/optim/lr_schedule.h", "over the last decay_steps\n", """over the last decay_steps
//   wsd_sqrt  the same with a fall of 1 - sqrt(done) (arXiv 2405.18392)
""")
edit("src/optim/lr_schedule.cc", "#include <algorithm>\n", "#include <algorithm>\n#include <cmath>\n")
edit("src/optim/lr_schedule.cc", "    case ScheduleKind::wsd: {", """    case ScheduleKind::wsd_sqrt: {
      const int64_t cooldown = derived.decay_steps, stable = total - cooldown;
      if (step <= stable || cooldown == 0) return peak;
      const double x = static_cast<double>(step - stable) / static_cast<double>(cooldown);
      return floor + (peak - floor) * (1.0 - std::sqrt(std::min(1.0, x)));
    }
    case ScheduleKind::wsd: {""")
P
