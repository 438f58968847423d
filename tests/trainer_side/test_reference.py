"""The canary's reference: right numbers, and a model that is left exactly as it was."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bridge.errors import ConfigError
from bridge.model import canary
from trainer_side.reference import reference_logprobs, vocabulary_size

transformers = pytest.importorskip("transformers")

PROMPTS = [[1, 2, 3, 4], [5, 6], [7], [], [4, 3, 2, 1]]


def tiny(kind: str = "llama", **config: Any) -> Any:
    torch.manual_seed(0)
    known = transformers.AutoConfig.for_model(
        kind,
        **{
            "vocab_size": 50,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            **config,
        },
    )
    return transformers.AutoModelForCausalLM.from_config(known)


def by_hand(model: Any, prompt: list[int]) -> list[float]:
    """One prompt at a time, one position at a time, in float64."""
    scores = []
    with torch.no_grad():
        for k in range(1, len(prompt)):
            last = model(input_ids=torch.tensor([prompt[:k]])).logits[0, -1].double()
            scores.append(float(torch.log_softmax(last, -1)[prompt[k]]))
    return scores


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_log_probabilities_of_the_next_tokens(kind: str) -> None:
    model = tiny(kind).eval()
    got = reference_logprobs(model, PROMPTS)
    assert [len(row) for row in got] == [3, 1, 0, 0, 3]
    for row, prompt in zip(got, PROMPTS, strict=True):
        assert row == pytest.approx(by_hand(model, prompt), abs=1e-5)


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.module = inner


@pytest.mark.parametrize("wrap", [Wrapped, torch.compile, lambda m: Wrapped(torch.compile(m))])
def test_wrapped_models_answer_the_same(wrap: Any) -> None:
    model = tiny()
    assert reference_logprobs(wrap(model), PROMPTS) == reference_logprobs(model, PROMPTS)
    assert vocabulary_size(wrap(model)) == 50


class Disturbing(nn.Module):
    """A language model that does in its forward what a reference must not leave behind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.drop = nn.Dropout(0.5)
        self.frozen = nn.BatchNorm1d(8).eval()
        self.head = nn.Linear(8, 20)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("cache", torch.zeros(2), persistent=False)
        self.register_buffer("odd", torch.tensor([float("nan"), 1.0]))
        self.fail = False

    def train(self, mode: bool = True) -> Disturbing:
        raise AssertionError("train() may do anything; it is not ours to call")

    def forward(self, input_ids: torch.Tensor) -> Any:
        assert not torch.is_grad_enabled()
        assert not any(module.training for module in self.modules())
        torch.rand(3), np.random.rand(3), random.random()
        self.calls += 1
        self.cache = torch.ones(5)
        self.register_buffer("late", torch.ones(1))
        if self.fail:
            raise ValueError("no")
        return transformers.modeling_outputs.CausalLMOutput(logits=self.head(self.drop(self.embed(input_ids))))


@pytest.mark.parametrize("fail", [False, True])
def test_nothing_is_left_behind(fail: bool) -> None:
    model = Disturbing()
    model.fail = fail
    flags = [module.training for module in model.modules()]
    buffers = dict(model.named_buffers())
    values = copy.deepcopy(buffers)
    versions = {name: p._version for name, p in model.named_parameters()}
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[union-attr]
    if fail:
        with pytest.raises(ConfigError, match="ValueError: no"):
            reference_logprobs(model, PROMPTS)
    else:
        assert reference_logprobs(model, PROMPTS) == reference_logprobs(model, PROMPTS)
    assert [module.training for module in model.modules()] == flags
    assert dict(model.named_buffers()).keys() == buffers.keys()
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name]
        assert torch.equal(buffer.nan_to_num(7), values[name].nan_to_num(7))
    assert {name: p._version for name, p in model.named_parameters()} == versions
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # type: ignore[arg-type]
    assert random.getstate() == states[2]
    assert torch.is_grad_enabled()


def test_the_callers_autocast_does_not_reach_the_forward() -> None:
    model = tiny()
    plain = reference_logprobs(model, PROMPTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert reference_logprobs(model, PROMPTS) == plain


def test_bf16_models_answer_in_float32() -> None:
    model = tiny()
    plain = reference_logprobs(model, PROMPTS)
    low = reference_logprobs(model.bfloat16(), PROMPTS)
    assert low[0] != plain[0]
    assert low[0] == pytest.approx(plain[0], abs=0.05)


def test_a_token_beyond_the_vocabulary() -> None:
    for ids in ([3, 50], [3, -1]):
        with pytest.raises(ConfigError, match=r"does not know.*0 \.\. 49.*canary.prompts"):
            reference_logprobs(tiny(), [ids])
    model = tiny(vocab_size=11)
    rows = canary.prompts(vocabulary_size(model))
    assert all(len(a) == len(b) - 1 for a, b in zip(reference_logprobs(model, rows), rows, strict=True))


class Classifier(nn.Module):
    def forward(self, input_ids: torch.Tensor) -> Any:
        return transformers.modeling_outputs.SequenceClassifierOutput(logits=torch.zeros(len(input_ids), 2))


class Bare(nn.Module):
    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return input_ids


@pytest.mark.parametrize(
    ("model", "got"),
    [
        (nn.Linear(2, 2), "TypeError"),
        (Bare(), "without logits"),
        (Classifier(), r"logits of shape \[1, 2\]"),
    ],
)
def test_a_model_that_is_no_language_model(model: nn.Module, got: str) -> None:
    with pytest.raises(ConfigError, match=rf'not a causal language model.*{got}.*verify="weights"'):
        reference_logprobs(model, [[1, 2, 3]])


def test_a_model_without_an_embedding_has_no_vocabulary() -> None:
    with pytest.raises(ConfigError, match="no input embedding"):
        vocabulary_size(nn.Linear(2, 2))
