#!/usr/bin/env bash
# Set up and run every check that needs no GPU, from a machine with Python 3.11-3.13 and a C++17 compiler:
#   bash scripts/test.sh [pytest arguments]
# Uses the active virtual environment, or makes build/test-venv. JAX_VERSION chooses another jax than the oldest
# supported one.
set -euo pipefail
cd "$(dirname "$0")/.."

if [[ -z "${VIRTUAL_ENV:-}" ]]; then
  [[ -x build/test-venv/bin/python ]] || "${PYTHON:-python3}" -m venv build/test-venv
  source build/test-venv/bin/activate
fi

read_pyproject() { python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb')); print(*($1), sep='\n')"; }
build_requires=$(read_pyproject "p['build-system']['requires']")
jax_version=${JAX_VERSION:-$(sed -n 's/^jaxlib==//p' <<<"$build_requires")}

echo "== install: jax $jax_version"
{
  grep -v '^jaxlib==' <<<"$build_requires"
  read_pyproject "p['project']['dependencies'] + [r for extra in ('test', 'types', 'docs') for r in p['project']['optional-dependencies'][extra]]"
  printf '%s\n' cmake ninja "jax==$jax_version"
} | python -m pip install --quiet -r /dev/stdin

# The CUDA plugin alone, without the libraries that need a GPU, compiles for an H200 where there is none.
if ! python -c "import jax_plugins" 2>/dev/null; then
  jaxlib_version=$(python -c "import jaxlib; print(jaxlib.__version__)")
  python -m pip install --quiet --no-deps "jax-cuda12-plugin==$jaxlib_version" "jax-cuda12-pjrt==$jaxlib_version" \
    nvidia-cuda-cupti-cu12 nvidia-cuda-nvcc-cu12 nvidia-cuda-runtime-cu12 nvidia-nvjitlink-cu12
fi
if [[ -z "${CUDACXX:-}" ]] && ! command -v nvcc >/dev/null; then
  python -m pip install --quiet --no-deps -r scripts/nvcc.txt
fi

echo "== build, warnings are errors"
# Kernels that no GPU here will run need no optimizations, which are most of what they take to compile.
fast=()
[[ -e /dev/nvidiactl ]] || fast=(-Ccmake.define.CMAKE_CUDA_FLAGS=--Ofast-compile=max)
python -m pip install --quiet --no-build-isolation --no-deps -Cbuild-dir=build/test \
  -Ccmake.define.DSV4_CUDA=ON -Ccmake.define.CMAKE_COMPILE_WARNING_AS_ERROR=ON "${fast[@]}" -e .

echo "== kernels without clusters of blocks, and without spills"
bash scripts/architectures.sh --quick 80 90

echo "== style"
ruff check .
ruff format --check .
find ffi \( -name '*.h' -o -name '*.cc' -o -name '*.cu*' \) -print0 | xargs -0 clang-format --dry-run -Werror

echo "== types, and documentation with warnings as errors"
mypy &
types=$!
bash scripts/docs.sh &
site=$!
pyright
wait $types
wait $site

echo "== tests"
# XLA's and LLVM's optimizations are most of what the tests would wait for; scripts/matrix.sh runs with all of them.
export XLA_PYTHON_CLIENT_PREALLOCATE=false JAX_DISABLE_MOST_OPTIMIZATIONS=true
if [[ $jax_version == 0.10.* ]]; then  # later ones have no other emitters, and refuse the flag
  export XLA_FLAGS="--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 ${XLA_FLAGS:-}"
fi
python -m pytest -n auto --maxprocesses 4 --dist worksteal "$@"
