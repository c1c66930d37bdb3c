"""Teach transformers the packed format: `from_pretrained` on a compressed folder builds lowbit modules and fills them.

A compressed config's model_type is "ptq_<family>". Only `import ptq` makes that name known, so without it transformers stops with an
unknown model type; under the family's own name it would warn about the quantization method and run random weights.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from typing import Any

QUANT_METHOD = "ptq"
FORMAT_VERSION = 4
MODEL_TYPE_PREFIX = "ptq_"
AUTO_MODELS = "transformers.models.auto.modeling_auto"


def _register_configs() -> None:
    """One config class a family, named like the original, because transformers maps config class *names* to model classes.

    AutoConfig.register looks at transformers' table of models, so nothing can be done while that is still being imported.
    """
    if AUTO_MODELS in sys.modules and not hasattr(sys.modules[AUTO_MODELS], "MODEL_MAPPING_NAMES"):
        return
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

    from ptq.architectures.families import FAMILIES

    for family in FAMILIES:
        base = CONFIG_MAPPING[family]
        packed = type(base.__name__, (base,), {"model_type": MODEL_TYPE_PREFIX + family, "__module__": __name__})
        AutoConfig.register(MODEL_TYPE_PREFIX + family, packed, exist_ok=True)


def _register_quantizer() -> None:
    from transformers.quantizers.auto import (
        AUTO_QUANTIZATION_CONFIG_MAPPING,
        register_quantization_config,
        register_quantizer,
    )

    if QUANT_METHOD in AUTO_QUANTIZATION_CONFIG_MAPPING:
        return
    from ptq.hf_quantizer import PtqConfig, PtqQuantizer

    register_quantization_config(QUANT_METHOD)(PtqConfig)
    register_quantizer(QUANT_METHOD)(PtqQuantizer)


# transformers takes seconds to import and the command's --help must not wait for it: registration runs when these are imported.
AFTER = {
    "transformers.models.auto.configuration_auto": _register_configs,
    AUTO_MODELS: _register_configs,
    "transformers.modeling_utils": _register_quantizer,  # which imports the quantizers and the attention registry
}


class _AfterImport(importlib.abc.MetaPathFinder):
    """Runs AFTER[name] once the module `name` has been imported."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        """The module's own spec, its loader extended by AFTER[name]; None for every other module."""
        if name not in AFTER:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            AFTER[name]()

        # of this one loader, which importlib made for this import
        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Register with transformers now where it is imported, else as soon as it is. Calling it again changes nothing."""
    for name, action in AFTER.items():
        if name in sys.modules:
            action()
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
