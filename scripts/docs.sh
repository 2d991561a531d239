#!/usr/bin/env bash
# Build the documentation site into build/site, warnings are errors; or look at the links that leave it, which needs a network:
#   bash scripts/docs.sh [linkcheck]
# Uses the active virtual environment, or makes build/docs-venv; asks pip for what is missing there. Builds no kernels.
set -euo pipefail
cd "$(dirname "$0")/.."

if [[ -z "${VIRTUAL_ENV:-}" ]]; then
  [[ -x build/docs-venv/bin/python ]] || "${PYTHON:-python3}" -m venv build/docs-venv
  source build/docs-venv/bin/activate
fi
if ! python -c "import furo, jax, myst_parser, sphinx, typer" 2>/dev/null; then
  python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']
print(*p['dependencies'], *p['optional-dependencies']['docs'], sep='\n')" | python -m pip install --quiet -r /dev/stdin
fi

builder=${1:-html}
[[ $builder == html ]] && made=build/site || made=build/$builder
rm -rf "$made"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" JAX_PLATFORMS=cpu
python -m sphinx -b "$builder" -c docs -E -a -W --keep-going --quiet -d build/site-cache . "$made"
