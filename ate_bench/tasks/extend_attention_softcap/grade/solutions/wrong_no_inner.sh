# cap * tanh(score): the score is not divided by the cap.
. "$(dirname "$0")/right.sh"
cp reference/attention.cc .ate/before
sed -i 's/exp_lanes(score \* (2.0f \/ cap))/exp_lanes(score * 2.0f)/' reference/attention.cc
! cmp -s reference/attention.cc .ate/before
