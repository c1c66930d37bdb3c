#!/usr/bin/env bash
# The papers' three-text perplexity table, as markdown, for several checkpoints.
#
# usage: [PROTOCOL=rptq|sparsegpt|plain] [SEQLEN=2048] [WINDOWS=N] [WIKITEXT2=path] [PTB=path] [C4=path] [PYTHON=python] \
#            bash scripts/eval_perplexity.sh DIR...
#
# A text that cannot be had prints "n/a (reason)" in its column, and the exit status is then 1.
set -uo pipefail
[ $# -gt 0 ] || { sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2; }

protocol=${PROTOCOL:-rptq}
python=${PYTHON:-python}
texts=("${WIKITEXT2:-wikitext2}" "${PTB:-ptb}" "${C4:-c4}")
options=(--protocol "$protocol" --seqlen "${SEQLEN:-2048}")
[ -z "${WINDOWS:-}" ] || options+=(--windows "$WINDOWS")
failed=0
errors=$(mktemp)
trap 'rm -f "$errors"' EXIT

read -r -d '' cell <<'PY'
import json, sys
r = json.load(sys.stdin)
s = r["perplexity_stderr"]
print(f"{r['perplexity']:.2f}" + ("" if s is None else f" ± {s:.2f}"))
PY

echo "Perplexity, protocol $protocol, seqlen ${SEQLEN:-2048}, ${WINDOWS:-all} windows; ± is the standard error over windows."
echo
echo "| checkpoint | ${texts[0]##*/} | ${texts[1]##*/} | ${texts[2]##*/} |"
echo "|---|---|---|---|"
for dir in "$@"; do
    row="| $dir |"
    for text in "${texts[@]}"; do
        if value=$("$python" -m ptq eval "$dir" --text "$text" "${options[@]}" --json - 2>"$errors" | "$python" -c "$cell" 2>/dev/null); then
            row+=" $value |"
        else
            reason=$(tail -n 1 "$errors" | tr '|' '/')
            row+=" n/a (${reason:-no result}) |"
            failed=1
        fi
    done
    echo "$row"
done
exit $failed
