. .ate/grade_tools.sh
hidden_test reference/smoothed_cross_entropy.cc
