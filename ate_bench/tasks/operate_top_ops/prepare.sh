cat >job.toml <<'C'
model = "qwen3-30b-a3b"

[train]
global_batch_sequences = 32
sequence_length = 4096

[numerics]
compute = "bf16"
reduction = "fast"

[run]
device = "cuda"

[parallel]
pp = 4
dp = 8
ep = 8

[logging]
digest_every_steps = 10

[balance]
loss = "micro_batch"
C
