#!/usr/bin/env bash
# What needs Python 3.12, jax 0.11.2 and the compilers of chips that are not there: the Mosaic GPU
# kernels in their interpreter, and every kernel compiled for every chip (pallas_kernels.aot).
# Makes .venv-kernels the first time. Arguments go to pallas_kernels.aot (none: --all). Without
# Python 3.12 (on PATH, in pyenv, or named by PYTHON312) it says so and skips, with status 0.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
VENV=.venv-kernels
JAX=0.11.2

find_python312() {
  local name
  for name in "${PYTHON312:-}" python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python; do
    [ -n "$name" ] && command -v "$name" >/dev/null 2>&1 || continue
    if "$name" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  return 1
}

if [ ! -x "$VENV/bin/python" ]; then
  if ! PYTHON=$(find_python312); then
    echo "SKIPPED: Mosaic GPU tests and AOT compiling: no Python 3.12 on PATH or in pyenv" >&2
    echo "(the Mosaic GPU interpreter needs jax $JAX, which needs it); set PYTHON312 to one" >&2
    exit 0
  fi
  export PYTHON
fi

make_environment "$VENV" '.[test]'
# jax at the version that the GPU machine has, and the compilers. --no-deps leaves CUDA's own
# libraries out: compiling needs none of them.
"$VENV/bin/python" -c "import jax; assert jax.__version__ == '$JAX'" 2>/dev/null ||
  "$VENV/bin/python" -m pip install --quiet "jax==$JAX" "jaxlib==$JAX"
"$VENV/bin/python" -c 'import libtpu, absl' 2>/dev/null &&
  "$VENV/bin/python" -m pip show --quiet "jax-cuda13-plugin" 2>/dev/null || {
  "$VENV/bin/python" -m pip install --quiet libtpu absl-py
  "$VENV/bin/python" -m pip install --quiet --no-deps \
    "jax-cuda13-plugin==$JAX" "jax-cuda13-pjrt==$JAX"
}

export JAX_PLATFORMS=cpu
"$VENV/bin/python" -m pytest -W error -q tests/kernels/test_*mosaic_gpu*.py tests/kernels/test_aot.py
[ $# -gt 0 ] || set -- --all
exec "$VENV/bin/python" -m pallas_kernels.aot "$@"
