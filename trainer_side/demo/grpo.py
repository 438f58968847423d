"""Group relative policy optimisation: group-normalised advantages, clipped importance ratio.

The behaviour policy is the *engine*: the ratio is taken against the log-probabilities it sampled with, not against a
recomputation by the trainer, so a rollout from older or slightly different weights is weighed correctly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from bridge.protocol.codec import Completion
from trainer_side.demo.policy import completion_logprobs


@dataclass(frozen=True)
class GrpoConfig:
    """The settings of one optimiser. `epochs`: passes over each batch of rollouts; `micro_batch`: rows per forward."""

    learning_rate: float = 3e-3
    clip: float = 0.2
    epochs: int = 2
    micro_batch: int = 256
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class RolloutBatch:
    """Rollouts as tensors: `prompts` [B, P]; `completions`, `mask`, `behaviour` [B, L], padded; `advantages` [B]."""

    prompts: Tensor
    completions: Tensor
    mask: Tensor
    behaviour: Tensor
    advantages: Tensor

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, index: slice) -> RolloutBatch:
        """Return some of the rows."""
        return RolloutBatch(*(getattr(self, part.name)[index] for part in fields(self)))


@dataclass(frozen=True)
class StepStats:
    """One optimiser step as numbers: loss, and share of tokens outside the clip range."""

    loss: float
    clipped: float


def group_advantages(rewards: Sequence[float], group_size: int) -> Tensor:
    """Compute (reward - mean) / std within each group of consecutive rows; zeros for a group of equal rewards."""
    grouped = torch.tensor(rewards, dtype=torch.float32).view(-1, group_size)
    centred = grouped - grouped.mean(1, keepdim=True)
    return (centred / (grouped.std(1, keepdim=True, correction=0) + 1e-4)).flatten()


def make_batch(
    prompts: Sequence[Sequence[int]], completions: Sequence[Completion], rewards: Sequence[float], group_size: int
) -> RolloutBatch:
    """Pad rollouts of different lengths into one batch with their advantages."""
    longest = max(len(completion.token_ids) for completion in completions)
    ids = [[*c.token_ids, *[0] * (longest - len(c.token_ids))] for c in completions]
    logprobs = [[*c.logprobs, *[0.0] * (longest - len(c.logprobs))] for c in completions]
    lengths = torch.tensor([len(c.token_ids) for c in completions])
    return RolloutBatch(
        prompts=torch.tensor(prompts),
        completions=torch.tensor(ids),
        mask=torch.arange(longest) < lengths[:, None],
        behaviour=torch.tensor(logprobs),
        advantages=group_advantages(rewards, group_size),
    )


def clipped_objective(logprobs: Tensor, behaviour: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Compute PPO's clipped surrogate per token, and the importance ratio that it used."""
    ratio = (logprobs - behaviour).exp()
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages), ratio


class Grpo:
    """Owns the optimiser of one policy, to which nothing else writes; one `step` per batch of rollouts."""

    def __init__(self, model: nn.Module, config: GrpoConfig) -> None:
        self.model = model
        self.config = config
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
        )

    def step(self, batch: RolloutBatch) -> StepStats:
        """Optimise on one batch, `epochs` times; the numbers are those of the last pass."""
        self.model.train()
        for _ in range(self.config.epochs):
            stats = self._epoch(batch)
        return stats

    def _epoch(self, batch: RolloutBatch) -> StepStats:
        self.optimizer.zero_grad(set_to_none=True)
        total = float(batch.mask.sum())
        sums = torch.zeros(2)
        for start in range(0, len(batch), self.config.micro_batch):
            rows = batch.rows(slice(start, start + self.config.micro_batch))
            loss, numbers = self._loss(rows, total)
            loss.backward()  # type: ignore[no-untyped-call]
            sums += numbers
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        return StepStats(*sums.tolist())

    def _loss(self, rows: RolloutBatch, total: float) -> tuple[Tensor, Tensor]:
        """Compute this micro-batch's share of the token mean: gradients then add up to those of the whole batch."""
        clip = self.config.clip
        logprobs = completion_logprobs(self.model, rows.prompts, rows.completions)
        objective, ratio = clipped_objective(logprobs, rows.behaviour, rows.advantages[:, None], clip)
        weight = rows.mask / total
        loss = -(objective * weight).sum()
        outside = ((ratio.detach() - 1).abs() > clip).float()
        return loss, torch.stack([loss.detach(), (outside * weight).sum()])
