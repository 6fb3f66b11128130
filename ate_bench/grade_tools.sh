# Sourced by graders (`. .ate/grade_tools.sh`), in the grading copy. A grader prints one line
# `CHECK name PASS|FAIL detail` for each check and exits 0 when it ran to its end.
export LC_ALL=C.UTF-8

# check NAME DETAIL COMMAND...: runs the command; its exit status is the verdict.
check() {
  local name=$1 detail=$2
  shift 2
  if "$@" >.ate/check.log 2>&1; then
    echo "CHECK $name PASS $detail"
  else
    sed 's/^/  /' .ate/check.log | tail -20
    echo "CHECK $name FAIL $detail"
  fi
}

# cambium_binary: the path of a `cambium` built from this tree. Tasks whose read-only paths cover
# all sources may use one built before (ATE_CAMBIUM): it is the same program.
cambium_binary() {
  if [ -x "${ATE_CAMBIUM:-}" ]; then
    echo "$ATE_CAMBIUM"
  else
    cmake --preset cpu >.ate/build.log 2>&1 &&
      cmake --build --preset cpu --target cambium >>.ate/build.log 2>&1 &&
      echo "$PWD/build/cpu/cambium"
  fi
}

# hidden_test SOURCES...: builds .ate/grade/hidden_test.cpp with these files of the tree and
# cambium_base alone, and runs it: it prints the CHECK lines. What does not compile fails them all.
hidden_test() {
  local source
  {
    echo 'add_executable(ate_hidden .ate/grade/hidden_test.cpp)'
    echo 'target_link_libraries(ate_hidden PRIVATE cambium_base)'
    for source in "$@"; do
      if [ -f "$source" ]; then echo "target_sources(ate_hidden PRIVATE $source)"; fi
    done
  } >>CMakeLists.txt
  if cmake --preset cpu >.ate/build.log 2>&1 &&
    cmake --build --preset cpu --target ate_hidden >>.ate/build.log 2>&1; then
    timeout 120 build/cpu/ate_hidden
  else
    tail -30 .ate/build.log
    return 0
  fi
}
