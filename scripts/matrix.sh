#!/usr/bin/env bash
# Run the CPU tests on every supported Python that is found, each in an empty environment with the jax beside it:
#   bash scripts/matrix.sh [--newest] [--wheel FILE] [pytest arguments]
# --newest leaves out all but the newest. With --wheel it is that wheel's turn, `doctor` and `decode --verify` from it
# included; else one is built, without CUDA. Whatever runs is the installed package, not this folder's.
# Pythons are looked for on PATH and among pyenv's; what there is not is not run, and that is said.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
supported=(3.13:0.12 3.12:0.11 3.11:0.10)

newest='' wheel=''
while (($#)); do
  case $1 in
    --newest) newest=yes ;;
    --wheel) wheel=$(realpath "$2") && shift ;;
    *) break ;;
  esac
  shift
done
arguments=("${@/#tests/$root/tests}")
[[ " $*" == *" tests"* ]] || arguments+=("$root/tests")

find_python() {
  local candidate
  for candidate in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python; do
    # A pyenv shim may be there without a Python behind it.
    if "$candidate" -c "import venv" >/dev/null 2>&1; then
      echo "$candidate"
      return
    fi
  done
}

unset PYTHONPATH
for pair in "${supported[@]}"; do
  version=${pair%:*} jax=${pair#*:}
  python=$(find_python "$version")
  if [[ -z $python ]]; then
    echo "== Python $version: not found, not tested"
    continue
  fi
  environment=$root/build/matrix/$version
  "$python" -m venv --clear "$environment"
  cd "$environment"
  # shellcheck disable=SC1091
  source bin/activate

  if [[ -z $wheel ]]; then
    echo "== Python $version: build for the CPU"
    python -m pip wheel --quiet --no-deps -Ccmake.define.DSV4_CUDA=OFF --wheel-dir wheels "$root"
    wheel=$(realpath wheels/*.whl)
    built=yes
  fi
  echo "== Python $version: install, with jax $jax"
  python -m pip install --quiet "$wheel[test]" "jax==$jax.*"
  python -c "import dsv4_jax, jax; print(f'jax {jax.__version__}, {dsv4_jax.__file__}')"
  if [[ -z ${built:-} ]]; then
    dsv4-jax doctor
    dsv4-jax decode --verify
  fi
  echo "== Python $version: tests"
  python -m pytest -c "$root/pyproject.toml" -n auto --maxprocesses 4 -q "${arguments[@]}"
  [[ -z $newest ]] || break
done
