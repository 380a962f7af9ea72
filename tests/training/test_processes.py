"""Two processes on the CPU, as `accelerate launch` starts them: the same numbers on both, and those of one process with the double batch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from petiole.training import processes
from training import scenarios

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes have left what they found."""
    folder = tmp_path_factory.mktemp("launched")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # With --cpu it starts one process unless an MPI does; --multi_gpu starts two, which the script keeps on the CPU.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += [
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_ip",
        "127.0.0.1",
    ]
    command += ["--main_process_port", str(port), str(TESTS / "training" / "scenarios.py"), str(folder)]
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.slow
@pytest.mark.loopback
@pytest.mark.parametrize("name", [name for name in scenarios.METHODS if name != "idles"])
def test_two_processes_end_as_one_with_the_double_batch(name: str, launched: Path, tmp_path: Path) -> None:
    first, second = (load_file(launched / f"{name}.{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)
    if name == "grows-resumed":
        whole = load_file(launched / "grows.0.safetensors")
        assert all(torch.equal(first[key], whole[key]) for key in whole)  # to the bit
        return
    if name == "increlora-picks":  # four sites with a reserve each, of which the same one grew in each of two rounds
        assert sum(len(value) for key, value in first.items() if ":E." in key) == 2 * 4 + 2
        return
    if name == "das":
        assert first["preferences"].abs().min() > 0  # rounds were held, of which each process saw one half
    one = scenarios.result(name, tmp_path)
    assert set(one) == set(first)
    for key, value in one.items():
        torch.testing.assert_close(first[key], value, rtol=2e-3, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.slow
@pytest.mark.loopback
def test_a_delta_that_idles_on_one_process_gets_the_gradient_of_the_other(launched: Path) -> None:
    first, second = (load_file(launched / f"idles.{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert first["0.encoder.1.ffn.output:b"].abs().max() > 0


@pytest.mark.slow
@pytest.mark.loopback
def test_processes_that_add_different_parameters_stop_all_together(launched: Path) -> None:
    for rank in (0, 1):
        assert "the processes add different parameters" in (launched / f"differing.{rank}.txt").read_text()


def test_one_process_needs_no_other() -> None:
    value = torch.ones(2)
    assert processes.count() == 1 and processes.averaged(value) is value
