"""Post-training compression of language models. `import ptq` makes transformers load compressed checkpoints.

import ptq
result = ptq.quantize("facebook/opt-125m", "opt-125m-w4a8", preset="W4A8")  # and ptq.prune
found = ptq.evaluate(result.folder, text="wikitext2")
model, tokenizer = ptq.load(result.folder), ptq.load_tokenizer(result.folder)
print(result.effective_bits, found["perplexity"])
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ptq.hf import register

if TYPE_CHECKING:
    from ptq.checkpoint import load, load_tokenizer
    from ptq.library import Evaluation, Result, evaluate, prune, quantize

__version__ = "0.1.0"
__all__ = ["Evaluation", "Result", "evaluate", "load", "load_tokenizer", "prune", "quantize"]

register()


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import, so only what is used is
    if name in __all__:
        home = "ptq.checkpoint" if name.startswith("load") else "ptq.library"
        return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module 'ptq' has no attribute {name!r}")
