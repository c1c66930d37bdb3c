"""Packed models under accelerate's device maps: weights wait on disk, or beside an accelerator, until they are needed.

accelerate offloads parameters and leaves buffers where they compute, so a packed linear's tensors are parameters while a model is
dispatched. The grids of activations stay: they are small, and the cache and the kernels read them outside their module's call.
A linear that waits is laid out for the integer kernels each time it is called, so that it computes what it does in a model loaded whole.
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
    """Within, the lowbit linears in `module` have their tensors."""
    with ExitStack() as stack:
        for linear in _linears(module):
            stack.enter_context(align_module_device(linear))
        yield


def let_go(module: nn.Module) -> bool:
    """Drop what kernels were given of offloaded linears inside `module`, and make it anew at each call; whether there are any."""
    waiting: list[Any] = [linear for linear in _linears(module) if has_offloaded_params(linear)]
    for linear in waiting:
        on_integers, skips = linear.planar is not None, linear.tiles is not None
        linear.planar = linear.tiles = None
        if on_integers or skips:
            hook = linear._hf_hook
            remove_hook_from_module(linear)
            linear.forward = partial(_forward, linear, linear.forward, on_integers)
            add_hook_to_module(linear, hook)  # outside: its tensors are there before `_forward` runs
    return bool(waiting)


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
