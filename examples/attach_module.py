"""Keep an evaluation copy of the policy in step with the trainer: any torch.nn.Module can be attached.

    python examples/attach_module.py --steps 5

Needs neither Ray nor an engine: the copy lives in this process, and each push is verified before it returns. The same
call keeps a reference model for a KL term, or the start of an exponential average, from going stale.
"""

from __future__ import annotations

import argparse
import copy
import os

import torch
from torch import nn

import bridge
from trainer_side.demo.policy import tiny_qwen2


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> float:
    """Train one step of next-token prediction on a made-up sequence; put your own step here."""
    tokens = (torch.arange(32) * (step + 1) % 64).unsqueeze(0)
    loss = model(tokens, labels=tokens).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


@torch.no_grad()
def difference(left: nn.Module, right: nn.Module) -> float:
    """Compute the largest difference of the two models' logits on fixed tokens."""
    tokens = torch.arange(16).unsqueeze(0)
    return float((left(tokens).logits - right(tokens).logits).abs().max())


def main(steps: int) -> float:
    model = tiny_qwen2(seed=0)
    evaluation = copy.deepcopy(model).eval()  # its own storage: sharing it with the trainer would be refused
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    b = bridge.attach(evaluation, name=f"evaluation-{os.getpid()}", model=model)
    try:
        for step in range(1, steps + 1):
            loss = train_step(model, optimizer, step)
            apart = difference(model, evaluation)
            receipt = b.push(model.named_parameters())
            left = difference(model, evaluation)
            print(
                f"step {step}  loss {loss:.3f}  version {receipt.version}  verified {receipt.verified}  "
                f"logits apart {apart:.3f} before the push, {left:.1e} after"
            )
    finally:
        b.close()
    return left


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    main(parser.parse_args().steps)
