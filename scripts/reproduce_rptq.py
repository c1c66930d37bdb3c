#!/usr/bin/env python3
"""The RPTQ paper's perplexity table (arXiv 2304.01089) on OPT, W4A4KV4 on LLaMA, and the same rows on any other model.

usage: python scripts/reproduce_rptq.py [--table opt|llama] [--model FOLDER|ID ...] [--rows NAME ...] [--seeds 0 1 2]
           [--calib wikitext2,ptb,c4|FILE] [--texts wikitext2 ptb c4|FILE ...] [--nsamples 128] [--seqlen 2048]
           [--mode first|random] [--windows N] [--device auto] [--keep DIR] [--name rptq] [--out results]

Without --model: OPT from 1.3B to 66B, from the hub, all rows on three texts; with --table llama: LLaMA 1 to 3 on
wikitext2, full precision and the rows of W4A4KV4, as table `rptq-llama`. Each row is one `ptq quantize`, then one
`ptq eval` a text, under protocol `rptq`. OUT/NAME.json and OUT/NAME.md are written after each row, and a row that is
there is not measured again, so an interrupted table goes on where it stopped. Quantized checkpoints lie in TMPDIR while
they are measured. Exit 2: bad input, or a model or text that cannot be had.
"""

import argparse
import sys
from dataclasses import replace

from _published_rptq import (
    LLAMA,
    LLAMA_ATOM,
    LLAMA_FULL,
    LLAMA_OTHERS,
    LLAMA_QUAROT,
    LLAMA_SMOOTHQUANT,
    OMNIQUANT_A25,
    OPT,
    RPTQ,
)
from _reproduce import main, parsed, parser_of
from _rows import Printed, Row, Table

PAPER_PRESETS = ("W4A16", "W4A8", "W4A4", "W4A4KV", "W4A3KV", "W3A3KV")
ALL_4 = "W4A4KV4"
STATIC, TOKEN = ("--act-grid", "cluster"), ("--act-grid", "token", "--groups", "64")
HALF = ("--set", "pruning.sparsity=0.5", "--set", "pruning.storage=packed")
# Atom's tiles are a share of each site's, which rounds otherwise than a share of a block's: no fewer 8-bit ones than in RPTQ+
EQUAL_BITS = ("--set", "clusters.wide=0.1875")
# in quotes, because YAML reads 2:4 as a number in base 60; an act-order would tear the groups of 4 apart
TWO_OF_4 = ("--set", "pruning.keep='2:4'", "--set", "pruning.storage=packed", "--set", "weights.act_order=false")


# What each ingredient of rptq+ is worth: the row without it, as told and as set.
WITHOUT = {
    "rotate": ("Hadamard", "clusters.rotate=false"),
    "wide": ("8-bit tiles", "clusters.wide=0"),
    "allot": ("tiles that compete", "clusters.allot=site"),
    "sinks": ("spared sinks", "activations.sinks=0"),
    "clip": ("clipping", "activations.clip=false"),
    "asymmetric": ("asymmetric targets", "weights.asymmetric=0"),
    "descend": ("descent on codes", "weights.descend=0"),
    "damp": ("more damping", "weights.damp=0.01"),
    "fine": ("fine weight groups", "weights.fine=0"),
    "narrow": ("narrowed weight grids", "weights.clip=false"),
    "sequence": ("true sequence", "true_sequential=false", "weights.asymmetric=0"),
}


def quantized(preset, name, title, method, *more):
    """The row of one method under one preset."""
    return Row(f"{preset}-{name}", f"{title} {preset}", ("--method", method, "--preset", preset, *more))


def paper_rows(preset):
    """The method and its successor, both with static grids."""
    return (
        quantized(preset, "rptq", "RPTQ", "rptq"),
        quantized(preset, "rptq+static", "RPTQ+ static", "rptq+", *STATIC),
    )


def ablated(form, title, *options):
    """W4A4KV4 in one form, each time without one ingredient; a grid of each token's own clips nothing at 4 bits."""
    return tuple(
        quantized(
            ALL_4,
            f"{form}-no-{what}",
            f"{title} without {told}",
            "rptq+",
            *options,
            *(word for key in keys for word in ("--set", key)),
        )
        for what, (told, *keys) in WITHOUT.items()
        if what != "clip" or options
    )


