# The validation loss is smoothed too.
. "$(dirname "$0")/right.sh"
python3 - <<'P'
def edit(path, old, new):
    text = open(path).read()
    assert text.count(old) == 1, (path, old)
    open(path, "w").write(text.replace(old, new))

edit("src/model/head.cc", """                   .loss_T = {loss.f32() + first, Shape(rows)}},
                  ops);
""", """                   .loss_T = {loss.f32() + first, Shape(rows)}},
                  ops);
    const float smoothing = static_cast<float>(rank_.config.train.label_smoothing);
    const Buffer unused = rank_.activation(4 * rows * V, "smoothed");
    if (smoothing > 0 && logits_TV == nullptr) {
      smoothed_cross_entropy({.logits_TV = chunk_logits,
                              .target_T = {batch.target_T.as<int32_t>() + first, Shape(rows)},
                              .loss_T = {loss.f32() + first, Shape(rows)},
                              .d_logits_TV = {unused.f32(), Shape(rows, V)},
                              .epsilon = smoothing},
                             ops);
    }
""")
P
