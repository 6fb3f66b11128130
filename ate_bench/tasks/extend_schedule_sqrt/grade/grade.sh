. .ate/grade_tools.sh
sqrt="schedule.kind=wsd_sqrt schedule.warmup_steps=5 schedule.decay_steps=12 schedule.min_lr_ratio=0.1"
trainer $sqrt
# rates RUN KIND WARMUP COOLDOWN RATIO FIRST LAST: `lr` of these steps is the formula's.
rates() { python3 .ate/grade/rates.py "$@"; }
export -f rates
check warmup "steps 1 to 5" rates one wsd_sqrt 5 12 0.1 1 5
check stable "steps 6 to 18" rates one wsd_sqrt 5 12 0.1 6 18
check cooldown "steps 19 to 30" rates one wsd_sqrt 5 12 0.1 19 30
check defaults "a fifth; cut to what warm-up leaves; no floor" bash -c '. .ate/grade_tools.sh &&
  train_tiny .ate/fifth schedule.kind=wsd_sqrt && rates fifth wsd_sqrt 0 6 0.1 1 30 &&
  train_tiny .ate/cut schedule.kind=wsd_sqrt schedule.warmup_steps=10 schedule.decay_steps=500 \
    schedule.min_lr_ratio=0 && rates cut wsd_sqrt 10 20 0 1 30'
check others "wsd, cosine" bash -c '. .ate/grade_tools.sh &&
  train_tiny .ate/wsd schedule.kind=wsd schedule.decay_steps=12 && rates wsd wsd 0 12 0.1 1 30 &&
  train_tiny .ate/cosine schedule.kind=cosine && rates cosine cosine 0 0 0.1 1 30'
check resume "stopped after step 21" bash -c '. .ate/grade_tools.sh &&
  train_tiny .ate/halves --stop-after-step=21 "$@" && train_tiny .ate/halves --resume "$@" &&
  same_digests .ate/one .ate/halves' resume $sqrt
