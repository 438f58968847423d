"""Token tasks whose reward is arithmetic on token ids: nothing to judge, nothing to game, no tokenizer.

A reward looks at the prompt and the completion only; it never sees the model. What chance alone earns is measured on
uniform samples (`uniform_reward`), so that a curve can be read against it.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

SMALL_VOCABULARY = 256
"""Up to here each token is seen often enough in a short run to learn its successor's class."""


class Task(Protocol):
    """A relation between the tokens of a prompt and of its completion."""

    @property
    def description(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    def prompt(self, rng: random.Random) -> list[int]:
        """One prompt; all prompts of a task have the same length."""
        ...

    def hits(self, prompt: Sequence[int], completion: Sequence[int]) -> list[bool]:
        """For each token of the completion: does it satisfy the relation?"""
        ...


@dataclass(frozen=True)
class CountOn:
    """Each token is one more than the token before it, modulo `modulus`; the prompt says where to start."""

    vocab_size: int
    modulus: int = 8
    prompt_tokens: int = 4
    avoid: frozenset[int] = frozenset()

    @property
    def description(self) -> str:
        return f"each token id is the one before plus 1, modulo {self.modulus}"

    def prompt(self, rng: random.Random) -> list[int]:
        return _draw(rng, self.vocab_size, self.prompt_tokens, self.avoid)

    def hits(self, prompt: Sequence[int], completion: Sequence[int]) -> list[bool]:
        return [(token - last - 1) % self.modulus == 0 for last, token in pairwise([prompt[-1], *completion])]


@dataclass(frozen=True)
class MultipleOf:
    """Every token id is divisible by `modulus`: the relation for vocabularies too large to learn pairs of tokens."""

    vocab_size: int
    modulus: int = 4
    prompt_tokens: int = 4
    avoid: frozenset[int] = frozenset()

    @property
    def description(self) -> str:
        return f"each token id is divisible by {self.modulus}"

    def prompt(self, rng: random.Random) -> list[int]:
        return _draw(rng, self.vocab_size, self.prompt_tokens, self.avoid)

    def hits(self, prompt: Sequence[int], completion: Sequence[int]) -> list[bool]:
        return [token % self.modulus == 0 for token in completion]


def task_for(vocab_size: int, avoid: Collection[int] = ()) -> Task:
    """The task that a short run can teach with this vocabulary; `avoid`: special ids that no prompt may contain."""
    if vocab_size <= SMALL_VOCABULARY:
        return CountOn(vocab_size, avoid=frozenset(avoid))
    return MultipleOf(vocab_size, avoid=frozenset(avoid))


def reward(task: Task, prompt: Sequence[int], completion: Sequence[int]) -> float:
    """The fraction of the completion's tokens that satisfy the relation; an empty completion earns nothing."""
    hits = task.hits(prompt, completion)
    return sum(hits) / len(hits) if hits else 0.0


def grouped_prompts(task: Task, rng: random.Random, groups: int, group_size: int) -> list[list[int]]:
    """`groups` fresh prompts, each repeated `group_size` times in a row, as GRPO's normalisation wants them."""
    return [prompt for prompt in [task.prompt(rng) for _ in range(groups)] for _ in range(group_size)]


def uniform_reward(task: Task, rng: random.Random, *, samples: int, tokens: int) -> float:
    """What tokens drawn uniformly from the vocabulary earn, measured: the figure that a policy has to beat."""
    total = 0.0
    for _ in range(samples):
        total += reward(task, task.prompt(rng), [rng.randrange(task.vocab_size) for _ in range(tokens)])
    return total / samples


def _draw(rng: random.Random, vocab_size: int, count: int, avoid: frozenset[int]) -> list[int]:
    if all(token in avoid for token in range(min(vocab_size, len(avoid) + 1))):
        raise ValueError(f"no token of {vocab_size} may stand in a prompt")
    out: list[int] = []
    while len(out) < count:  # rejection: listing what is allowed would cost a pass over a large vocabulary per prompt
        token = rng.randrange(vocab_size)
        if token not in avoid:
            out.append(token)
    return out
