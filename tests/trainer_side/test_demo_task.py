"""The demo's tasks: their rewards are arithmetic, and chance earns what it should."""

from __future__ import annotations

import random

import pytest

from trainer_side.demo.task import CountOn, MultipleOf, grouped_prompts, reward, task_for, uniform_reward


def test_count_on_rewards_each_successor_of_the_token_before() -> None:
    task = CountOn(64, modulus=8)
    assert task.hits([5, 63], [0, 9, 18, 27]) == [True, True, True, True]
    assert task.hits([5, 63], [0, 0, 1, 3]) == [True, False, True, False]
    assert reward(task, [5, 63], [0, 0, 1, 3]) == 0.5


def test_count_on_depends_on_the_prompt() -> None:
    task = CountOn(64)
    assert task.hits([0], [1]) == [True]
    assert task.hits([1], [1]) == [False]


def test_multiple_of_counts_divisible_tokens() -> None:
    assert reward(MultipleOf(1000, modulus=4), [1], [4, 8, 9, 0]) == 0.75


def test_an_empty_completion_earns_nothing() -> None:
    assert reward(CountOn(64), [1], []) == 0.0


@pytest.mark.parametrize(("vocab", "chance"), [(64, 1 / 8), (4096, 1 / 4)])
def test_uniform_tokens_earn_what_chance_gives(vocab: int, chance: float) -> None:
    measured = uniform_reward(task_for(vocab), random.Random(3), samples=2000, tokens=12)
    assert measured == pytest.approx(chance, abs=0.01)


def test_prompts_have_one_length_avoid_special_ids_and_come_in_groups() -> None:
    task = task_for(8, avoid={0, 7})
    prompts = grouped_prompts(task, random.Random(0), groups=50, group_size=3)
    assert len(prompts) == 150
    assert {len(prompt) for prompt in prompts} == {4}
    assert {token for prompt in prompts for token in prompt} == {1, 2, 3, 4, 5, 6}
    assert all(prompts[i] == prompts[i + 1] == prompts[i + 2] for i in range(0, 150, 3))


def test_a_vocabulary_without_any_token_to_use_is_refused() -> None:
    with pytest.raises(ValueError, match="no token of 3"):
        task_for(3, avoid={0, 1, 2}).prompt(random.Random(0))
