"""A trainer in 16 or 32 bits pushes into engines whose checkpoint was quantised before: they then serve what a
checkpoint of the new weights would give, bit for bit."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import bridge
from bridge.model.receipt import Failure, LevelResult
from bridge.shm.arena import DIGEST_NBYTES, Seal
from engine_side.embedded.config import LAYOUTS, EngineConfig
from engine_side.embedded.engine import Engine
from engine_side.quantise.checkpoint_form import CheckpointForm, QuantisedWeight
from engine_side.quantise.reproduce import CheckpointSchemes
from engine_side.quantise.scheme import Scheme
from engine_side.quantise.slots import QuantisedSlots
from engine_side.verify.verify import Verifier
from tests.engine_side import embedded_models as tiny
from tests.push.rig import refused
from tests.push.test_fleet_faults import FleetSession, bridge_over

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


def test_a_quantised_and_a_plain_engine_of_one_fleet(
    families: Callable[..., Family], engines: Callable[..., Engine], tmp_path: Path
) -> None:
    """One snapshot serves both: values travel, and each engine makes of them what it holds."""
    case = families("qwen2")
    first, second = case.later
    plain, coded = engines(first.folder.parent / "values", dtype="bf16"), engines(case.folder, dtype="bf16")
    b = bridge_over(FleetSession([plain, coded], tmp_path))
    try:
        receipt = b.push(second.values.items(), verify="weights")
        assert receipt.verified is True
        assert [bool(engine.quantised) for engine in receipt.engines] == [False, True]
    finally:
        b.close()
    assert same(coded, engines(second.folder, dtype="bf16"))
    assert same(plain, engines(second.folder.parent / "values", dtype="bf16"))


@pytest.mark.parametrize("layout", ["canonical", "packed"])
def test_every_engine_of_a_fleet_gets_its_own_codes_back(
    families: Callable[..., Family],
    engines: Callable[..., Engine],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    layout: str,
) -> None:
    case, config = families("qwen2"), {"dtype": "bf16", "layout": layout}
    made = [engines(case.folder, **config) for _ in range(2)]
    b = bridge_over(FleetSession(made, tmp_path))
    try:
        found = LevelResult("change", False, 1, (Failure("x", "a", "b"),))
        monkeypatch.setattr(Verifier, "change", lambda *_: found)
        with pytest.raises(bridge.PushAborted):
            b.push(case.later[0].values.items(), verify="weights")
        assert [info.serving for info in b.status().engines] == [0, 0]
        assert all(same(engine, engines(case.folder, **config)) for engine in made)
    finally:
        b.close()


@pytest.mark.parametrize("layout", ["canonical", "packed"])
def test_two_ranks_quantise_whole_weights_and_take_their_parts(
    families: Callable[..., Family], engines: Callable[..., Engine], layout: str
) -> None:
    case = families("uneven", torch.bfloat16, (32, 8))
    config = {"tensor_parallel_size": 2, "layout": layout}
    engine = engines(case.folder, **config)
    with bridge.attach(engine) as b:
        for new in case.later:
            assert b.push(new.values.items(), verify="weights").verified is True
            want = engines(new.folder, **config)
            assert engine.prompt_logprobs(tiny.prompts()) == want.prompt_logprobs(tiny.prompts())
        b.rollback()
        want = engines(case.later[0].folder, **config)
        assert engine.prompt_logprobs(tiny.prompts()) == want.prompt_logprobs(tiny.prompts())


def test_a_subset_is_quantised_alone_and_the_rest_keeps_its_codes(
    families: Callable[..., Family], engines: Callable[..., Engine]
) -> None:
    case = families("qwen2")
    engine, untouched = engines(case.folder), engines(case.folder)
    new, part = case.later[0], "model.layers.1.self_attn.k_proj.weight"
    with bridge.attach(engine) as b:
        receipt = b.push([(part, new.values[part])], partial=True, verify="weights")
        assert receipt.verified is True
        assert receipt.engines[0].quantised.keys() == {part}
        before = storages(untouched)
        moved = {name for name, t in storages(engine).items() if not torch.equal(t, before[name])}
        assert moved == {f"model.layers.1.self_attn.qkv_proj.{name}" for name in ("weight", "weight_scale_inv")}
        assert b.push(new.values.items(), verify="weights").verified is True
    assert same(engine, engines(new.folder))


@pytest.mark.parametrize("layout", ["canonical", "packed"])
@pytest.mark.parametrize("failed", [True, False])
def test_what_a_subset_leaves_out_keeps_the_codes_of_the_engine_s_checkpoint(
    families: Callable[..., Family],
    engines: Callable[..., Engine],
    monkeypatch: pytest.MonkeyPatch,
    layout: str,
    failed: bool,
) -> None:
    """In bf16, what the codes stand for is rounded: codes made of that would be others."""
    case = families("qwen2")
    config = {"layout": layout, "dtype": "bf16"}
    engine, untouched = engines(case.folder, **config), engines(case.folder, **config)
    new = case.later[0]
    with bridge.attach(engine) as b:
        with monkeypatch.context() as patch:
            if failed:
                found = LevelResult("change", False, 1, (Failure("x", "a", "b"),))
                patch.setattr(Verifier, "change", lambda *_: found)
                with pytest.raises(bridge.PushAborted):
                    b.push(new.values.items(), verify="weights")
            else:
                b.push(new.values.items(), verify="weights")
                b.rollback()
        pushed: set[str] = set()
        for layer in (1, 0, 2):
            part = f"model.layers.{layer}.self_attn.o_proj.weight"
            pushed.add(part)
            receipt = b.push([(part, new.values[part])], partial=True, verify="weights")
            assert (receipt.verified, receipt.notes) == (True, ())
            assert receipt.engines[0].quantised.keys() == pushed
            if layout == "canonical":
                before = storages(untouched)
                moved = {name for name, t in storages(engine).items() if not torch.equal(t, before[name])}
                assert moved == {name + end for name in pushed for end in ("", "_scale_inv")}
        before = engines(case.folder, **config)
        with bridge.attach(before) as other:
            other.push([(name, new.values[name]) for name in pushed], partial=True, verify="weights")
        assert same(engine, before)


def rewrite(folder: Path, into: Path, change: Callable[[Tensors], Tensors], **config: Any) -> Path:
    """Copy a checkpoint with other tensors and other words in its `quantization_config`."""
    into.mkdir()
    save_file(change(load_file(folder / "model.safetensors")), into / "model.safetensors")
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"].update(config)
    (into / "config.json").write_text(json.dumps(raw))
    return into


def test_codes_that_no_rounding_of_a_weight_gives_are_refused_by_their_method(
    families: Callable[..., Family], engines: Callable[..., Engine], tmp_path: Path
) -> None:
    """As those of a quantiser that looks at data: the largest value of a block need not have the largest code."""

    def halved(tensors: Tensors) -> Tensors:
        return {n: (t.float() / 2).to(t.dtype) if t.itemsize == 1 else t for n, t in tensors.items()}

    case = families("qwen2")
    engine = engines(rewrite(case.folder, tmp_path / "data", halved))
    before = storages(engine)
    new = case.later[0]
    with bridge.attach(engine) as b:
        with refused(bridge.DtypeMismatch, 5, "model.layers.0", "(fp8)", "fp8_e4m3"):
            b.push(new.values.items(), verify="weights")
        assert all(torch.equal(t, before[n]) for n, t in storages(engine).items())
        assert b.push(new.codes.items(), verify="weights").verified is True  # the remedy: a trainer of the codes
    assert same(engine, engines(new.folder))


def test_scales_that_are_powers_of_two_stay_so(
    families: Callable[..., Family], engines: Callable[..., Engine], tmp_path: Path
) -> None:
    def rounded(tensors: Tensors) -> Tensors:
        out = dict(tensors)
        for name, codes in tensors.items():
            if codes.itemsize == 1:
                scales = tensors[f"{name}_scale_inv"]
                up = torch.exp2(torch.log2(scales).ceil())
                spread = (scales / up).repeat_interleave(2, 0)[: len(codes)]
                ratio = spread.repeat_interleave(8, 1)[:, : codes.shape[1]]
                out[name], out[f"{name}_scale_inv"] = (codes.float() * ratio).to(codes.dtype), up
        return out

    case = families("qwen2")
    engine = engines(rewrite(case.folder, tmp_path / "powers", rounded))
    with bridge.attach(engine) as b:
        assert b.push(case.later[0].values.items(), verify="weights").verified is True
    held = engine.runner.model.state_dict()
    scales = torch.cat([t.flatten() for name, t in held.items() if name.endswith("scale_inv")])
    assert bool((torch.frexp(scales).mantissa == 0.5).all())


def test_values_beside_scales_are_refused_until_the_scales_are_left_out(
    families: Callable[..., Family], engines: Callable[..., Engine]
) -> None:
    case = families("qwen2")
    engine, new = engines(case.folder), case.later[0]
    name = "model.layers.0.mlp.down_proj.weight"
    with bridge.attach(engine) as b:
        with refused(bridge.DtypeMismatch, 5, name, "leave its scales out"):
            b.push({**new.codes, name: new.values[name]}.items(), verify="weights")
        sent = {**new.codes, name: new.values[name]}
        sent.pop(f"{name}_scale_inv")
        assert b.push(sent.items(), verify="weights").verified is True
    assert same(engine, engines(new.folder))


def test_a_value_without_a_code_is_refused(families: Callable[..., Family], engines: Callable[..., Engine]) -> None:
    case = families("qwen2")
    engine, new = engines(case.folder), case.later[0]
    name = "model.layers.0.mlp.down_proj.weight"
    endless = {**new.values, name: torch.full_like(new.values[name], torch.inf)}
    with bridge.attach(engine) as b:
        with pytest.raises(bridge.NonFinite, match="has no code"):
            b.push(endless.items(), verify="weights", allow_nonfinite=True)
        with refused(bridge.NonFinite, 5, name):
            b.push(endless.items(), verify="weights")
        assert b.push(new.values.items(), verify="weights").verified is True
    assert same(engine, engines(new.folder))


def test_a_bound_trainer_of_values_gets_a_canary_with_the_floor_of_the_codes(
    families: Callable[..., Family], engines: Callable[..., Engine]
) -> None:
    case = families("qwen2")
    model = tiny.make_model("qwen2", seed=99).bfloat16()
    with bridge.attach(engines(case.folder), model=model) as b:
        receipt = b.push(model.named_parameters())
        assert receipt.verified is True
        drift = receipt.engines[0].canary
        assert drift is not None
        assert 0 < drift.mean_abs < drift.limit == 0.1


@pytest.mark.parametrize(
    ("method", "stored", "named"),
    [
        ("gptq", ("qweight", "qzeros", "scales", "g_idx"), "gptq"),
        ("awq", ("qweight", "qzeros", "scales"), "awq"),
        ("compressed-tensors", ("weight_packed", "weight_scale", "weight_shape"), "compressed-tensors pack-quantized"),
        ("compressed-tensors", ("weight", "weight_scale", "weight_g_idx"), "compressed-tensors pack-quantized"),
    ],
)
def test_formats_whose_codes_depend_on_more_than_the_weight_are_refused_by_name(
    tmp_path: Path, method: str, stored: tuple[str, ...], named: str
) -> None:
    """As their checkpoints look, whatever engine serves them."""
    kinds = {"scales": torch.float32, "weight_scale": torch.float32, "weight_shape": torch.int64, "weight": torch.int8}
    tensors = {f"a.proj.{name}": torch.ones(4, 8).to(kinds.get(name, torch.int32)) for name in stored}
    save_file({**tensors, "a.norm.weight": torch.ones(8)}, tmp_path / "model.safetensors")
    config = {"quant_method": method} | ({"format": "pack-quantized"} if "pack" in named else {})
    schemes = CheckpointSchemes(tmp_path, config)
    assert not schemes.stored_as_codes("a.norm.weight")
    assert schemes.stored_as_codes("a.proj.weight")
    with pytest.raises(bridge.DtypeMismatch, match=re.escape(f"({named})")) as caught:
        schemes.scheme("a.proj.weight")
    assert caught.value.names == ("a.proj.weight",)
    assert "push from a trainer of the quantised weights" in str(caught.value)


GRIDS = [((1, 16), "channel"), ((33, 16), "tensor"), ((1, 8), "group"), ((8, 8), "block"), ((128, 128), "one block")]


@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("block", [grid for grid, _ in GRIDS], ids=[name for _, name in GRIDS])
def test_a_scheme_is_known_by_what_it_makes_and_by_nothing_else(
    tmp_path: Path, block: tuple[int, int], codes: torch.dtype
) -> None:
    """Codes and scales by a formula of their own; any code or scale that is another one shows."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(33, 16, generator=generator)
    weight[0, :8] = 0
    rows, columns = (min(size, whole) for size, whole in zip(block, weight.shape, strict=True))
    high, wide = -(-33 // rows), -(-16 // columns)
    peak = torch.iinfo(codes).max if codes is torch.int8 else torch.finfo(codes).max
    scales, made = torch.ones(high, wide), torch.zeros(33, 16, dtype=codes)
    for i, j in itertools.product(range(high), range(wide)):
        part = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
        if bool(weight[part].any()):
            scales[i, j] = weight[part].abs().max() / peak
        quotient = weight[part] / scales[i, j]
        made[part] = (quotient.round() if codes is torch.int8 else quotient).to(codes)
    save_file({"a.weight": made, "a.weight_scale": scales}, tmp_path / "model.safetensors")
    schemes = CheckpointSchemes(tmp_path, {"quant_method": "fp8", "weight_block_size": list(block)})
    _, scheme = schemes.scheme("a.weight")
    got = scheme.quantise(weight)
    assert torch.equal(got[0].float(), made.float())
    assert torch.equal(got[1], scales)
    error, worst = scheme.compare(weight, *got)
    assert error == pytest.approx(float((weight - scheme.dequantise(*got)).norm() / weight.norm()), rel=1e-6)
    assert scheme.within(worst)
    wrong = (made.float() / 2).to(codes)
    assert not scheme.explains(wrong, scales)
    assert not scheme.within(scheme.compare(weight, wrong, scales)[1])
    assert not scheme.within(scheme.compare(weight, made, scales * 1.1)[1])


@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16, torch.float16])
def test_values_beyond_the_last_code_where_a_scale_was_rounded_down(tmp_path: Path, scales: torch.dtype) -> None:
    """compressed-tensors: the largest value of a channel is 127.5 of its scales, which have the dtype of the model."""

    def quantised(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        made = (weight.abs().amax(dim=1, keepdim=True) / 127.5).to(scales)
        return (weight / made.float()).round().clamp(-128, 127).to(torch.int8), made

    generator = torch.Generator().manual_seed(3)
    codes, spread = quantised(torch.randn(64, 32, generator=generator))
    save_file({"a.weight": codes, "a.weight_scale": spread}, tmp_path / "model.safetensors")
    _, scheme = CheckpointSchemes(tmp_path, {"quant_method": "compressed-tensors"}).scheme("a.weight")
    weight = torch.randn(64, 32, generator=generator)
    codes, spread = scheme.quantise(weight)
    assert all(torch.equal(a, b) for a, b in zip((codes, spread), quantised(weight), strict=True))
    assert scheme.within(scheme.compare(weight, codes, spread)[1])
    for wrong in (1, 2):
        off = torch.where(codes == 127, codes - wrong, codes)
        assert not scheme.within(scheme.compare(weight, off, spread)[1])
    assert not scheme.within(scheme.compare(weight * 1.02, codes, spread)[1])


def test_codes_that_were_found_wrong_are_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the values that come next are those for which the slot's codes stood before."""
    one, other = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(3))
    scheme = Scheme(torch.int8, torch.float32, (1, 8), (4, 1), 127.0)
    codes, scales = scheme.quantise(one)
    save_file({"a.weight": codes, "a.weight_scale": scales}, tmp_path / "model.safetensors")
    schemes = CheckpointSchemes(tmp_path, {})
    weight = QuantisedWeight(*schemes.scheme("a.weight"), "fp32")
    form = CheckpointForm((), {"a.weight": weight}, {}, schemes)
    slots = QuantisedSlots(form, frozenset({"a.weight", "a.weight_scale"}), {"a.weight": 0}, 2)

    def prepare(values: torch.Tensor, mark: int) -> None:
        slots.prepare(1, [values], lambda _: Seal(1, b"", bytes([mark]) * DIGEST_NBYTES))

    prepare(one, 1)
    with monkeypatch.context() as patch:
        patch.setattr(Scheme, "within", lambda *_: False)
        with pytest.raises(bridge.IntegrityError, match="further from its values"):
            prepare(other, 2)
    prepare(one, 1)
    assert torch.equal(slots.made[1]["a.weight"], codes)


