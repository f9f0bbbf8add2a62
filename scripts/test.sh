#!/usr/bin/env bash
# Runs the whole test suite: test.sh [pytest's arguments]. Makes .venv with what the tests need.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
make_environment .venv '.[test]'
exec .venv/bin/python -m pytest -n auto --dist loadfile "$@"
