"""What a model rounds at run time, and what of it a foreign format cannot say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from lowbit.modules import ActivationQuantizer, Linear, Norm
from torch import nn

from ptq.architectures import Spec
from ptq.blocks import linear_paths, norm_paths
from ptq.errors import BadInput
from ptq.export.source import Source

INPUTS, HEADS = "inputs of linears", "queries, keys and values"
Takes = Callable[[Linear | Norm, ActivationQuantizer], bool]


def leave_out(source: Source, name: str, takes: Takes | None, *, weights_only: bool) -> list[str]:
    """What the model rounds at run time that the format `name` cannot say, one line each; it is taken out of `source.model`.

    Args:
        takes: whether the format can say how the input of linears is rounded, by the module that does it; None for never.
        weights_only: leave out all of it.

    Raises:
        BadInput: there is some, and `weights_only` is off.
    """
    if not source.packed:
        return []
    found: Counter[str] = Counter()
    for block in source.model.get_submodule(source.spec.blocks):
        for what, module, quantizer in list(_roundings(source.spec, block)):
            if weights_only or what != INPUTS or takes is None or not takes(module, quantizer):
                found[f"{what} ({_described(quantizer)})"] += 1
                _take_out(module, quantizer)
    lines = [f"{line} in {count} places" for line, count in found.items()]
    for what, key in (("attention probabilities", "softmax_bits"), ("the key and value cache", "kv_bits")):
        bits = dict(source.checkpoint.config.quantization_config).get(key, 16)
        lines += [f"{what} ({bits} bits)"] if bits < 16 else []
    if lines and not weights_only:
        what = f"{name} cannot say how this model rounds {'; '.join(lines)}"
        raise BadInput(f"{source.folder}: {what}; --weights-only leaves all rounding of activations out")
    return lines


def _roundings(spec: Spec, block: nn.Module) -> Iterator[tuple[str, Linear | Norm, ActivationQuantizer]]:
    for path in linear_paths(spec, block):
        linear = block.get_submodule(path)
        if linear.input_quantizer is not None:
            yield INPUTS, linear, linear.input_quantizer
        if linear.output_quantizer is not None:
            yield HEADS, linear, linear.output_quantizer
    for path in norm_paths(spec):
        norm = block.get_submodule(path)
        if norm.quantizer is not None:
            yield (HEADS if path in (spec.head_norms or ()) else INPUTS), norm, norm.quantizer


def _take_out(module: Linear | Norm, quantizer: ActivationQuantizer) -> None:
    for attribute in ("input_quantizer", "output_quantizer", "quantizer"):
        if getattr(module, attribute, None) is quantizer:
            setattr(module, attribute, None)


def _described(quantizer: ActivationQuantizer) -> str:
    grids = {
        "static": "one static grid" if quantizer.clusters == 1 else "a static grid a cluster",
        "tile": "a token's own grid in each tile",
        "token": f"a token's own {quantizer.token_bits}-bit grid",
        "group4": "4-bit groups of 64",
    }
    return grids[quantizer.mode] + (f", {quantizer.sinks} tokens spared" if quantizer.sinks else "")
