. .ate/grade_tools.sh
hidden_test reference/lion.cc
