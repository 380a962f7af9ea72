"""What two processes of `test_sharded.py` do: train under DDP and under FSDP2, and leave what they found in a folder.

python sharded.py FOLDER RANK: the processes find each other through a file there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import petiole as pt
import tiny
from petiole.errors import PetioleError

METHODS: dict[str, Any] = {
    "lora": lambda: pt.LoRA(rank=4, roles=("q", "v", "down")),
    "dora": lambda: pt.DoRA(rank=4),
    "mos": lambda: pt.MoS(rank=3, dropout=0.0),  # pools that belong to the attachment
    "parallel-adapter": lambda: pt.ParallelAdapter(bottleneck=4),
    "bitfit": lambda: pt.BitFit(),
}
STEPS, RATE, ROWS = 3, 0.5, 2


def made(method: str) -> tuple[nn.Module, pt.Adaptation]:
    model = tiny.model("llama" if method != "bitfit" else "qwen2")
    return model, pt.attach(model, METHODS[method](), seed=1)


def rows(rank: int) -> dict[str, torch.Tensor]:
    """The part of the batch that a process sees; no padding, so that the mean over processes is that over all rows."""
    whole = tiny.batch("llama", size=2 * ROWS)
    part = {key: value[rank * ROWS : (rank + 1) * ROWS].clone() for key, value in whole.items()}
    tokens = torch.where(part["input_ids"] == 0, 4, part["input_ids"])
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


def train(model: nn.Module, parts: list[dict[str, torch.Tensor]]) -> None:
    """Plain steps; what trains is what says so."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], RATE)
    model.train()
    for _ in range(STEPS):
        for part in parts:
            (model(**part).loss / len(parts)).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def alone(method: str) -> pt.Adaptation:
    """The same run in one process, with the rows of both."""
    model, tuned = made(method)
    train(model, [rows(0), rows(1)])
    return tuned


def shard(model: Any, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def main(folder: Path, rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    mesh, found = init_device_mesh("cpu", (2,)), {}
    for method in METHODS:
        model, tuned = made(method)
        train(DistributedDataParallel(model), [rows(rank)])
        tuned.save(folder / f"ddp-{method}-{rank}.safetensors")
        model, tuned = made(method)
        bare = {
            name: value.clone()
            for name, value in tiny.model("llama" if method != "bitfit" else "qwen2").state_dict().items()
        }
        shard(model, mesh)
        train(model, [rows(rank)])
        with torch.no_grad():
            logits = model(**rows(rank)).logits
        tuned.save(folder / f"fsdp-{method}-{rank}.safetensors")  # every process: the parts are put together
        tuned.save(folder / f"resume-{method}-{rank}.safetensors", folded=False)
        model.reshard()  # parameters of the root stay whole from a forward until a backward; their parts are what counts
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter.mul_(2.0)
            moved = model(**rows(rank)).logits
            tuned.restore(folder / f"resume-{method}-{rank}.safetensors")
            model.reshard()
            restored = torch.equal(model(**rows(rank)).logits, logits) and not torch.equal(moved, logits)
        model.reshard()
        found[method] = {
            "sharded": all(hasattr(p, "full_tensor") for p in tuned.parameters()),
            "restored": restored,
            "logits": logits.flatten()[:8].tolist(),
        }
        tuned.detach()
        state = model.state_dict()
        found[method]["bare"] = set(state) == set(bare) and all(
            torch.equal(state[n].full_tensor(), bare[n]) for n in bare
        )
    model = tiny.model("llama")
    shard(model, mesh)
    for name, act in (
        ("attach", lambda: pt.attach(model, pt.LoRA())),
        ("load", lambda: pt.load(model, folder / f"ddp-lora-{rank}.safetensors")),
    ):
        try:
            act()
        except PetioleError as error:
            found[name] = {"error": str(error)}
    (folder / f"found-{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
