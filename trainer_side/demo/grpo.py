"""Group relative policy optimisation: group-normalised advantages, clipped importance ratio, optional KL term.

The behaviour policy is the *engine*: the ratio is taken against the log-probabilities it sampled with, not against a
recomputation by the trainer, so a rollout from older or slightly different weights is weighed correctly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from bridge.protocol.codec import Completion
from trainer_side.demo.policy import completion_logprobs

LogprobFn = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class GrpoConfig:
    """The settings of one optimiser. `epochs`: passes over each batch of rollouts; `micro_batch`: rows per forward."""

    learning_rate: float = 3e-3
    clip: float = 0.2
    epochs: int = 2
    micro_batch: int = 256
    kl_weight: float = 0.0
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
    """One optimiser step as numbers: loss, share of tokens outside the clip range, mean ratio, KL, gradient norm."""

    loss: float
    clipped: float
    ratio: float
    kl: float
    grad_norm: float


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


def kl_estimate(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Estimate KL(policy || reference) per token by Schulman's k3: unbiased and never negative."""
    delta = reference - logprobs
    return delta.exp() - 1 - delta


class Grpo:
    """Owns the optimiser of one policy; one `step` per batch of rollouts.

    Args:
        model: the policy that is trained; nothing else writes to it.
        reference: log-probabilities of a frozen policy for the KL term; needed when `kl_weight` is not 0.
    """

    def __init__(self, model: nn.Module, config: GrpoConfig, reference: LogprobFn | None = None) -> None:
        if config.kl_weight and reference is None:
            raise ValueError("a KL term needs a reference policy")
        self.model = model
        self.config = config
        self.reference = reference
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
        sums = torch.zeros(4)
        for start in range(0, len(batch), self.config.micro_batch):
            rows = batch.rows(slice(start, start + self.config.micro_batch))
            loss, numbers = self._loss(rows, total)
            loss.backward()  # type: ignore[no-untyped-call]
            sums += numbers
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        loss_value, clipped, ratio, kl = sums.tolist()
        return StepStats(loss_value, clipped, ratio, kl, float(norm))

    def _loss(self, rows: RolloutBatch, total: float) -> tuple[Tensor, Tensor]:
        """Compute this micro-batch's share of the token mean: gradients then add up to those of the whole batch."""
        config = self.config
        logprobs = completion_logprobs(self.model, rows.prompts, rows.completions)
        objective, ratio = clipped_objective(logprobs, rows.behaviour, rows.advantages[:, None], config.clip)
        kl = torch.zeros_like(objective)
        if self.reference is not None and config.kl_weight:
            with torch.no_grad():
                frozen = self.reference(rows.prompts, rows.completions)
            kl = kl_estimate(logprobs, frozen)
        weight = rows.mask / total
        loss = -((objective - config.kl_weight * kl) * weight).sum()
        outside = ((ratio - 1).abs() > config.clip).float()
        means = [(value.detach() * weight).sum() for value in (outside, ratio, kl)]
        return loss, torch.stack([loss.detach(), *means])
