"""Two processes under DDP and under FSDP2 end where one ends with the rows of both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import petiole as pt
from interop import sharded

HERE = Path(__file__).resolve()


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes have left what they found."""
    folder = tmp_path_factory.mktemp("sharded")
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, str(HERE.with_name("sharded.py")), str(folder)]
    both = [
        subprocess.Popen(
            [*command, str(rank)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in (0, 1)
    ]
    try:
        for process in both:
            text, _ = process.communicate(timeout=240)
            assert process.returncode == 0, text[-4000:]
    finally:
        for process in both:
            process.kill()
    return folder


def found(ran: Path, rank: int) -> dict[str, Any]:
    return json.loads((ran / f"found-{rank}.json").read_text())


@pytest.mark.slow
@pytest.mark.loopback
@pytest.mark.parametrize("method", sharded.METHODS)
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_ends_as_one_process_does(how: str, method: str, ran: Path) -> None:
    from petiole import files

    wanted = sharded.alone(method).named_tensors()
    for rank in (0, 1):
        tensors, _ = files.load_adaptation(ran / f"{how}-{method}-{rank}.safetensors")
        assert set(tensors) == set(wanted)
        for name, tensor in wanted.items():
            torch.testing.assert_close(tensors[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.loopback
@pytest.mark.parametrize("method", sharded.METHODS)
def test_what_was_sharded_loads_whole(method: str, ran: Path) -> None:
    for rank in (0, 1):
        about = found(ran, rank)[method]
        assert about["sharded"] and about["restored"] and about["bare"]
        model, tuned = sharded.made(method)
        tuned.detach()
        pt.load(model, ran / f"fsdp-{method}-{rank}.safetensors")
        with torch.no_grad():
            logits = model(**sharded.rows(rank)).logits.flatten()[:8]
        torch.testing.assert_close(logits, torch.tensor(about["logits"]), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.loopback
def test_what_comes_after_sharding_is_refused(ran: Path) -> None:
    """Its parameters would be whole on each process, and drift apart."""
    for name in ("attach", "load"):
        assert "attach or load first, then shard" in found(ran, 0)[name]["error"]
