#!/usr/bin/env bash
# The native kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer: scripts/sanitize.sh [pytest arguments]
# Needs g++ with its sanitizers. The checked library lies in a copy of the sources; the installed one stays as it is.
set -euo pipefail
. "$(dirname "$0")/environment.sh"
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
git ls-files -co --exclude-standard kernels tests ptq rptq sparsegpt pyproject.toml | tar c -T - | tar x -C "$copy"
cd "$copy"
flags=(-std=c++17 -O1 -g -fno-omit-frame-pointer -ffp-contract=off -fvisibility=hidden -fno-exceptions -fno-rtti -fopenmp)
"${CXX:-g++}" "${flags[@]}" -fsanitize=address,undefined -fno-sanitize-recover=all -shared -fPIC \
  kernels/lowbit/cpu/*.cpp -o kernels/lowbit/cpu/_native.so
natives=(gram lowest planar integer fine_groups sparse_linear sweep decode decode_plain)
files=()
for name in "${natives[@]}"; do
  if [ -f "tests/lowbit/test_$name.py" ]; then files+=("tests/lowbit/test_$name.py"); fi
done
# Python frees nothing at its end, so leaks are not looked for; -s, so that what a sanitizer says before it aborts is seen.
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1
LD_PRELOAD="$("${CXX:-g++}" -print-file-name=libasan.so) $("${CXX:-g++}" -print-file-name=libubsan.so)" PYTHONPATH=kernels:. \
  python -m pytest -s -k "not triton" "${files[@]}" "$@"
