#!/usr/bin/env bash
# Text from a real model on a bare machine: quickstart.sh ["PROMPT"] [jaxinfer generate's options].
# Makes .venv beside the README, installs jaxinfer and the embedded model, and streams the answer.
# The second run finds everything in place.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
make_environment .venv .
exec .venv/bin/python -m jaxinfer generate "${@:-The capital of France is}"
