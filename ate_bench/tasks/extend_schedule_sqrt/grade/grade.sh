. .ate/grade_tools.sh
hidden_test src/optim/sqrt_cooldown.cc
