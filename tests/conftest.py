"""Shared fixtures: no network, tiny random models of every family, a tokenizer trained on the spot."""

from __future__ import annotations

import os
import socket

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from tiny_models import FAMILIES, TEXT, build_model, build_tokenizer


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Any connection that leaves the machine fails the test; local sockets (AF_UNIX, loopback) are what multiprocessing needs."""
    connect = socket.socket.connect

    def refuse(self, address):
        host = address[0] if isinstance(address, tuple) else "local"
        if host not in ("local", "127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test tried to reach the network: {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tiny tensors gain nothing from threads, and two cores are shared."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT * 40, encoding="utf8")
    return path


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokenizer):
    """family -> folder of a tiny random checkpoint with its tokenizer, made once."""
    made = {}

    def folder(family: str, dtype: torch.dtype = torch.float32):
        if (family, dtype) not in made:
            path = tmp_path_factory.mktemp(f"{family}-{str(dtype).split('.')[-1]}")
            build_model(family).to(dtype).save_pretrained(path)
            tokenizer.save_pretrained(path)
            made[family, dtype] = path
        return made[family, dtype]

    return folder


@pytest.fixture(params=sorted(FAMILIES))
def family(request):
    return request.param
