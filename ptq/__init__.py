"""Post-training compression of language models. `import ptq` makes transformers load compressed checkpoints.

import ptq
model = ptq.load("my-model-W4A8")
"""

from __future__ import annotations

from typing import Any

from ptq.hf import register

__version__ = "0.1.0"
__all__ = ["load", "load_tokenizer"]

register()


def __getattr__(name: str) -> Any:
    if name in __all__:
        from ptq import checkpoint

        return getattr(checkpoint, name)
    raise AttributeError(f"module 'ptq' has no attribute {name!r}")