def test_a_trainer_may_change_from_codes_to_values_and_back(
    families: Callable[..., Family], engines: Callable[..., Engine]
) -> None:
    case = families("qwen2")
    engine, (first, second) = engines(case.folder), case.later
    with bridge.attach(engine) as b:
        for new in (first, second):
            receipt = b.push(new.codes.items(), verify="weights")
            assert receipt.verified is True
            assert not receipt.engines[0].quantised
            assert same(engine, engines(new.folder))
            assert b.push(case.later[0].values.items(), verify="weights").verified is True
            assert same(engine, engines(first.folder))


@pytest.mark.parametrize("verify", ["off", "weights"])
def test_a_code_that_is_not_the_nearest_stops_the_push_before_the_first_write(
    families: Callable[..., Family], engines: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, verify: str
) -> None:
    """An injected fault: one code of one weight is one step off, as a bit that flipped in memory would have it."""
    case = families("qwen2")
    engine = engines(case.folder)
    before = storages(engine)
    quantise = Scheme.quantise

    def one_off(self: Scheme, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes, scales = quantise(self, values)
        codes.view(torch.uint8)[-1, -1] ^= 2
        return codes, scales

    with bridge.attach(engine) as b:
        with monkeypatch.context() as patch:
            patch.setattr(Scheme, "explains", lambda *_: True)
            patch.setattr(Scheme, "quantise", one_off)
            with refused(bridge.IntegrityError, 5, "further from its values than rounding explains", "half steps"):
                b.push(case.later[0].values.items(), verify=verify)
        assert all(torch.equal(t, before[name]) for name, t in storages(engine).items())
        assert b.push(case.later[0].values.items(), verify="weights").verified is True


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_has_no_code(
    families: Callable[..., Family], engines: Callable[..., Engine], value: float
) -> None:
    case = families("qwen2")
    engine = engines(case.folder)
    before = storages(engine)
    name = "model.layers.1.mlp.down_proj.weight"
    broken = case.later[0].values[name].clone()
    broken[3, 4] = value
    with bridge.attach(engine) as b:
        with refused(bridge.errors.NonFinite, 5, name, "not finite"):
            b.push({**case.later[0].values, name: broken}.items(), verify="weights", allow_nonfinite=True)
        assert all(torch.equal(t, before[name]) for name, t in storages(engine).items())
        assert b.push(case.later[0].values.items(), verify="weights").verified is True
