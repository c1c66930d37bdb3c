"""Whether the tensors of a packed model fit each other: a damaged checkpoint is refused, it never runs as garbage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from accelerate.utils import align_module_device
from lowbit.hadamard import largest_block
from lowbit.modules import ActivationQuantizer, Linear, Norm
from torch import nn

from ptq.errors import BadInput
from rptq.order import check_permutation, check_sizes

WIDTHS = (*range(2, 9), 16)


def check_packed(model: nn.Module, where: str | Path) -> None:
    """Check every lowbit module of `model`, which was loaded from `where`.

    Raises:
        BadInput: the module and what is wrong with it: group or cluster sizes that do not sum to the channels, a permutation
            that is none, scales that are not positive and finite, zero points or minima that are not finite.
    """
    _check_each(model, where, {Linear: _check_linear, Norm: _check_norm})


def check_grids(model: nn.Module, where: str | Path) -> None:
    """`check_packed` of the activations' grids alone, for a model whose other tensors are not there."""
    _check_each(model, where, {Linear: _check_linear_grids, Norm: _check_norm_grid})


def _check_each(model: nn.Module, where: str | Path, checks: dict[type, Callable]) -> None:
    for name, module in model.named_modules():
        try:
            for kind, check in checks.items():
                if isinstance(module, kind):
                    with align_module_device(module):  # where accelerate offloads it, its tensors come
                        check(module)
        except ValueError as err:
            raise BadInput(f"{where}: {name}: {err}; the checkpoint is corrupt, make it again") from err


def refuse_keys(found: Mapping[str, Iterable[str]], where: str | Path) -> None:
    """BadInput for the first problem of `found` that has names of tensors: the problem, the first of them and how many there are."""
    for problem, all_names in found.items():
        names = sorted(map(str, all_names))
        if names:
            raise BadInput(f"{where}: {problem}: {', '.join(names[:3])} ({len(names)}); the checkpoint is corrupt")


def check_names(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], where: str | Path) -> set[str]:
    """Check the names and shapes of a checkpoint's tensors, of the headers of `where`, against those of `model`, which is on "meta".

    Returns:
        the tied names of the model that the checkpoint leaves out.

    Raises:
        BadInput: other names that it lacks, tensors that nothing wants, or of other shapes.
    """
    wanted, tied = model.state_dict(), set(getattr(model, "all_tied_weights_keys", None) or {})
    absent = wanted.keys() - shapes.keys()
    found = {
        "missing keys": absent - tied,
        "unexpected keys": shapes.keys() - wanted.keys(),
        "mismatched keys": {n for n in wanted.keys() - absent if shapes[n] != tuple(wanted[n].shape)},
    }
    refuse_keys(found, where)
    return absent


def check_filled(model: nn.Module, where: str | Path) -> None:
    """Check that every stored tensor of `model`, which transformers loaded from `where`, came from a file.

    transformers only warns of tensors that it did not find and leaves packed ones as uninitialized memory. It marks each tensor that it
    loads; where accelerate then moves tensors between several devices the marks are lost, and `check_names` must do.

    Raises:
        BadInput: the tensors that were not loaded.
    """
    devices = set((getattr(model, "hf_device_map", None) or {}).values())
    if len(devices) > 1 or "disk" in devices:
        return
    tensors = model.state_dict(keep_vars=True).items()
    names = [name for name, t in tensors if not getattr(t, "_is_hf_initialized", False)]
    refuse_keys({"missing keys or keys of another shape": names}, where)


def _check_linear(linear: Linear) -> None:
    if linear.bits < 16 and linear.codec == "group4":
        _check_finite("weight_minimum", linear.weight_minimum)
        _check_finite("weight_scale", linear.weight_scale)  # a constant group has scale 0
    elif linear.bits < 16:
        check_sizes(linear.weight_groups.long(), linear.in_features)
        _check_positive("weight_scale", linear.weight_scale)
        _check_fine(linear)
    if linear.sparse is not None:
        linear.kept()  # decoding checks mask and indices against the entries
    _check_rotation(linear.rotation, linear.in_features)
    _check_linear_grids(linear)


def _check_linear_grids(linear: Linear) -> None:
    _check_quantizer("input grid", linear.input_quantizer, linear.in_features)
    _check_quantizer("output grid", linear.output_quantizer, linear.out_features)


def _check_fine(linear: Linear) -> None:
    if linear.fine is None:
        return
    fine, G, K = linear.weight_fine.long(), linear.groups, linear.fine["channels"]
    ascending = bool((fine.diff() > 0).all()) and 0 <= int(fine[0]) and int(fine[-1]) < G
    if not ascending or int(linear.weight_groups[fine].sum()) != K or linear.bits > 4:
        raise ValueError(f"weight_fine {fine.tolist()} of {G} groups and {linear.bits} bits is not {K} channels")


def _check_norm(norm: Norm) -> None:
    if norm.permutation is not None:
        check_permutation(norm.permutation.long(), norm.permutation.numel())
    _check_rotation(norm.rotation, norm.channels)
    _check_norm_grid(norm)


def _check_norm_grid(norm: Norm) -> None:
    _check_quantizer("grid", norm.quantizer, norm.channels)


def _check_quantizer(what: str, quantizer: ActivationQuantizer | None, channels: int) -> None:
    if quantizer is None or quantizer.mode not in ("static", "tile"):
        return
    check_sizes(quantizer.sizes.long(), channels)
    if quantizer.mode == "static":
        _check_positive(f"{what}: scale", quantizer.scale)
        _check_finite(f"{what}: zero", quantizer.zero)
    odd = sorted(set(quantizer.bits.tolist()) - set(WIDTHS))
    if odd:
        raise ValueError(f"{what}: {odd[0]} bits")


def _check_rotation(block: int, channels: int) -> None:
    if block < 1 or channels % block or largest_block(block) != block:
        raise ValueError(f"a rotation of blocks of {block} does not fit {channels} channels")


def _check_positive(what: str, t: torch.Tensor) -> None:
    bad = t.numel() - int((torch.isfinite(t) & (t > 0)).sum())
    if bad:
        raise ValueError(f"{what}: {bad} of {t.numel()} are not positive and finite")


def _check_finite(what: str, t: torch.Tensor) -> None:
    bad = t.numel() - int(torch.isfinite(t).sum())
    if bad:
        raise ValueError(f"{what}: {bad} of {t.numel()} are not finite")
