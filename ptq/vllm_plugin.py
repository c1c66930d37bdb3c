"""What vLLM calls when it starts (entry point group vllm.general_plugins), and which packed models it can run; imports nothing of vllm.

vLLM brings its own norms, attention and cache, so a model can run there whose linears are all that `ptq` changed: weights on any grids,
and inputs that are rounded token by token. The rest is refused in one line.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ptq.hf import FORMAT_VERSION
from ptq.hf import register as register_with_transformers

# Linears whose rows vLLM's models load as they are stored, or one after another in a fused layer. Fused on disk, rows are interleaved.
LEAVES = {"q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "gate_proj", "up_proj", "down_proj", "fc1", "fc2"}
DYNAMIC = {"token", "tile", "group4"}


def register() -> None:
    """Make `quant_method` "ptq" and the model types of compressed folders known to vLLM; may run more than once."""
    register_with_transformers()
    from ptq import vllm_linear  # noqa: F401  registers itself


def check_runs(config: Mapping[str, Any]) -> None:
    """Check that vLLM can run a compressed model.

    Args:
        config: the `quantization_config` of a compressed folder.

    Raises:
        ValueError: what it cannot run, in one line.
    """
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(f"packed format version {version!r}, this release of ptq-toolkit reads {FORMAT_VERSION}")
    why = _obstacle(config)
    if why is not None:
        raise ValueError(
            f"vLLM cannot run this packed model: {why}; run it in transformers (import ptq), or make one whose weights alone are "
            "quantized and whose channels keep their order (--method gptq --wbits 4)"
        )


def _obstacle(config: Mapping[str, Any]) -> str | None:
    if config.get("kv_bits", 16) < 16:
        return f"keys and values have grids of {config['kv_bits']} bits, which its cache does not hold"
    if config.get("softmax_bits", 16) < 16:
        return f"softmax outputs are rounded to {config['softmax_bits']} bits"
    found = ((name, _module_obstacle(name, spec)) for name, spec in config.get("modules", {}).items())
    return next((f"{name} {why}" for name, why in found if why), None)


def _module_obstacle(name: str, spec: Mapping[str, Any]) -> str | None:
    if spec["kind"] == "norm":
        changed = spec["permuted"] or spec["rotation"] != 1 or spec["quantizer"] is not None
        return "permutes, rotates or rounds what it normalizes" if changed else None
    if name.rpartition(".")[2] not in LEAVES or ".experts." in name:
        return "is no linear of a plain decoder block"
    if spec["output"] is not None:
        return "rounds its output"
    given = spec["input"]
    if given is not None and given["mode"] not in DYNAMIC:
        return f"has {given['mode']} grids for its input"
    return "spares attention sinks" if given is not None and given["sinks"] else None


def parts_of(prefix: str, fused: Mapping[str, list[str]], modules: Mapping[str, Any]) -> list[Any] | None:
    """The specs of the linears that vLLM's layer `prefix` is made of, in its order; None where it is kept in full precision.

    Args:
        fused: name of a fused layer -> names of its parts, as vLLM's models give it.
        modules: name of a linear -> its spec, as in `quantization_config`.

    Raises:
        ValueError: a fused layer of which only some parts are packed.
    """
    owner, _, leaf = prefix.rpartition(".")
    names = [f"{owner}.{part}" if owner else part for part in fused.get(leaf, [leaf])]
    packed = [name for name in names if name in modules]
    if packed and packed != names:
        raise ValueError(f"{prefix}: only {', '.join(packed)} of {', '.join(names)} are packed; vLLM runs them as one")
    return [modules[name] for name in packed] or None
