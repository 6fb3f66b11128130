. .ate/grade_tools.sh
hidden_test reference/window_attention.cc
