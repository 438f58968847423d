"""Rows x states x modes through the real wire (arena, plan, loader, read-back) into real engines.

What a layer must compute is asked of the live layer itself: a forward of a deep copy in float64, never PEFT's merge.
Every cell is a value, to 1e-9, or an exact refusal. Rows of `Toy` go into an attached module of the same shape, rows of
language models into the embedded engine.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import bridge
from bridge.errors import UnsupportedLora
from engine_side.embedded.config import EngineConfig
from engine_side.embedded.engine import Engine
from tests.push.lora_rig import apart, forward_logprobs
from tests.push.rig import PROMPTS
from tests.trainer_side.lora.oracle import TOLERANCE, untouched
from tests.trainer_side.lora.peft_rows import CAUSAL, ROWS, Row, Toy, build

State = Callable[[Any], None]
Toys = Callable[[torch.dtype], tuple[Toy, bridge.Bridge]]


def _active(model: Any) -> None:
    """As `build` leaves it: every adapter acts."""


def _first_only(model: Any) -> None:
    model.base_model.set_adapter(next(iter(model.peft_config)))


def _disabled(model: Any) -> None:
    model.base_model.disable_adapter_layers()


def _merged(model: Any) -> None:
    model.merge_adapter()


def _merged_and_disabled(model: Any) -> None:
    model.merge_adapter()
    model.base_model.disable_adapter_layers()


def _merged_while_another_is_active(model: Any) -> None:
    first, other, *_ = list(model.peft_config)  # ValueError: a row of one adapter cannot get there
    model.base_model.set_adapter(other)
    model.merge_adapter([first])


def _none_active(model: Any) -> None:
    model.base_model.set_adapter([])


STATES: tuple[State, ...] = (
    _active, _first_only, _disabled, _none_active, _merged, _merged_and_disabled, _merged_while_another_is_active,
)  # fmt: skip


def _in_place(model: Any) -> bool:
    """The base's tensors hold adapters: there is no base to send, and the delta must not be applied again."""
    return any(getattr(module, "merged_adapters", None) for module in model.modules())


def _reached(row: Row, state: State, dtype: torch.dtype = torch.float64) -> Any:
    """The row's model in a state; None where PEFT itself cannot get there."""
    model = build(row, dtype)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state(model)
    except (ValueError, NotImplementedError, AttributeError, RuntimeError):
        return None
    return model


BARE = Toy()
"""Only looked at: kinds and sizes of its layers."""


