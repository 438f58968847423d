"""GRPO as the demo does it, against values worked out by hand and against autograd."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from bridge.protocol.codec import Completion
from trainer_side.demo import policy
from trainer_side.demo.grpo import Grpo, GrpoConfig, clipped_objective, group_advantages, make_batch


def test_advantages_are_normalised_within_each_group() -> None:
    advantages = group_advantages([0.0, 1.0, 10.0, 30.0, 5.0, 5.0], group_size=2)
    assert advantages.tolist() == pytest.approx([-1, 1, -1, 1, 0, 0], abs=1e-3)


def test_the_ratio_is_taken_against_the_behaviour_policy_and_clipped_only_where_it_would_gain() -> None:
    now = torch.log(torch.tensor([0.9, 0.9, 0.1, 0.1]))
    then = torch.log(torch.tensor([0.5, 0.5, 0.5, 0.5]))
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    objective, ratio = clipped_objective(now, then, advantages, clip=0.2)
    assert ratio.tolist() == pytest.approx([1.8, 1.8, 0.2, 0.2])
    assert objective.tolist() == pytest.approx([1.2, -1.8, 0.2, -0.8])


def test_batches_pad_ragged_completions_and_mask_the_padding() -> None:
    batch = make_batch(
        [[1, 2], [1, 2]],
        [Completion((7,), (-0.5,), "stop"), Completion((8, 9), (-0.1, -0.2), "length")],
        [0.0, 1.0],
        group_size=2,
    )
    assert batch.completions.tolist() == [[7, 0], [8, 9]]
    assert batch.mask.tolist() == [[True, False], [True, True]]
    assert batch.behaviour.tolist() == [pytest.approx([-0.5, 0.0]), pytest.approx([-0.1, -0.2])]


def test_completion_logprobs_are_those_of_the_full_forward_and_ignore_padding() -> None:
    model = policy.tiny_qwen2(seed=1)
    prompts, completions = torch.tensor([[1, 2, 3]]), torch.tensor([[4, 5]])
    full = model(torch.tensor([[1, 2, 3, 4, 5]])).logits.log_softmax(-1)
    got = policy.completion_logprobs(model, prompts, completions)
    torch.testing.assert_close(got, torch.stack([full[:, 2, 4], full[:, 3, 5]], dim=1))
    padded = policy.completion_logprobs(model, prompts, torch.tensor([[4, 5, 0, 0]]))
    torch.testing.assert_close(padded[:, :2], got)


def _rollouts(model: torch.nn.Module, rows: int = 8) -> tuple[list[list[int]], list[Completion]]:
    prompts = [[1, 2, 3, 4]] * rows
    tokens = policy.sample(model, torch.tensor(prompts), 3, torch.Generator().manual_seed(0))
    logprobs = policy.completion_logprobs(model, torch.tensor(prompts), tokens)
    return prompts, [Completion(tuple(t), tuple(p), "length") for t, p in zip(tokens.tolist(), logprobs.tolist())]


def test_a_step_makes_rewarded_completions_likelier() -> None:
    model = policy.tiny_qwen2(seed=2)
    prompts, completions = _rollouts(model)
    rewards = [1.0, *[0.0] * (len(prompts) - 1)]
    before = completions[0].logprobs
    stats = Grpo(model, GrpoConfig(learning_rate=1e-3)).step(make_batch(prompts, completions, rewards, len(prompts)))
    with torch.no_grad():
        after = policy.completion_logprobs(model, torch.tensor(prompts[:1]), torch.tensor([completions[0].token_ids]))
    assert float(after.sum()) > sum(before)
    assert all(math.isfinite(value) for value in (stats.loss, stats.clipped))


def test_micro_batches_give_the_gradient_of_the_whole_batch() -> None:
    whole = policy.tiny_qwen2(seed=3)
    pieces = copy.deepcopy(whole)
    prompts, completions = _rollouts(whole, rows=6)
    completions[0] = Completion(completions[0].token_ids[:1], completions[0].logprobs[:1], "stop")
    batch = make_batch(prompts, completions, [0.0, 1.0, 0.5, 0.2, 0.9, 0.1], 6)
    for model, rows in ((whole, 6), (pieces, 4)):
        Grpo(model, GrpoConfig(epochs=1, micro_batch=rows, max_grad_norm=1e9)).step(batch)
    for left, right in zip(whole.parameters(), pieces.parameters(), strict=True):
        torch.testing.assert_close(left.grad, right.grad, rtol=1e-4, atol=1e-6)


def test_stale_rollouts_are_seen_as_off_policy() -> None:
    model, older = policy.tiny_qwen2(seed=4), policy.tiny_qwen2(seed=5)
    prompts, completions = _rollouts(older)
    fresh = make_batch(*_rollouts(model), [float(i) for i in range(8)], 8)
    stale = make_batch(prompts, completions, [float(i) for i in range(8)], 8)
    config = GrpoConfig(epochs=1, learning_rate=0.0)
    assert Grpo(model, config).step(fresh).clipped == 0.0
    assert Grpo(model, config).step(stale).clipped > 0.1
