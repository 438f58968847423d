"""Token tasks whose reward is arithmetic on token ids: nothing to judge, nothing to game, no tokenizer.

A reward is computed from the prompt and the completion only, never from the model. The reward of chance alone is
measured on uniform samples (`uniform_reward`), so that a curve can be read against it.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

SMALL_VOCABULARY = 256
"""Up to here each token is seen often enough in a short run to learn its successor's class."""


@dataclass(frozen=True)
class Task:
    """A relation between the tokens of a prompt and of its completion; all prompts of a task have the same length."""

    vocab_size: int
    modulus: int
    prompt_tokens: int = 4
    avoid: frozenset[int] = frozenset()

    @property
    def description(self) -> str:
        """The rule, in words."""
        raise NotImplementedError

    def hits(self, prompt: Sequence[int], completion: Sequence[int]) -> list[bool]:
        """Tell for each token of the completion whether it satisfies the relation."""
        raise NotImplementedError

    def prompt(self, rng: random.Random) -> list[int]:
        """Draw one prompt without the ids of `avoid`. Raises ValueError when these are the whole vocabulary."""
        if all(token in self.avoid for token in range(min(self.vocab_size, len(self.avoid) + 1))):
            raise ValueError(f"no token of {self.vocab_size} may stand in a prompt")
        out: list[int] = []
        while len(out) < self.prompt_tokens:  # rejection: a list of what is allowed costs a pass over the vocabulary
            token = rng.randrange(self.vocab_size)
            if token not in self.avoid:
                out.append(token)
        return out


@dataclass(frozen=True)
class CountOn(Task):
    """Each token is one more than the token before it, modulo `modulus`; the prompt gives the start."""

    modulus: int = 8

    @property
    def description(self) -> str:
        """The rule, in words."""
        return f"each token id is the one before plus 1, modulo {self.modulus}"

    def hits(self, prompt: Sequence[int], completion: Sequence[int]) -> list[bool]:
        """Tell for each token whether it follows the one before it."""
        return [(token - last - 1) % self.modulus == 0 for last, token in pairwise([prompt[-1], *completion])]


@dataclass(frozen=True)
class MultipleOf(Task):
    """Every token id is divisible by `modulus`: the relation for vocabularies too large to learn pairs of tokens."""

    modulus: int = 4

    @property
    def description(self) -> str:
        """The rule, in words."""
        return f"each token id is divisible by {self.modulus}"

    def hits(self, prompt: Sequence[int], completion: Sequence[int]) -> list[bool]:
        """Tell for each token whether it is divisible."""
        return [token % self.modulus == 0 for token in completion]


def task_for(vocab_size: int, avoid: Collection[int] = ()) -> Task:
    """Choose the task that a short run can teach with this vocabulary; no prompt contains the special ids `avoid`."""
    if vocab_size <= SMALL_VOCABULARY:
        return CountOn(vocab_size, avoid=frozenset(avoid))
    return MultipleOf(vocab_size, avoid=frozenset(avoid))


def reward(task: Task, prompt: Sequence[int], completion: Sequence[int]) -> float:
    """Compute the fraction of the completion's tokens that satisfy the relation; 0 for an empty completion."""
    hits = task.hits(prompt, completion)
    return sum(hits) / len(hits) if hits else 0.0


def grouped_prompts(task: Task, rng: random.Random, groups: int, group_size: int) -> list[list[int]]:
    """Draw `groups` fresh prompts, each repeated `group_size` times in a row, as GRPO's normalisation expects them."""
    return [prompt for prompt in [task.prompt(rng) for _ in range(groups)] for _ in range(group_size)]


def uniform_reward(task: Task, rng: random.Random, *, samples: int, tokens: int) -> float:
    """Measure the reward of tokens drawn uniformly from the vocabulary: the figure that a policy has to beat."""
    total = 0.0
    for _ in range(samples):
        total += reward(task, task.prompt(rng), [rng.randrange(task.vocab_size) for _ in range(tokens)])
    return total / samples
