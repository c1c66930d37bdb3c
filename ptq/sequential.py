"""Run a block so that each of its linears is compressed on what the compressed linears before it make, and every linear runs once.

All micro-batches go forward together: each stops where it reaches the first linear of a site, and goes on when the linears of that
site are compressed. A stopped forward is a greenlet, so its stack stays as it is, whatever the model's code looks like.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from greenlet import getcurrent, greenlet
from torch import nn

from ptq.sites import InputSite, used_input


@dataclass(frozen=True)
class Forwards:
    """A block and one call of it for each micro-batch."""

    block: nn.Module
    each: list[Callable[[], torch.Tensor]]


def run_paused(
    runs: list[Forwards],
    sites: tuple[InputSite, ...],
    *,
    measure: Callable[..., None],
    finish: Callable[[InputSite], None],
) -> list[list[torch.Tensor]]:
    """The outputs of each run's forwards, in order.

    runs: the block to compress, and perhaps others that go beside it on the same tokens.
    measure(site, x, ...): called for every micro-batch that reaches the site, x [..., C] of each run as the linear will use it; at an
        expert's site of the first run alone, for the others may send it other tokens.
    finish(site): called once for every site, after all of them: compresses the site's linears, which no forward has run yet.
    """
    with ExitStack() as stack:
        paused = [stack.enter_context(_paused(run, sites, first=run is runs[0])) for run in runs]
        for i, site in enumerate(sites):
            there = [n for n, found in enumerate(paused[0].results) if _at(found, i)]
            beside = _together(paused, site)
            for n in there:
                measure(site, *(p.results[n].x for p in beside))
            finish(site)
            for p in beside:
                for n in there:
                    p.results[n] = p.running[n].switch()
        late = [found.site for found in paused[0].results if isinstance(found, _Reached)]
        if late:
            raise RuntimeError(f"site {sites[late[0]].name} was reached after a later one: its spec lists them wrongly")
        return [p.results for p in paused]


def run_again(
    runs: list[Forwards],
    sites: tuple[InputSite, ...],
    *,
    measure: Callable[..., None],
    finish: Callable[[InputSite], None],
) -> list[list[torch.Tensor]]:
    """The same, bit for bit, with one forward alive at a time: runs up to each site anew. For calibration sets beyond memory."""
    for site in sites:
        beside = _together(runs, site)
        for forwards in zip(*(run.each for run in beside)):
            inputs = [_input_of(run.block, site, forward) for run, forward in zip(beside, forwards)]
            if inputs[0] is not None:
                measure(site, *inputs)
        finish(site)
    return [[forward() for forward in run.each] for run in runs]


def _together(runs: list, site: InputSite) -> list:
    """Those of `runs` that bring the same tokens to the site."""
    return runs if site.expert is None else runs[:1]


class _Reached:
    def __init__(self, site: int, x: torch.Tensor):
        self.site, self.x = site, x


@dataclass
class _Paused:
    running: list[greenlet]
    results: list[_Reached | torch.Tensor]


@contextmanager
def _paused(run: Forwards, sites: tuple[InputSite, ...], *, first: bool) -> Iterator[_Paused]:
    """Every forward up to the first site where it stops."""
    driver = getcurrent()

    def pause(site: int):
        def stop(entry: nn.Module, args) -> None:  # what a hook returns would become the input
            driver.switch(_Reached(site, used_input(entry, args[0])))

        return stop

    stops = [(i, site.entry) for i, site in enumerate(sites) if first or site.expert is None]
    handles = [run.block.get_submodule(entry).register_forward_pre_hook(pause(i)) for i, entry in stops]
    running = [greenlet(forward) for forward in run.each]
    try:
        yield _Paused(running, [g.switch() for g in running])
    finally:
        for handle in handles:
            handle.remove()
        for g in running:
            if g:  # an error ended the run: unwind what is still stopped
                g.throw()


def _at(found: _Reached | torch.Tensor, site: int) -> bool:
    return isinstance(found, _Reached) and found.site == site


class _Enough(Exception):
    """The site's input is known; what follows is not needed yet."""


def _input_of(block: nn.Module, site: InputSite, forward: Callable[[], torch.Tensor]) -> torch.Tensor | None:
    """What `forward` brings to the site, None where it does not reach it."""
    found = []

    def stop(entry: nn.Module, args) -> None:
        found.append(used_input(entry, args[0]))
        raise _Enough

    handle = block.get_submodule(site.entry).register_forward_pre_hook(stop)
    try:
        forward()
    except _Enough:
        return found[0]
    finally:
        handle.remove()
    return None
