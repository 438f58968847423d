"""A trainer in 16 or 32 bits pushes into engines whose checkpoint was quantised before: they then serve what a
checkpoint of the new weights would give, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import bridge
from bridge.model.receipt import Failure, LevelResult
from engine_side.embedded.config import LAYOUTS, EngineConfig
from engine_side.embedded.engine import Engine
from engine_side.verify.verify import Verifier
from tests.engine_side import embedded_models as tiny

BLOCK = (128, 128)
WIDE = {"hidden_size": 160, "intermediate_size": 256, "head_dim": 128, "num_key_value_heads": 1}
"""Edges that are no multiples of 128, but for those at which fused parts meet."""
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Weights:
    """New weights: as a trainer has them, and as a checkpoint of the engine's kind."""

    values: Tensors
    folder: Path
    codes: Tensors


@dataclass(frozen=True)
class Family:
    """The checkpoint that an engine starts from, and two later versions of the weights."""

    folder: Path
    later: tuple[Weights, Weights]


def save(folder: Path, family: str, seed: int, dtype: torch.dtype, block: tuple[int, int]) -> Weights:
    changes, family = (WIDE, "qwen3") if family == "uneven" else ({}, family)
    model = tiny.make_model(family, seed=seed, **changes).to(dtype)
    model.save_pretrained(folder / "values")
    values = load_file(folder / "values" / "model.safetensors")
    rounded = tiny.make_model(family, seed=seed, **changes)
    rounded.load_state_dict(model.float().state_dict())
    codes = tiny.save_fp8(folder / "codes", rounded, block)
    return Weights(values, folder / "codes", codes)


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Family]:
    @cache
    def make(family: str, dtype: torch.dtype = torch.bfloat16, block: tuple[int, int] = (2, 8)) -> Family:
        folder = tmp_path_factory.mktemp(family)
        first = save(folder / "first", family, 0, torch.float32, block)
        made = [save(folder / str(seed), family, seed, dtype, block) for seed in (99, 7)]
        return Family(first.folder, (made[0], made[1]))

    return make


@pytest.fixture
def engines() -> Iterator[Callable[..., Engine]]:
    started: list[Engine] = []

    def start(folder: Path, **config: Any) -> Engine:
        started.append(Engine(EngineConfig(str(folder), threads=1, **config)))
        return started[-1]

    yield start
    for engine in started:
        engine.close()


def storages(engine: Engine) -> dict[str, torch.Tensor]:
    held = engine.runner.model.state_dict()
    return {name: t.detach().contiguous().view(torch.uint8) for name, t in held.items() if t.dim()}


def same(one: Engine, other: Engine) -> bool:
    a, b = storages(one), storages(other)
    equal = a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())
    return equal and one.prompt_logprobs(tiny.prompts()) == other.prompt_logprobs(tiny.prompts())


@pytest.mark.parametrize(
    ("family", "layout", "wrapped"),
    [
        *(("qwen2", layout, layout == "packed") for layout in LAYOUTS),
        *(("moe", "packed", False), ("moe", "canonical", True)),
        *(("deepseek-v3", "packed", False), ("deepseek-v3", "shuffled", True)),
    ],
)
def test_values_become_the_codes_of_a_checkpoint_of_them(
    families: Callable[..., Family], engines: Callable[..., Engine], family: str, layout: str, wrapped: bool
) -> None:
    case = families(family)
    engine = engines(case.folder, layout=layout, wrap_linears=wrapped)
    with bridge.attach(engine) as b:
        for new in case.later:
            receipt = b.push(new.values.items(), verify="weights")
            assert receipt.verified is True
            assert same(engine, engines(new.folder, layout=layout, wrap_linears=wrapped))
            errors = receipt.engines[0].quantised
            assert errors.keys() == {name for name, t in new.codes.items() if t.dtype is torch.float8_e4m3fn}
            assert all(0 < error < 0.04 for error in errors.values()), errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_blocks_of_128_with_uneven_edges_in_every_dtype_of_a_trainer(
    families: Callable[..., Family], engines: Callable[..., Engine], dtype: torch.dtype
) -> None:
    case = families("uneven", dtype, BLOCK)
    engine = engines(case.folder)
    with bridge.attach(engine) as b:
        for new in case.later:
            assert b.push(new.values.items(), verify="weights").verified is True
            assert same(engine, engines(new.folder))


@pytest.mark.parametrize("layout", ["canonical", "packed"])
def test_what_fails_puts_the_engine_s_own_codes_back(
    families: Callable[..., Family], engines: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    """The codes of the first checkpoint come from other values than those that the trainer ever had."""
    case = families("qwen2")
    # in bf16, what the codes stand for is rounded: codes made of that would be others
    config = {"layout": layout, "dtype": "bf16"}
    engine, before = engines(case.folder, **config), engines(case.folder, **config)
    first, second = case.later
    with bridge.attach(engine) as b:
        with monkeypatch.context() as patch:
            found = LevelResult("change", False, 1, (Failure("x", "a", "b"),))
            patch.setattr(Verifier, "change", lambda *_: found)
            with pytest.raises(bridge.PushAborted):
                b.push(first.values.items(), verify="weights")
        assert b.status().engines[0].serving == 0
        assert same(engine, before)
        b.push(first.values.items(), verify="weights")
        b.rollback()
        assert same(engine, before)
        b.push(first.values.items(), verify="weights")
        b.push(second.values.items(), verify="weights")
        b.rollback()
        again = engines(first.folder, **config)
        assert same(engine, again)
