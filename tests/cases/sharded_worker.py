"""One rank of a sharded trainer in a process of its own, for `test_sharded_trainers.py`. Not a test module.

Arguments: rank, file in which the ranks meet, kind of sharding, folder of the model. Rank 0 pushes gathered values and
prints what it found as one JSON line; the other rank only gathers and trains.
"""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import bridge
from engine_side.embedded.config import EngineConfig
from engine_side.embedded.engine import Engine

IDS = torch.tensor([[1, 5, 30, 7, 2]])


def sharded(kind: str, model: Any) -> Any:
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    if kind == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan = {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel(), "down_proj": RowwiseParallel()}
    for layer in model.model.layers:
        parallelize_module(layer.mlp, mesh, plan)
    return model


def whole(tensor: Any) -> torch.Tensor:
    gathered = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return gathered.detach().clone()  # type: ignore[no-any-return]


def train_once(model: Any) -> float:
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.05 * parameter.grad
                parameter.grad = None
    return float(loss)


def main(rank: int, meeting: str, kind: str, folder: str) -> None:
    from transformers import AutoModelForCausalLM

    store = dist.FileStore(meeting, 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    model = sharded(kind, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    found: list[dict[str, Any]] = []
    b = None
    if rank == 0:
        engine = Engine(EngineConfig(folder))
        b = bridge.attach(engine, model=model)
    for _ in range(2):
        loss = train_once(model)
        tensors = [(name, whole(parameter)) for name, parameter in model.named_parameters()]
        if b is not None:
            started = time.monotonic()
            receipt = b.push(tensors, timeout_s=20)
            found.append(
                {"loss": loss, "verified": receipt.verified, "notes": receipt.notes, "s": time.monotonic() - started}
            )
        dist.barrier()
    if b is not None:
        print(json.dumps(found), flush=True)
        b.close()
        engine.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:5])
