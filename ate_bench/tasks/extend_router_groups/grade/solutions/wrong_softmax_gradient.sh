# The op is right; the trainer's backward pass is still the softmax router's.
. "$(dirname "$0")/right.sh"
cp src/model/qwen3_router.cc .ate/before
sed -i 'N;s/if (c.model.router_groups > 0) {\n    group_topk_backward/if (c.model.router_groups < 0) {\n    group_topk_backward/;P;D' src/model/qwen3_router.cc
! cmp -s src/model/qwen3_router.cc .ate/before
