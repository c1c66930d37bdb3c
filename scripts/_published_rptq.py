"""Perplexities that others printed for the rows of the RPTQ table, digit for digit, each with where it was printed.

Every line of numbers has one entry for each of OPT or LLAMA; "-" was not printed there.
"""

OPT = (
    "facebook/opt-1.3b",
    "facebook/opt-6.7b",
    "facebook/opt-13b",
    "facebook/opt-30b",
    "facebook/opt-66b",
)
LLAMA = (
    "huggyllama/llama-7b",
    "huggyllama/llama-13b",
    "meta-llama/Llama-2-7b-hf",
    "meta-llama/Llama-2-13b-hf",
    "meta-llama/Llama-2-70b-hf",
    "meta-llama/Meta-Llama-3-8B",
    "meta-llama/Meta-Llama-3-70B",
)

# README of github.com/hahnyuan/RPTQ4LLM at 9619069: text -> setting -> OPT
RPTQ = {
    "wikitext2": {
        "FP16": "14.63 10.86 10.13 9.56 9.34",
        "W4A16": "14.78 11.18 10.29 9.55 9.30",
        "W4A8": "15.39 11.21 10.90 10.22 9.46",
        "W4A4": "16.88 12.00 12.74 11.15 12.23",
        "W4A4KV": "15.26 11.26 10.59 9.99 9.75",
        "W4A3KV": "17.22 11.92 11.15 11.62 10.88",
        "W3A3KV": "18.45 12.42 11.47 11.76 11.47",
    },
    "ptb": {
        "FP16": "16.96 13.09 12.34 11.84 11.36",
        "W4A16": "17.21 13.62 12.45 11.91 11.42",
        "W4A8": "17.79 13.74 13.40 12.41 11.73",
        "W4A4": "19.23 15.17 15.76 14.11 18.87",
        "W4A4KV": "17.65 13.44 12.80 12.18 11.64",
        "W4A3KV": "19.94 14.13 13.90 14.95 14.69",
        "W3A3KV": "21.33 14.48 14.08 14.98 15.03",
    },
    "c4": {
        "FP16": "14.72 11.74 11.20 10.69 10.28",
        "W4A16": "14.92 12.07 11.27 10.74 10.31",
        "W4A8": "15.48 12.11 11.62 11.01 10.57",
        "W4A4": "16.55 12.85 14.71 13.48 15.93",
        "W4A4KV": "15.37 12.03 11.54 11.01 10.61",
        "W4A3KV": "16.92 12.61 12.04 11.96 11.36",
        "W3A3KV": "18.26 13.13 12.41 12.22 11.75",
    },
}

# OmniQuant (arXiv 2308.13137), Table A25: 4 bits for weights and all activations but the softmax: text -> method -> OPT
OMNIQUANT_A25 = {
    "wikitext2": {
        "SmoothQuant": "- 1.8e4 7.4e3 1.2e4 2.2e5",
        "RPTQ": "- 17.83 16.45 11.50 11.16",
        "OmniQuant": "- 12.24 11.65 10.60 10.29",
    },
    "ptb": {
        "SmoothQuant": "- 1.4e4 6.5e3 7.8e3 1.0e5",
        "RPTQ": "- 25.10 23.01 14.87 13.73",
        "OmniQuant": "- 15.54 15.89 13.75 13.19",
    },
    "c4": {
        "SmoothQuant": "- 1.5e4 5.6e3 8.3e3 1.8e5",
        "RPTQ": "- 19.91 16.80 12.81 11.78",
        "OmniQuant": "- 13.56 13.46 11.89 11.35",
    },
}

# WikiText-2, 4 bits for weights, activations, keys and values: (method, where it was printed, LLAMA)
LLAMA_FULL = (
    ("full precision", "FlatQuant's README", "- - 5.47 4.88 3.32 6.14 2.86"),
    ("full precision", "QServe's README", "5.68 5.09 5.47 4.88 3.32 6.14 -"),
)
LLAMA_SMOOTHQUANT = (("SmoothQuant", "FlatQuant's README", "- - 83.12 35.88 26.01 210.19 9.60"),)
LLAMA_ATOM = (
    ("Atom, groups of 128, 128 channels at 8 bits", "Atom's figures", "6.16 5.46 6.03 5.27 3.68 - -"),
    ("Atom, groups of 128", "QServe's README", "6.25 5.52 6.12 5.31 3.73 7.76 -"),
    ("Atom", "DuQuant's figures", "8.15 7.43 8.40 6.96 NaN 22.14 -"),
)
LLAMA_QUAROT = (
    ("QuaRot, GPTQ", "FlatQuant's README", "- - 6.10 5.40 3.79 8.16 6.60"),
    ("QuaRot, round to nearest", "FlatQuant's README", "- - 8.56 6.10 4.14 10.60 55.44"),
    ("QuaRot", "QServe's README", "6.34 5.58 6.19 5.45 3.83 8.33 -"),
)
LLAMA_OTHERS = (
    ("SpinQuant", "SpinQuant's README", "- - 5.9 5.3 3.8 7.3 5.5"),
    ("SpinQuant, GPTQ", "FlatQuant's README", "- - 5.96 5.24 3.70 7.39 6.21"),
    ("DuQuant", "DuQuant's figures", "6.40 5.65 6.28 5.42 3.79 8.56 -"),
    ("DuQuant, learned clipping", "DuQuant's figures", "6.18 5.47 6.08 5.33 3.76 8.06 -"),
    ("FlatQuant, round to nearest", "FlatQuant's README", "- - 5.79 5.12 3.55 6.98 3.78"),
    ("FlatQuant, GPTQ", "FlatQuant's README", "- - 5.78 5.11 3.54 6.90 3.77"),
)
