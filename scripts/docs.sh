#!/usr/bin/env bash
# Build the documentation site into build/site, warnings are errors; with `linkcheck`, look at the links that leave it:
#   bash scripts/docs.sh [linkcheck]
# From an environment in which dsv4_jax is installed. Asks no network but for `linkcheck`, and for pip where there is no Sphinx.
set -euo pipefail
cd "$(dirname "$0")/.."
python -c "import furo, myst_parser, sphinx" 2>/dev/null || python -m pip install --quiet \
  $(python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'])")
JAX_PLATFORMS=cpu python -m sphinx -b "${1:-html}" -c docs -d build/site-cache -W --keep-going --quiet . "build/site"
