# Sourced by solutions of operate tasks, in the scratch copy: $CAMBIUM is a built binary.
CAMBIUM=${ATE_CAMBIUM:-}
if [ ! -x "$CAMBIUM" ]; then
  cmake --preset cpu && cmake --build --preset cpu --target cambium
  CAMBIUM=$PWD/build/cpu/cambium
fi
