"""Batched sampling: greedy, temperature, top-p, each request with its own random stream."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from bridge.protocol.codec import Sampling


def stream(sampling: Sampling, index: int) -> random.Random:
    """Make the random stream of prompt `index` of a call: repeatable with a seed, different for each prompt."""
    return random.Random() if sampling.seed is None else random.Random(f"{sampling.seed}:{index}")


@torch.no_grad()
def sample(
    logits: torch.Tensor, settings: Sequence[Sampling], streams: Sequence[random.Random]
) -> tuple[list[int], list[float]]:
    """Sample one token per row of logits [n, vocabulary]; returns the tokens and their log-probabilities at temperature
    1 before top-p."""
    logprobs = logits.float().log_softmax(dim=-1)
    tokens = logprobs.argmax(dim=-1)
    drawn = [i for i, s in enumerate(settings) if s.temperature > 0]
    if drawn:
        rows = torch.tensor(drawn)
        temperature = torch.tensor([settings[i].temperature for i in drawn]).unsqueeze(1)
        top_p = torch.tensor([settings[i].top_p for i in drawn]).unsqueeze(1)
        uniform = torch.tensor([streams[i].random() for i in drawn]).unsqueeze(1)
        tokens[rows] = _draw((logprobs[rows] / temperature).softmax(dim=-1), top_p, uniform)
    chosen = logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1)
    return tokens.tolist(), chosen.tolist()


def _draw(probs: torch.Tensor, top_p: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Inverse of the cumulative distribution at `uniform`, after cutting to the smallest set of mass `top_p`."""
    if bool((top_p >= 1).all()):
        return _invert(probs, uniform)
    ordered, order = probs.sort(dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered
    # The most likely token always stays, so that rounding can never leave an empty set.
    keep = (before < top_p) | (top_p >= 1)
    keep[:, 0] = True
    place = _invert(ordered * keep, uniform)
    return order.gather(1, place.unsqueeze(1)).squeeze(1)


def _invert(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1:]
    # Strictly below the total, so that the first sum above the target belongs to a token of positive weight.
    target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True).squeeze(1)
