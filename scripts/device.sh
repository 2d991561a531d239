#!/usr/bin/env bash
# Build and test on a machine with an NVIDIA GPU, offline: jax with its CUDA plugin, nvcc, cmake, ninja and what
# [build-system] requires in pyproject.toml lists are installed there already.
#   [BENCH_OPTIONS="--quick --reference"] bash scripts/device.sh [only] [sanitize] [decode] [bench] [step] [trace]
# bench writes bench.json and bench.png, step the parts of a planned step (step.json), trace the profile, beside the logs.
# "only" leaves the GPU tests out.
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
  # Graphs off: a report then names the kernel that was launched. Only this project's kernels are checked, XLA's are not.
  XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_command_buffer=" "$sanitizer" --tool "$1" --error-exitcode 9 \
    --target-processes application-only --kernel-name kns=dsv4 --report-api-errors no \
    python -m pytest -q -m "gpu and sanitize" -p no:cacheprovider
}

step build env DSV4_CUDA=ON python -m pip install --quiet --no-build-isolation --no-deps -Cbuild-dir=build/device-build -e . ||
  exit 1
step doctor dsv4-jax doctor
parallel=$(python -c "import xdist" 2>/dev/null && echo "-n 12")
[[ " $* " == *" only "* ]] || step gpu python -m pytest -m gpu --durations=10 $parallel
measure() { step "$1" env -u XLA_PYTHON_CLIENT_PREALLOCATE dsv4-jax bench --json "$logs/$1.json" "${@:2}"; }
for wanted in "$@"; do
  case $wanted in
    sanitize) for tool in memcheck racecheck synccheck; do step $tool sanitize $tool; done ;;
    decode) step decode dsv4-jax decode --verify ;;
    bench)
      read -ra options <<<"${BENCH_OPTIONS:-}"
      measure bench --plot "$logs/bench.png" "${options[@]}"
      ;;
    step) measure step --only '^(host|step)/' ;;
    only) ;;
    trace) step trace dsv4-jax trace --logdir "$logs/trace" ;;
    *) echo "unknown step '$wanted': only, sanitize, decode, bench, step or trace"; failed+=("$wanted") ;;
  esac
done

if ((${#failed[@]})); then
  echo "FAILED: ${failed[*]}"
  exit 1
fi
echo "all steps passed"
