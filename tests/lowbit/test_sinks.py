"""Which tokens are sinks, and that quantizers and the cache leave them as they are."""

import threading

import pytest
import torch
from lowbit.cache import KVGrid, PackedCacheLayer
from lowbit.modules import ActivationQuantizer
from lowbit.sinks import announce, arriving, attach, leading, sink_rows
from torch import nn

COARSE = {
    "scale": torch.tensor([1.0]),
    "zero": torch.tensor([0.0]),
    "bits": torch.tensor([2]),
    "sizes": torch.tensor([4]),
}


@pytest.fixture(autouse=True)
def withdrawn():
    yield
    announce(None)


def test_the_first_tokens_of_a_window():
    assert leading(2, 4, 1).tolist() == [[True, False, False, False]] * 2
    assert leading(1, 3, 0).tolist() == [[False] * 3] and leading(1, 2, 5).tolist() == [[True, True]]


def test_tokens_that_arrive_after_others():
    assert arriving(1, 3, 2, held=1, attended=None).tolist() == [[True, False, False]]
    assert arriving(1, 1, 2, held=7, attended=None).tolist() == [[False]]


def test_padding_is_no_sink_and_does_not_count():
    left = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert arriving(2, 4, 1, held=0, attended=left).tolist() == [
        [False, False, True, False],
        [True, False, False, False],
    ]
    assert arriving(2, 1, 1, held=3, attended=left).tolist() == [[False], [False]]
    late = torch.tensor([[0, 0, 0, 1]])  # all that is cached so far is padding
    assert arriving(1, 1, 1, held=3, attended=late).tolist() == [[True]]


def test_quantizers_leave_announced_rows_as_they_are():
    x = torch.full((2, 3, 4), 0.4)
    quantizer = ActivationQuantizer.static(**COARSE, sinks=1)
    announce(leading(2, 3, 1))
    y = quantizer(x)
    assert torch.equal(y[:, 0], x[:, 0]) and y[:, 1:].eq(0).all()
    assert torch.equal(quantizer(x.view(6, 4)), y.view(6, 4))  # OPT flattens tokens before its MLP


def test_what_was_never_announced_is_an_error_and_not_a_guess():
    quantizer = ActivationQuantizer.static(**COARSE, sinks=1)
    with pytest.raises(ValueError, match="sinks of 3 tokens are wanted, known are none"):
        quantizer(torch.zeros(1, 3, 4))
    announce(leading(1, 2, 1))
    with pytest.raises(ValueError, match="known are those of 2 tokens"):
        quantizer(torch.zeros(1, 3, 4))


def test_threads_do_not_see_each_other_s_announcement():
    announce(leading(1, 2, 1))
    failed = []

    def elsewhere():
        try:
            sink_rows(torch.zeros(1, 2, 4))
        except ValueError as err:
            failed.append(err)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert failed and sink_rows(torch.zeros(1, 2, 4)).any()


class Owner(nn.Module):
    def forward(self, input_ids=None, attention_mask=None, past_key_values=None):
        self.seen = sink_rows(torch.zeros(*input_ids.shape, 4)).squeeze(-1)


def test_a_model_announces_its_tokens_and_withdraws_them():
    owner = Owner()
    attach(owner, 1)
    ids = torch.zeros(2, 3, dtype=torch.int64)
    owner(input_ids=ids, attention_mask=torch.tensor([[0, 1, 1], [1, 1, 1]]))
    assert owner.seen.tolist() == [[False, True, False], [True, False, False]]
    owner(ids)
    assert owner.seen.tolist() == [[True, False, False]] * 2
    with pytest.raises(ValueError, match="known are none"):
        sink_rows(torch.zeros(2, 3, 4))


def cache_layer(sinks):
    one, zero = torch.ones(2, 4), torch.zeros(2, 4)
    return PackedCacheLayer(KVGrid(one, zero, one, zero, bits=2, rotary=None, rotary_dim=0, sinks=sinks))


def keys(batch, tokens, seed):
    return torch.rand(batch, 2, tokens, 4, generator=torch.Generator().manual_seed(seed)) + 0.1


def test_a_cache_keeps_sinks_through_everything_that_moves_its_rows():
    layer = cache_layer(1)
    attended = torch.tensor([[0, 1, 1], [1, 1, 1]])
    k = keys(2, 3, 0)
    announce(arriving(2, 3, 1, held=0, attended=attended))
    got, values = layer.update(k, 2 * k)
    assert torch.equal(got[0, :, 1], k[0, :, 1]) and torch.equal(got[1, :, 0], k[1, :, 0])
    assert torch.equal(values[0, :, 1], 2 * k[0, :, 1])
    rounded = k.round()
    assert torch.equal(got[0, :, [0, 2]], rounded[0, :, [0, 2]]) and torch.equal(got[1, :, 1:], rounded[1, :, 1:])

    announce(torch.zeros(2, 1, dtype=torch.bool))
    more = keys(2, 1, 1)
    before, _ = layer.update(more, more)
    assert torch.equal(before[..., :3, :], got) and torch.equal(before[..., 3:, :], more.round())

    def now():
        announce(torch.zeros(layer.keys.shape[0], 0, dtype=torch.bool))
        nothing = torch.zeros(layer.keys.shape[0], 2, 0, 4)
        return layer.update(nothing, nothing)[0]

    layer.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(now(), before.flip(0))
    layer.batch_repeat_interleave(2)
    assert torch.equal(now(), before.flip(0).repeat_interleave(2, dim=0))
    layer.batch_select_indices(torch.tensor([3]))
    assert torch.equal(now(), before[:1])
    layer.crop(-3)
    assert torch.equal(now(), before[:1, :, :1])  # row 0's sink, in column 1, is gone
    layer.reset()
    assert layer.spared is None


def test_a_cache_without_sinks_rounds_every_token():
    k = keys(1, 2, 0)
    assert torch.equal(cache_layer(0).update(k, k)[0], k.round())
