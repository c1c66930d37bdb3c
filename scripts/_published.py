"""Perplexities printed in the SparseGPT paper (arXiv 2301.00774v3), digit for digit.

Tables 1 (raw WikiText-2), 3 (PTB) and 4 (C4): OPT at 50% unstructured, 4:8 and 2:4, 128 windows of 2048 tokens of C4.
"""

MODELS = (
    "facebook/opt-125m",
    "facebook/opt-350m",
    "facebook/opt-1.3b",
    "facebook/opt-2.7b",
    "facebook/opt-6.7b",
    "facebook/opt-13b",
    "facebook/opt-30b",
    "facebook/opt-66b",
)

# text -> row -> one entry for each of MODELS; "-" is not in the paper
PERPLEXITY = {
    "wikitext2": {
        "full": "27.66 22.00 14.62 12.47 10.86 10.13 9.56 9.34",
        "magnitude-50": "193. 97.80 1.7e4 265. 969. 1.2e4 168. 4.2e3",
        "sparsegpt-50": "36.85 31.58 17.46 13.48 11.55 11.17 9.79 9.32",
        "sparsegpt-4:8": "- - - 14.98 12.56 11.77 10.30 9.65",
        "sparsegpt-2:4": "- - - 17.18 14.20 12.96 10.90 10.09",
    },
    "ptb": {
        "full": "38.99 31.07 20.29 17.97 15.77 14.52 14.04 13.36",
        "magnitude-50": "276. 126. 3.1e3 262. 613. 1.8e4 221. 4.0e3",
        "sparsegpt-50": "55.06 43.80 25.80 20.45 17.44 15.97 14.98 14.15",
        "sparsegpt-4:8": "- - - 23.02 18.84 17.23 15.68 14.68",
        "sparsegpt-2:4": "- - - 26.88 21.57 18.71 16.62 15.41",
    },
    "c4": {
        "full": "26.56 22.59 16.07 14.32 12.71 12.06 11.45 10.99",
        "magnitude-50": "141. 77.04 403. 63.43 334. 1.1e4 98.49 2.9e3",
        "sparsegpt-50": "33.42 29.18 19.36 15.78 13.73 12.97 11.97 11.41",
        "sparsegpt-4:8": "- - - 17.21 14.77 13.76 12.48 11.77",
        "sparsegpt-2:4": "- - - 19.36 16.40 14.85 13.17 12.25",
    },
}
