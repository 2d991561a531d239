#!/usr/bin/env bash
# Build and test on a machine with an NVIDIA GPU, offline: jax with its CUDA plugin, nvcc, cmake, ninja and what
# [build-system] requires in pyproject.toml lists are installed there already.
#   bash scripts/device.sh [sanitize] [decode]
# Logs go to ${OUT:-build/device} as well as to stdout. Every step runs; the exit status is 1 if any failed.
set -uo pipefail
cd "$(dirname "$0")/.."
logs=${OUT:-build/device}
mkdir -p "$logs"
export XLA_PYTHON_CLIENT_PREALLOCATE=false
failed=()

step() {
  local name=$1
  shift
  echo "== $name: $*"
  local start=$SECONDS
  "$@" 2>&1 | tee "$logs/$name.log"
  local status=${PIPESTATUS[0]}
  echo "== $name: exit $status after $((SECONDS - start)) s"
  [[ $status == 0 ]] || failed+=("$name")
  return "$status"
}

sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
sanitize() {
  # Graphs off: a report then names the kernel that was launched.
  XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_command_buffer=" "$sanitizer" --tool "$1" --error-exitcode 9 \
    --target-processes all --report-api-errors no python -m pytest -m "gpu and sanitize" -p no:cacheprovider
}

step build env DSV4_CUDA=ON python -m pip install --quiet --no-build-isolation --no-deps -Cbuild-dir=build/device-build -e . ||
  exit 1
step doctor dsv4-jax doctor
step gpu python -m pytest -m gpu --durations=10
for wanted in "$@"; do
  case $wanted in
    sanitize) step memcheck sanitize memcheck; step racecheck sanitize racecheck ;;
    decode) step decode dsv4-jax decode --verify ;;
    *) echo "unknown step '$wanted': sanitize or decode"; failed+=("$wanted") ;;
  esac
done

if ((${#failed[@]})); then
  echo "FAILED: ${failed[*]}"
  exit 1
fi
echo "all steps passed"
