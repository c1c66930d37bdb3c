"""Packed models under accelerate's device maps: weights wait on disk, or beside an accelerator, until they are needed.

accelerate offloads parameters and leaves buffers where they compute, so a packed linear's tensors are parameters while a model is
dispatched. The grids of activations stay: they are small, and the cache and the kernels read them outside their module's call.
What waits is laid out for the integer kernels each time it is called, a linear or a whole block, so that it computes what it does in a
model loaded whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from accelerate.utils import align_module_device, has_offloaded_params
from lowbit import integer
from lowbit.decode_stream import StreamedDecoder
from lowbit.modules import ActivationQuantizer, Linear
from torch import nn


def show_parameters(model: nn.Module) -> None:
    """Make the tensors of every lowbit Linear frozen parameters; `settle` undoes it where nothing is offloaded."""
    for linear in _linears(model):
        for name, tensor in list(linear.named_buffers(recurse=False)):
            del linear._buffers[name]
            linear.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


def settle(model: nn.Module) -> None:
    """After accelerate has dispatched the model: buffers again of what is not offloaded, and the grids of activations in their place."""
    for linear in _linears(model):
        for name, parameter in list(linear.named_parameters(recurse=False)):
            if has_offloaded_params(linear):
                parameter.requires_grad_(False)  # transformers asks for gradients of all that is floating
            else:
                del linear._parameters[name]
                linear.register_buffer(name, parameter.detach())
    for quantizer in model.modules():
        if isinstance(quantizer, ActivationQuantizer) and any(t.is_meta for t in quantizer.buffers()):
            hook = quantizer._hf_hook  # accelerate was told to offload buffers too
            remove_hook_from_module(quantizer)
            for name in list(quantizer._buffers):
                quantizer._buffers[name] = hook.weights_map[name].to(hook.execution_device)


@contextmanager
def at_hand(module: nn.Module) -> Iterator[None]:
    """Within, all that is in `module` has its tensors."""
    with ExitStack() as stack:
        for part in module.modules():
            stack.enter_context(align_module_device(part))
        yield


@contextmanager
def laid_out(module: nn.Module, waiting: dict[Linear, bool]) -> Iterator[None]:
    """`at_hand`, and those linears in `module` are laid out of which `waiting` (`let_go`) says so."""
    linears = [linear for linear in _linears(module) if waiting.get(linear)]
    with at_hand(module):
        for linear in linears:
            linear.planar = integer.laid_out(linear)
        try:
            yield
        finally:
            for linear in linears:
                linear.planar = None


def let_go(module: nn.Module) -> dict[Linear, bool]:
    """Drop what kernels were given of offloaded linears inside `module`, and make it anew at each call.

    Returns:
        these linears, and whether each runs on integer kernels.
    """
    waiting = {linear: linear.planar is not None for linear in _linears(module) if has_offloaded_params(linear)}
    linear: Any
    for linear, on_integers in waiting.items():
        skips = linear.tiles is not None
        linear.planar = linear.tiles = None
        if on_integers or skips:
            hook = linear._hf_hook
            remove_hook_from_module(linear)
            linear.forward = partial(_forward, linear, linear.forward, on_integers)
            add_hook_to_module(linear, hook)  # outside: its tensors are there before `_forward` runs
    return waiting


def streamed_decoder(waiting: dict[Linear, bool], blocks: list[nn.Module], *how: Any) -> StreamedDecoder:
    """Native steps through blocks that get their tensors when they run. waiting: of `let_go`, how: roles and shape."""

    @contextmanager
    def visit(i: int) -> Iterator[None]:
        with laid_out(blocks[i], waiting):
            decoder.read(i)
            try:
                yield
            finally:
                decoder.forget(i)

    decoder = StreamedDecoder(blocks, *how, visit=visit)
    return decoder


def _forward(linear: Linear, run, on_integers: bool, x: torch.Tensor) -> torch.Tensor:
    if on_integers:
        linear.planar = integer.laid_out(linear)
    else:
        linear.skip_zeros_()
    try:
        return run(x)
    finally:
        linear.planar = linear.tiles = None


def _linears(model: nn.Module) -> list[Linear]:
    return [module for module in model.modules() if isinstance(module, Linear)]