ROWS = (
    Row("full", "full precision", None, seeded=False),
    *(row for preset in PAPER_PRESETS for row in paper_rows(preset)),
    quantized(ALL_4, "rptq+", "RPTQ+", "rptq+"),
    quantized(ALL_4, "rptq+static", "RPTQ+ static", "rptq+", *STATIC),
    quantized(ALL_4, "rtn", "round to nearest", "rtn", *TOKEN),
    quantized(ALL_4, "gptq", "GPTQ", "gptq", *TOKEN),
    quantized(ALL_4, "smoothquant", "SmoothQuant", "smoothquant", *TOKEN),
    quantized(ALL_4, "peg", "PEG", "peg"),
    quantized(ALL_4, "atom", "Atom", "atom", *EQUAL_BITS),
    quantized(ALL_4, "quarot", "QuaRot", "quarot"),
    quantized(ALL_4, "rptq", "RPTQ", "rptq"),
    quantized(ALL_4, "rptq+50", "RPTQ+ 50% zeros", "rptq+", *HALF),
    quantized(ALL_4, "rptq+2:4", "RPTQ+ 2:4", "rptq+", *TWO_OF_4),
    *ablated("rptq+", "RPTQ+"),
    quantized(ALL_4, "rptq+-balanced", "RPTQ+ with balanced channels", "rptq+", "--set", "clusters.balance=true"),
    *ablated("rptq+static", "RPTQ+ static", *STATIC),
)
RPTQ_NOTE = (
    "Lines marked (RPTQ's README) are as printed at github.com/hahnyuan/RPTQ4LLM: calibrated on 128 x 2048 tokens of"
    " WikiText-2, PTB and C4, evaluated on all windows, {held} of this table."
)
OMNIQUANT_NOTE = (
    "Lines marked (OmniQuant, Table A25) are as printed in arXiv 2308.13137, on RPTQ's texts and windows: 4 bits for"
    " weights and all activations but the softmax, also for queries, which W4A4KV4 leaves in full precision."
)
LLAMA_NOTE = (
    "Other lines with a source in brackets are as printed there, on WikiText-2 in windows of 2048 tokens: 4 bits for"
    " weights, activations, keys and values, each calibrated in its own way and with its own exceptions."
)


def rptq_lines():
    """RPTQ's README, each setting below its row."""
    rows = {"FP16": "full", **{preset: f"{preset}-rptq" for preset in PAPER_PRESETS}}
    titles = {row.name: row.title for row in ROWS}
    return [
        Printed(f"{titles[rows[setting]]} (RPTQ's README)", text, rows[setting], OPT, numbers, RPTQ_NOTE)
        for text, lines in RPTQ.items()
        for setting, numbers in lines.items()
    ]


def omniquant_lines():
    """OmniQuant's comparison on OPT, each method below its row; its own below the table."""
    rows = {"SmoothQuant": f"{ALL_4}-smoothquant", "RPTQ": f"{ALL_4}-rptq", "OmniQuant": None}
    return [
        Printed(f"{method} W4A4 (OmniQuant, Table A25)", text, rows[method], OPT, numbers, OMNIQUANT_NOTE)
        for text, lines in OMNIQUANT_A25.items()
        for method, numbers in lines.items()
    ]


def llama_lines():
    """What was printed for LLaMA, below the row of the same method, if there is one."""
    beside = {
        "full": LLAMA_FULL,
        f"{ALL_4}-smoothquant": LLAMA_SMOOTHQUANT,
        f"{ALL_4}-atom": LLAMA_ATOM,
        f"{ALL_4}-quarot": LLAMA_QUAROT,
        None: LLAMA_OTHERS,
    }
    return [
        Printed(f"{method} ({source})", "wikitext2", row, LLAMA, numbers, LLAMA_NOTE)
        for row, lines in beside.items()
        for method, source, numbers in lines
    ]


OPT_TABLE = Table(
    verb="quantize",
    protocol="rptq",
    title="RPTQ's table",
    legend=(
        "W4A4 keeps norm outputs and softmax at 8 bits; settings that end in KV quantize weights, keys and values;"
        " W4A4KV4 weights, the input of every linear, keys and values. Effective bits count scales and zero"
        " points, of weights permutations too, of cached keys and values the cosines and sines of rotary embeddings; 16 is"
        " full precision. They leave out the first token of a sequence, which RPTQ+ keeps in full precision. 2:4 keeps 2"
        " of every 4 weights."
    ),
    rows=ROWS,
    printed=(*rptq_lines(), *omniquant_lines(), *llama_lines()),
    name="rptq",
    models=OPT,
    texts=("wikitext2", "ptb", "c4"),
    calib="wikitext2,ptb,c4",
    modes=("first", "random"),
    detailed=True,
)
LLAMA_TABLE = replace(
    OPT_TABLE,
    title="W4A4KV4 on LLaMA",
    name="rptq-llama",
    models=LLAMA,
    texts=("wikitext2",),
    measured=tuple(row.name for row in ROWS if row.name == "full" or row.name.startswith(f"{ALL_4}-")),
    chosen_by=("--table", "llama"),
)
TABLES = {"opt": OPT_TABLE, "llama": LLAMA_TABLE}


def parse(words=None):
    """(table, command line)."""
    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--table", choices=TABLES, default="opt", help="whose models, texts and rows (opt)")
    table = TABLES[chooser.parse_known_args(words)[0].table]
    return table, parsed(table, parser_of(table, __doc__, parents=[chooser]), words)


if __name__ == "__main__":
    sys.exit(main(*parse()))
