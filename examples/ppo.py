"""Train an actor and a value head with PPO, and push the actor alone.

    python examples/ppo.py --steps 40

The engine has no parameter for the value head: a push of `model.named_parameters()` would raise `UnexpectedTensor` and
name the head's tensors. Rewards are per token, advantages by generalised advantage estimation.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile

import torch
from torch import Tensor, nn

import bridge
from trainer_side.demo.grpo import clipped_objective
from trainer_side.demo.policy import save_policy, tiny_qwen2
from trainer_side.demo.task import CountOn, grouped_prompts

ROLLOUTS, TOKENS, EPOCHS = 128, 12, 2
GAMMA, LAMBDA, CLIP, VALUE_WEIGHT = 0.5, 0.9, 0.2, 0.5


class ActorCritic(nn.Module):
    """One trunk, two heads: token logits and a value for the state before each token."""

    def __init__(self, actor: nn.Module, hidden: int) -> None:
        super().__init__()
        self.actor = actor
        self.value = nn.Linear(hidden, 1)

    def forward(self, prompts: Tensor, completions: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the completions' tokens and the values before them, both [B, L]."""
        tokens = torch.cat([prompts, completions], dim=1)[:, :-1]
        out = self.actor(tokens, use_cache=False, output_hidden_states=True)
        last = slice(-completions.shape[1], None)
        logprobs = out.logits[:, last].log_softmax(-1).gather(2, completions.unsqueeze(-1)).squeeze(-1)
        # the trunk learns from the policy alone: a random value head's error would drown its gradient at the start
        return logprobs, self.value(out.hidden_states[-1][:, last].detach()).squeeze(-1)


def advantages_of(rewards: Tensor, values: Tensor) -> Tensor:
    """Generalised advantage estimation over [B, L]; the value after the last token is zero."""
    after = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = rewards + GAMMA * after - values
    running, out = torch.zeros_like(deltas[:, 0]), []
    for delta in reversed(deltas.unbind(1)):
        running = delta + GAMMA * LAMBDA * running
        out.append(running)
    return torch.stack(out[::-1], dim=1)


def update(
    model: ActorCritic, optimizer: torch.optim.Optimizer, rollout: tuple[Tensor, Tensor, Tensor, Tensor]
) -> None:
    """`EPOCHS` clipped steps on (prompts, completions, the engine's log-probabilities, token rewards)."""
    prompts, completions, behaviour, rewards = rollout
    with torch.no_grad():
        _, values = model(prompts, completions)
    advantages = advantages_of(rewards, values)
    returns = advantages + values
    # once nearly every token is right the spread is noise: the floor keeps it from being scaled up to one
    scaled = (advantages - advantages.mean()) / advantages.std().clamp_min(0.2)
    for _ in range(EPOCHS):
        logprobs, predicted = model(prompts, completions)
        objective, _ = clipped_objective(logprobs, behaviour, scaled, CLIP)
        loss = -objective.mean() + VALUE_WEIGHT * (predicted - returns).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def main(steps: int) -> float:
    torch.manual_seed(0)
    actor = tiny_qwen2(seed=0)
    model = ActorCritic(actor, hidden=64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    task, rng = CountOn(vocab_size=64), random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        save_policy(actor, folder)
        b = bridge.launch(f"embedded:{folder}", name=f"ppo-{os.getpid()}", model=actor, threads=1)
        try:
            for step in range(1, steps + 1):
                prompts = grouped_prompts(task, rng, ROLLOUTS, 1)
                outs = b.engines[0].generate(prompts, bridge.Sampling(max_tokens=TOKENS, seed=step))
                hits = [task.hits(p, o.token_ids) for p, o in zip(prompts, outs, strict=True)]
                ids = torch.tensor([o.token_ids for o in outs])
                behaviour = torch.tensor([o.logprobs for o in outs])
                rewards = torch.tensor(hits, dtype=torch.float32)
                update(model, optimizer, (torch.tensor(prompts), ids, behaviour, rewards))
                receipt = b.push(actor.named_parameters())  # model.named_parameters() would include the value head
                mean = float(rewards.mean())
                print(f"step {step}  reward {mean:.3f}  version {receipt.version}  verified {receipt.verified}")
        finally:
            b.shutdown()  # stops the engine; close() would leave the daemon running for the next trainer
    return mean


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    main(parser.parse_args().steps)
