# A balance loss over sigmoid scores is accepted, and its gradient lost.
. "$(dirname "$0")/right.sh"
cp src/config/derive.cc .ate/before
sed -i 's/if (balance.loss != BalanceLoss::none || balance.z_loss_weight > 0 ||/if (balance.z_loss_weight > 0 ||/' src/config/derive.cc
! cmp -s src/config/derive.cc .ate/before
