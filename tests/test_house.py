"""The house itself: no network in tests, the package's own model is whole."""

from __future__ import annotations

import json
import socket
from importlib.resources import files

import pytest
import torch
from safetensors.torch import load

from sockets import SocketForbidden


def test_no_test_reaches_the_network() -> None:
    with socket.socket(socket.AF_INET) as outside, pytest.raises(SocketForbidden):
        outside.connect(("192.0.2.1", 80))
    with pytest.raises(SocketForbidden):
        socket.getaddrinfo("example.org", 80)
    with socket.socket(socket.AF_INET) as own, pytest.raises(SocketForbidden):
        own.connect(("127.0.0.1", 80))


@pytest.mark.loopback
def test_a_marked_test_reaches_this_machine_alone() -> None:
    with socket.socket(socket.AF_INET) as server, socket.socket(socket.AF_INET) as client:
        server.bind(("127.0.0.1", 0))
        server.listen()
        client.connect(server.getsockname())
    with socket.socket(socket.AF_INET) as outside, pytest.raises(SocketForbidden):
        outside.connect(("192.0.2.1", 80))


def test_two_workers_can_still_talk() -> None:
    left, right = socket.socketpair()
    with left, right:
        left.sendall(b"leaf")
        assert right.recv(4) == b"leaf"


def test_the_shipped_image_model_is_whole() -> None:
    folder = files("petiole") / "assets" / "vit-cifar10"
    config = json.loads((folder / "config.json").read_text())
    weights = load((folder / "model.safetensors").read_bytes())
    assert config["model_type"] == "vit"
    assert sum(w.numel() for w in weights.values()) == 2_693_578
    assert all(w.dtype == torch.float16 and w.isfinite().all() for w in weights.values())
