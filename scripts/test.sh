#!/usr/bin/env bash
# The whole test suite in a virtual environment of its own: scripts/test.sh [pytest arguments]
set -euo pipefail
. "$(dirname "$0")/environment.sh"
ruff check .
mypy
python -m pytest --numprocesses auto --dist loadfile "$@"
