#!/usr/bin/env bash
# A part of the suite against versions of transformers, each in a virtual environment of its own, kept in .matrix:
#   scripts/matrix.sh VERSION... [-- pytest arguments]
# "floor" is the oldest that pyproject.toml allows, "newest" the newest on the package index. One line a version; all output is in .matrix.
# Without arguments after -- it runs the tests of the command and of compressed checkpoints.
set -uo pipefail
cd "$(dirname "$0")/.."
versions=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  versions+=("$1")
  shift
done
shift $(($# > 0))
if [ ${#versions[@]} -eq 0 ]; then
  sed -n '2,5s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
tests=("$@")
[ $# -gt 0 ] || tests=(tests/end_to_end/test_compressed_checkpoint.py tests/ptq/test_cli.py)

bound() {
  case $1 in
    floor) sed -n 's/^ *"transformers>=\([0-9.]*\)".*/==\1/p' pyproject.toml ;;
    newest) echo "" ;;
    *) echo "==$1" ;;
  esac
}

# The version that is installed, or nothing where it cannot be.
prepare() {
  local venv=.matrix/$1
  [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv" || return
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade --constraint scripts/constraints.txt \
    --editable ".[test]" "transformers$(bound "$1")" || return
  "$venv/bin/python" -c "import importlib.metadata as m; print(m.version('transformers'))"
}

mkdir -p .matrix
failed=0
for name in "${versions[@]}"; do
  log=.matrix/$name.log
  if ! found=$(prepare "$name" 2>"$log"); then
    result="could not be installed"
    failed=1
  elif .matrix/"$name"/bin/python -m pytest "${tests[@]}" >>"$log" 2>&1; then
    result="passed: $(tail -n 1 "$log")"
  else
    result="failed: $(tail -n 1 "$log")"
    failed=1
  fi
  echo "transformers ${found:-$name}: $result"
done
exit $failed
