# The bias enters the weights.
. "$(dirname "$0")/right.sh"
cp reference/group_topk.cc .ate/before
sed -i 's/weight\[k\] = score\[e\]/weight[k] = choice[e]/' reference/group_topk.cc
! cmp -s reference/group_topk.cc .ate/before
