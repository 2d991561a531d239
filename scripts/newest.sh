#!/usr/bin/env bash
# Run the CPU tests on the newest supported jax, which needs another Python than the oldest one does:
#   bash scripts/newest.sh [pytest arguments]
# Python 3.13 or 3.12 is looked for on PATH and among pyenv's; where there is none, nothing is run and that is said.
set -euo pipefail
cd "$(dirname "$0")/.."

find_python() {
  local candidate pyenv=${PYENV_ROOT:-$HOME/.pyenv}/versions
  for candidate in python3.13 python3.12 "$pyenv"/3.13.*/bin/python "$pyenv"/3.12.*/bin/python; do
    # A pyenv shim may be there without a Python behind it.
    if "$candidate" -c "import venv" >/dev/null 2>&1; then
      echo "$candidate"
      return
    fi
  done
}

python=$(find_python)
if [[ -z "$python" ]]; then
  echo "== newest jax: no Python 3.12 or 3.13 found, not tested"
  exit
fi
environment=build/newest-venv
[[ -x $environment/bin/python ]] || "$python" -m venv "$environment"
# shellcheck disable=SC1091
source "$environment/bin/activate"
unset PYTHONPATH

read_pyproject() { python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb')); print(*($1), sep='\n')"; }

echo "== newest jax: build for the CPU"
# In this environment, where the newest jaxlib then takes the place of the one whose headers the build is pinned to.
{
  read_pyproject "p['build-system']['requires']"
  printf '%s\n' cmake ninja
} | python -m pip install --quiet -r /dev/stdin
python -m pip install --quiet --no-build-isolation --no-deps -Ccmake.define.DSV4_CUDA=OFF .

echo "== newest jax: install"
read_pyproject "p['project']['dependencies'] + p['project']['optional-dependencies']['test']" |
  python -m pip install --quiet --upgrade -r /dev/stdin
python -c "import jax, sys; print(f'jax {jax.__version__}, Python {sys.version.split()[0]}')"

echo "== newest jax: tests"
python -m pytest -n auto --maxprocesses 4 -q "$@"
