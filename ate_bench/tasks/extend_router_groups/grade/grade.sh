. .ate/grade_tools.sh
hidden_test reference/group_topk.cc
