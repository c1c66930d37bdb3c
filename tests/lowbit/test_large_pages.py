"""Weights beside each other in large pages: the same numbers, no bytes shared, memory given back."""

from __future__ import annotations

import copy
import gc
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from lowbit import large_pages
from lowbit.large_pages import CHUNK, LINE, in_large_pages

advised = pytest.mark.skipif(large_pages._advice is None, reason="this system has no advice on large pages")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (0, 4)])
def test_a_copy_is_the_same_tensor(dtype, shape):
    given = torch.randint(0, 100, shape).to(dtype)
    found = in_large_pages(given)
    assert torch.equal(found, given) and found.dtype == dtype and found.shape == given.shape
    assert found.is_contiguous() and (not given.numel() or found.data_ptr() % LINE == 0)


def test_strided_tensors_become_contiguous():
    given = torch.arange(24).view(4, 6).t()
    assert torch.equal(in_large_pages(given), given) and in_large_pages(given).is_contiguous()


def test_copies_share_no_bytes_whoever_makes_them():
    given = [torch.full((size,), i, dtype=torch.int32) for i, size in enumerate((1, 17, 4096, 5, 300_000) * 8)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(in_large_pages, given))
    assert all(torch.equal(a, b) for a, b in zip(found, given))
    ranges = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in found)
    assert all(end <= start for (_, end), (start, _) in zip(ranges, ranges[1:]))


@advised
def test_more_than_a_chunk_has_memory_of_its_own_and_all_is_given_back():
    large = in_large_pages(torch.ones(CHUNK + 1, dtype=torch.uint8))
    memory = large_pages._last[0]
    assert len(memory()) == CHUNK + 1 and int(large.sum()) == CHUNK + 1
    small = in_large_pages(torch.ones(3))
    assert large_pages._last[0] is not memory
    del large
    gc.collect()
    assert memory() is None and torch.equal(small, torch.ones(3))


def test_copies_can_be_copied_and_pickled():
    found = in_large_pages(torch.arange(10.0))
    again = [found.clone(), copy.deepcopy(found), pickle.loads(pickle.dumps(found))]
    assert all(torch.equal(t, found) and t.data_ptr() != found.data_ptr() for t in again)


def test_without_large_pages_a_tensor_stays_where_it_is(monkeypatch):
    given = torch.ones(3)
    assert in_large_pages(given.to("meta")).is_meta
    monkeypatch.setattr(large_pages, "_advice", None)
    assert in_large_pages(given) is given
