"""Run a block so that each of its linears is compressed on what the compressed linears before it make, and every linear runs once.

All micro-batches go forward together: each stops where it reaches the first linear of a site, and goes on when the linears of that
site are compressed. A stopped forward is a greenlet, so its stack stays as it is, whatever the model's code looks like.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from greenlet import getcurrent, greenlet
from torch import nn

from ptq.sites import InputSite, used_input


def run_paused(
    block: nn.Module,
    sites: tuple[InputSite, ...],
    forwards: list[Callable[[], torch.Tensor]],
    *,
    measure: Callable[[InputSite, torch.Tensor], None],
    finish: Callable[[InputSite], None],
) -> list[torch.Tensor]:
    """Outputs of `forwards`, in order.

    measure(site, x): called for every micro-batch that reaches the site, x [..., C] as the linear will use it. finish(site): called once
    for every site, after all of them: compresses the site's linears, which no forward has run yet.
    """
    driver = getcurrent()
    handles = [
        block.get_submodule(site.entry).register_forward_pre_hook(_pause(driver, i)) for i, site in enumerate(sites)
    ]
    running = [greenlet(forward) for forward in forwards]
    try:
        results = [g.switch() for g in running]
        for i, site in enumerate(sites):
            there = [n for n, found in enumerate(results) if isinstance(found, _Reached) and found.site == i]
            for n in there:
                measure(site, results[n].x)
            finish(site)
            for n in there:
                results[n] = running[n].switch()
        late = [found.site for found in results if isinstance(found, _Reached)]
        if late:
            raise RuntimeError(f"site {sites[late[0]].name} was reached after a later one: its spec lists them wrongly")
        return results
    finally:
        for handle in handles:
            handle.remove()
        for g in running:
            if g:  # an error ended the run: unwind what is still stopped
                g.throw()


def run_again(
    block: nn.Module,
    sites: tuple[InputSite, ...],
    forwards: list[Callable[[], torch.Tensor]],
    *,
    measure: Callable[[InputSite, torch.Tensor], None],
    finish: Callable[[InputSite], None],
) -> list[torch.Tensor]:
    """The same, bit for bit, with one forward alive at a time: runs up to each site anew. For calibration sets beyond memory."""
    for site in sites:

        def stop(entry: nn.Module, args, site=site) -> None:
            measure(site, used_input(entry, args[0]))
            raise _Enough

        handle = block.get_submodule(site.entry).register_forward_pre_hook(stop)
        try:
            for forward in forwards:
                try:
                    forward()
                except _Enough:
                    continue
        finally:
            handle.remove()
        finish(site)
    return [forward() for forward in forwards]


class _Reached:
    def __init__(self, site: int, x: torch.Tensor):
        self.site, self.x = site, x


class _Enough(Exception):
    """The site has been measured; what follows is not needed yet."""


def _pause(driver: greenlet, site: int):
    def stop(entry: nn.Module, args) -> None:
        driver.switch(_Reached(site, used_input(entry, args[0])))

    return stop
