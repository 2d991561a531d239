#!/usr/bin/env bash
# Compiles the CUDA kernels for every architecture that must build, and for 90, which their launch bounds are made for,
# refuses kernels that spill more than 64 bytes of a thread's registers. (A few around what is done once cost less than
# the warps that larger bounds would.)
#   bash scripts/architectures.sh [--quick] [architecture ...]
# Default: 80 89 90 100 120. --quick compiles only the files whose code differs without clusters of blocks, for one pair
# of element types. Nothing is linked; no GPU is needed. CUDACXX chooses the nvcc.
set -euo pipefail
cd "$(dirname "$0")/.."

quick=
architectures=()
for argument in "$@"; do
  case $argument in
    --quick) quick=yes ;;
    [0-9]*) architectures+=("$argument") ;;
    *) echo "unknown argument '$argument': --quick, or architectures such as 80 or 90a" >&2; exit 2 ;;
  esac
done
((${#architectures[@]})) || architectures=(80 89 90 100 120)

nvcc=${CUDACXX:-$(command -v nvcc || true)}
if [[ -z $nvcc ]]; then
  nvcc=$(python -c "import nvidia; print(nvidia.__path__[0])")/cu13/bin/nvcc  # scripts/nvcc.txt
fi

if [[ -n $quick ]]; then
  files=(ffi/cuda/close/compress.cu ffi/cuda/update/{decode,prefill}_bf16_bf16.cu)
else
  files=(ffi/cuda/*/*.cu)
fi

logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
# What CMakeLists.txt compiles kernels with; ptxas reports each kernel's registers and spills. Where those are not looked
# at, optimizations would only take time.
compile() {
  local file=$1 architecture=$2 log options=()
  log=$logs/$(tr / _ <<<"$file").$architecture
  [[ $architecture == 90* ]] || options=(--Ofast-compile=max)
  if ! "$nvcc" -std=c++17 -O3 -fmad=false --expt-relaxed-constexpr -Iffi -Werror all-warnings -cubin -o /dev/null \
    -gencode "arch=compute_$architecture,code=sm_$architecture" -Xptxas -v "${options[@]}" "$file" >"$log" 2>&1; then
    echo "sm_$architecture: $file does not compile"
    cat "$log"
    return 1
  fi
  # 65 or more.
  local spills='(6[5-9]|[7-9][0-9]|[1-9][0-9]{2,}) bytes spill'
  if [[ $architecture == 90* ]] && grep -qE "$spills" "$log"; then
    echo "sm_$architecture: $file has kernels that spill registers"
    grep -E -B1 "$spills" "$log"
    return 1
  fi
  echo "sm_$architecture: $file"
}
export -f compile
export nvcc logs
for architecture in "${architectures[@]}"; do
  printf "%s $architecture\n" "${files[@]}"
  # Hopper's own instructions.
  if [[ $architecture == 90 && -z $quick ]]; then printf "%s 90a\n" ffi/cuda/*/sm_90a/*.cu; fi
done | xargs -P "$(nproc)" -L 1 bash -c 'compile "$0" "$1"'
