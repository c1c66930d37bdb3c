#!/usr/bin/env python3
"""The SparseGPT paper's perplexity tables (arXiv 2301.00774, Tables 1, 3 and 4), and the same rows on any other model.

usage: python scripts/reproduce_sparsegpt.py [--model FOLDER|ID ...] [--rows NAME ...] [--seeds 0 1 2] [--calib c4|FILE]
           [--texts wikitext2 ptb c4|FILE ...] [--nsamples 128] [--seqlen 2048] [--windows N] [--device auto]
           [--keep DIR] [--name sparsegpt] [--out results]

Without --model: OPT from 125M to 66B, from the hub. Each row is one `ptq prune`, then one `ptq eval` a text, under protocol
`sparsegpt`. OUT/NAME.json and OUT/NAME.md are written after each row, and a row that is there is not measured again, so an
interrupted table goes on where it stopped. Pruned checkpoints lie in TMPDIR while they are measured. Exit 2: bad input, or
a model or text that cannot be had.
"""

import sys

from _published import MODELS, PERPLEXITY
from _reproduce import main, parsed, parser_of
from _rows import Printed, Row, Table

HALF, PLAIN = ("--sparsity", "0.5"), ("--method", "sparsegpt", "--refine", "none", "--set", "weights.asymmetric=0")
BEST = ("--method", "admm", "--refine", "pcg:15", "--set", "weights.asymmetric=0.5")
ROWS = (
    Row("full", "full precision", None, seeded=False),
    Row("magnitude-50", "magnitude 50%", (*HALF, "--method", "magnitude", "--refine", "none"), seeded=False),
    Row("wanda-50", "Wanda 50%", (*HALF, "--method", "wanda", "--refine", "none")),
    Row("sparsegpt-50", "SparseGPT 50%", (*HALF, *PLAIN)),
    Row("sparsegpt-4:8", "SparseGPT 4:8", ("--nm", "4:8", *PLAIN)),
    Row("sparsegpt-2:4", "SparseGPT 2:4", ("--nm", "2:4", *PLAIN)),
    Row("joint-50-w4", "SparseGPT 50% + 4-bit", (*HALF, "--wbits", "4", *PLAIN)),
    Row("best-50", "ADMM + PCG, asymmetric 50%", (*HALF, *BEST)),
    Row("best-4:8", "ADMM + PCG, asymmetric 4:8", ("--nm", "4:8", *BEST)),
    Row("best-2:4", "ADMM + PCG, asymmetric 2:4", ("--nm", "2:4", *BEST)),
)
NOTE = (
    "Lines marked (paper) are arXiv 2301.00774, Tables 1, 3 and 4, as printed: calibrated on 128 x 2048 tokens of"
    " C4, evaluated on all windows, {held} of this table."
)
TITLES = {row.name: row.title for row in ROWS}
PRINTED = tuple(
    Printed(f"{TITLES[row]} (paper)", text, row, MODELS, numbers, NOTE)
    for text, rows in PERPLEXITY.items()
    for row, numbers in rows.items()
)
TABLE = Table(
    verb="prune",
    protocol="sparsegpt",
    title="SparseGPT's tables",
    legend="4:8 keeps 4 of every 8, 2:4 keeps 2 of every 4.",
    rows=ROWS,
    printed=PRINTED,
    name="sparsegpt",
    models=MODELS,
    texts=("wikitext2", "ptb", "c4"),
    calib="c4",
)


def parse(words=None):
    """The command line."""
    return parsed(TABLE, parser_of(TABLE, __doc__), words)


if __name__ == "__main__":
    sys.exit(main(TABLE, parse()))