@torch.no_grad()
def _outputs(layer: Any, name: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """What a layer of `Toy` answers to every unit input. The forward may write to the layer."""
    base = getattr(BARE, name)
    if isinstance(base, torch.nn.Embedding):
        rows: torch.Tensor = layer(torch.arange(base.num_embeddings))
        return rows
    if hasattr(base, "kernel_size"):
        size = [5] * (base.weight.dim() - 2)
        x = torch.randn(3, base.in_channels, *size, dtype=dtype, generator=torch.Generator().manual_seed(1))
        conv: torch.Tensor = layer(x)
        return conv
    if isinstance(base, torch.nn.MultiheadAttention):
        x = torch.randn(2, 3, base.embed_dim, dtype=dtype, generator=torch.Generator().manual_seed(1))
        attended: torch.Tensor = layer(x, x, x)[0]
        return attended
    if hasattr(base, "gate_up_proj"):
        up = base.gate_up_proj
        inputs = up.shape[1] if base.is_transposed else up.shape[2]
        eye = torch.eye(inputs, dtype=dtype)
        return torch.stack([layer(eye, expert) for expert in range(up.shape[0])])
    inputs = base.weight.shape[0] if hasattr(base, "nf") else base.in_features
    linear: torch.Tensor = layer(torch.cat([torch.zeros(1, inputs, dtype=dtype), torch.eye(inputs, dtype=dtype)]))
    return linear


def _truthful(twin: Any, mode: str) -> Any:
    """A model of the same values as the one that is pushed, for forwards, which may write to it: as `mode` sends it."""
    if mode == "base":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            twin.base_model.disable_adapter_layers()
    return twin


# ---- layers, into an attached module --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toys() -> Iterator[Toys]:
    """`toys(dtype)`: an attached `Toy`, planned once for all rows, with random weights each time it is asked for."""
    made: dict[torch.dtype, tuple[Toy, bridge.Bridge]] = {}

    def take(dtype: torch.dtype) -> tuple[Toy, bridge.Bridge]:
        if dtype not in made:
            engine = Toy().to(dtype)
            made[dtype] = engine, bridge.attach(engine)
        with torch.no_grad():
            for parameter in made[dtype][0].parameters():
                parameter.normal_()
        return made[dtype]

    yield take
    for _, b in made.values():
        b.close()


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_layers_in_every_state(row: Row, toys: Toys) -> None:
    seen = set()
    for state in STATES:
        model = _reached(row, state)
        if model is None:
            continue
        for mode in ("base", "merged"):
            engine, b = toys(torch.float64)
            b.bind(model)
            seen.add(_cell(b, engine, model, row, state, mode))
    assert "value" in seen, "a row without any value tests nothing"


def _cell(b: bridge.Bridge, engine: Toy, model: Any, row: Row, state: State, mode: str) -> str:
    """One push of one mode: a value for every layer of the row, or a refusal where one is due."""
    case = f"{row}, {state.__name__}, {mode}"
    if _refused(row, model, state, mode):
        before = copy.deepcopy(engine.state_dict())
        with _left_alone(model, row), pytest.raises(UnsupportedLora) as caught:
            b.push(model.named_parameters(), mode=mode)
        assert caught.value.remedy, case
        assert all(torch.equal(t, engine.state_dict()[n]) for n, t in before.items()), f"{case}: half a change"
        return "refused"
    twin = _truthful(copy.deepcopy(model), mode).base_model.model
    with _left_alone(model, row):
        receipt = b.push(model.named_parameters(), mode=mode)
    assert receipt.verified in (True, "partial"), case
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says so when a forward unmerges
        for name in row.layers:
            want, got = _outputs(getattr(twin, name), name), _outputs(getattr(engine, name), name)
            assert (want - got).abs().max() < TOLERANCE, (case, name, float((want - got).abs().max()))
    return "value"


@contextmanager
def _left_alone(model: Any, row: Row) -> Iterator[None]:
    if "attention" not in row.layers:
        with untouched(model):
            yield
        return
    # PEFT's attention makes new Parameters whenever somebody walks the model; their bytes stay
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    yield
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def _refused(row: Row, model: Any, state: State, mode: str) -> bool:
    """Tell if this cell has no value: it is refused."""
    if mode == "base":
        return _in_place(model) or any(
            p.requires_grad and not COPIES.isdisjoint(n.split(".")) for n, p in _named(model)
        )
    if mode == "merged":
        return state is _merged_and_disabled and _in_place(model) and not (row.unmerges and row.mergeable)
    return not _acts(model, state) or any(str(row).startswith(feature) for feature in NO_LORA)


COPIES = {"modules_to_save", "trainable_tokens_delta"}
"""What trains beside the base's own tensors and is no LoRA."""


def _named(model: Any) -> list[tuple[str, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(model.named_parameters())


NO_LORA = ("lora_bias", "dora", "modules_to_save", "tokens", "bias all")
"""Features that have no form as A and B."""


def _acts(model: Any, state: State) -> bool:
    return state in (_active, _first_only) and not _in_place(model)


@pytest.mark.parametrize("row", [r for r in ROWS if r.initial is None], ids=str)
def test_layers_in_bf16_are_rounded_once(row: Row, toys: Toys) -> None:
    model = build(row, torch.bfloat16, wide_adapters=True)
    wide = copy.deepcopy(model).to(torch.float64)
    (engine, b), (exact, b_exact) = toys(torch.bfloat16), toys(torch.float64)
    b.bind(model)
    b.push(model.named_parameters(), mode="merged")
    b_exact.bind(wide)
    b_exact.push(wide.named_parameters(), mode="merged")
    total = off = 0
    for (name, got), want in zip(engine.named_parameters(), exact.parameters(), strict=True):
        rounded = want.to(torch.bfloat16)
        apart = (got.view(torch.int16).int() - rounded.view(torch.int16).int()).abs()
        total, off = total + got.numel(), off + int(apart.count_nonzero())
        assert apart.max() <= 1, name  # fp32 sums may fall to the other side of a tie, never further
    assert off <= max(1, total // 1000), (off, total)


# ---- language models, into the embedded engine ----------------------------------------------------------------------


@pytest.mark.parametrize("row", CAUSAL, ids=str)
def test_language_models_in_every_state(row: Row, checkpoint: Callable[[Any], Path]) -> None:
    # torch's grouped matrix product, which transformers' experts use, has no float64
    dtype, name, limit = (torch.float32, "fp32", 1e-4) if _experts(row) else (torch.float64, "fp64", 2e-6)
    folder = checkpoint(row.base().to(dtype))
    values = 0
    config = EngineConfig(str(folder), dtype=name, max_loras=2, max_lora_rank=8)
    with Engine(config) as engine, bridge.attach(engine) as b:
        for state in STATES:
            model = _reached(row, state, dtype)
            if model is None:
                continue
            b.bind(model)
            for mode in ("base", "adapter", "merged"):
                if _value(b, engine, model, row, state, mode):
                    # made once more: tied weights under merged adapters cannot be copied
                    truth = forward_logprobs(_truthful(_reached(row, state, dtype), mode), PROMPTS)
                    # not 1e-9: norms and rotary angles are float32 on both sides
                    assert apart(engine.prompt_logprobs(PROMPTS), truth) < limit, (row, state, mode)
                    values += 1
    assert values >= 3


def _value(b: bridge.Bridge, engine: Engine, model: Any, row: Row, state: State, mode: str) -> bool:
    """Push; False for a cell that has to be refused, and was."""
    if not _refused(row, model, state, mode):
        with untouched(model, versions=not _experts(row)):
            b.push(model.named_parameters(), mode=mode)
        return True
    before = engine.prompt_logprobs(PROMPTS)
    with untouched(model), pytest.raises(UnsupportedLora) as caught:
        b.push(model.named_parameters(), mode=mode)
    assert caught.value.remedy, (row, state, mode)
    assert engine.prompt_logprobs(PROMPTS) == before, (row, state, mode)
    return False


def _experts(row: Row) -> bool:
    return any("target_parameters" in config for config in row.adapters.values())
