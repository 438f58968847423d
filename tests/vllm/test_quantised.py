"""Trainers of values push into vLLM engines with quantised weights: the engine is then, in every log-probability, one
that was started from a quantised checkpoint of the new values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import bridge
from bridge.errors import MissingTensor
from tests.families import make_model, perturb
from tests.vllm.quantised import Tensors, int8, int8_config, quantised, save
from tests.vllm.rig import said_by

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def start(rigs: Any) -> Iterator[Callable[..., Any]]:
    """Engines in this process; the last one ends with the test."""
    rigs.close()
    started: list[Any] = []

    def make(folder: Path, **arguments: Any) -> Any:
        from tests.vllm.rig import start as start_one

        started.append(start_one(folder, "inproc", **arguments))
        return started[-1]

    yield make
    for llm in started:
        llm.llm_engine.engine_core.shutdown()


def bits(llm: Any) -> dict[str, bytes]:
    """The bytes of every registered tensor that has any."""
    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()
    held = [*model.named_parameters(), *model.named_buffers()]
    return {n: t.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for n, t in held if t.numel()}


def calibrated(model: Any) -> Tensors:
    """A scale for the inputs of every projection, another one for each."""
    names = [name.removesuffix("weight") for name, _ in model.named_parameters() if name.endswith("_proj.weight")]
    return {f"{name}input_scale": torch.tensor([0.02 + 0.001 * k]) for k, name in enumerate(names)}


@pytest.mark.parametrize(
    ("weights", "activations", "peak"),
    [("channel", "token", 127.5), ("channel", "tensor", 127), ("tensor", "token", 127), ("tensor", "tensor", 127.5)],
)
def test_int8_checkpoints_of_every_granularity(
    start: Callable[..., Any], tmp_path: Path, weights: str, activations: str, peak: float
) -> None:
    model = make_model("qwen2")
    kept = calibrated(model) if activations == "tensor" else {}
    quantise = partial(int8, peak=peak, whole=weights == "tensor")
    config = int8_config(weights, activations)
    save(tmp_path / "first", model, config, {**quantised(model, quantise), **kept})
    llm = start(tmp_path / "first")
    before = said_by(llm)
    with bridge.attach(llm) as b:
        for step in (1, 2):
            perturb(model, step)
            receipt = b.push(model.named_parameters(), verify="weights")
            assert receipt.verified is True
            assert receipt.kept == tuple(sorted(kept))
            errors = receipt.engines[0].quantised
            assert errors.keys() == {name for name, _ in model.named_parameters() if name.endswith("_proj.weight")}
            assert all(0 < error < 0.02 for error in errors.values())
        save(tmp_path / "last", model, config, {**quantised(model, quantise), **kept})
        fresh = start(tmp_path / "last")
        assert said_by(llm) == said_by(fresh) != before
        assert bits(llm) == bits(fresh)
        b.push([(n, p) for n, p in make_model("qwen2").named_parameters()], verify="weights")
        assert said_by(llm) == before
        b.rollback()
        assert said_by(llm) == said_by(fresh)


@pytest.mark.parametrize("weights", [True, False], ids=["int8 weights", "bf16 weights"])
def test_the_calibrated_scales_of_a_quantised_cache_are_kept(
    start: Callable[..., Any], tmp_path: Path, weights: bool
) -> None:
    """They lie in attention layers, which hold nothing that a trainer has."""
    model, names = make_model("qwen2"), [f"model.layers.{k}.self_attn.{kv}_scale" for k in (0, 1) for kv in "kv"]
    scales = {name: torch.tensor([0.02 + 0.01 * k]) for k, name in enumerate(names)}
    config = int8_config()
    config["kv_cache_scheme"] = {
        "num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False,
    }  # fmt: skip
    config["config_groups"] = config["config_groups"] if weights else {}
    quantise = int8 if weights else lambda name, weight: {name: weight.clone()}
    save(tmp_path / "first", model, config, {**quantised(model, quantise), **scales})
    llm = start(tmp_path / "first", kv_cache_dtype="fp8")
    with bridge.attach(llm) as b:
        perturb(model, 1)
        receipt = b.push(model.named_parameters(), verify="weights")
        assert receipt.verified is True
        assert receipt.kept == receipt.engines[0].kept == tuple(sorted(names))
    save(tmp_path / "last", model, config, {**quantised(model, quantise), **scales})
    fresh = start(tmp_path / "last", kv_cache_dtype="fp8")
    assert said_by(llm) == said_by(fresh)
    assert bits(llm) == bits(fresh)


@pytest.fixture
def fp8_kernel_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for the kernel that quantises to fp8, which vLLM for CPU declares and lacks. Products are torch's."""
    from vllm import _custom_ops

    def scaled_fp8_quant(
        values: torch.Tensor, scale: torch.Tensor | None = None, use_per_token_if_dynamic: bool = False, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wide, largest = values.float(), torch.finfo(torch.float8_e4m3fn).max
        if scale is None:
            peak = wide.abs().amax(-1, keepdim=True) if use_per_token_if_dynamic else wide.abs().amax().reshape(1)
            scale = peak / largest
        return (wide / scale).clamp(-largest, largest).to(torch.float8_e4m3fn), scale

    monkeypatch.setattr(_custom_ops, "scaled_fp8_quant", scaled_fp8_quant)


@pytest.mark.usefixtures("fp8_kernel_stand_in")
@pytest.mark.parametrize("how", ["fp8", "fp8_per_channel"])
def test_an_engine_that_quantises_as_it_loads(start: Callable[..., Any], tmp_path: Path, how: str) -> None:
    """vLLM keeps weights back until a layer has all of its own, quantises it, and never does so again."""
    model = make_model("qwen2")
    model.save_pretrained(tmp_path / "first")
    llm = start(tmp_path / "first", quantization=how)
    before = said_by(llm)
    with bridge.attach(llm) as b:
        for step in (1, 2):
            perturb(model, step)
            assert b.push(model.named_parameters(), verify="weights").verified is True
        name, value = next((n, p) for n, p in model.named_parameters() if "q_proj.weight" in n)
        assert b.push([(name, value)], partial=True, verify="weights").verified is True  # the others are in the arena
        model.save_pretrained(tmp_path / "last")
        fresh = start(tmp_path / "last", quantization=how)
        assert said_by(llm) == said_by(fresh) != before
        assert bits(llm) == bits(fresh)
    with bridge.attach(llm) as b, pytest.raises(MissingTensor, match="all of its tensors"):
        b.push([(name, value)], partial=True, verify="weights")
    assert said_by(llm) == said_by(fresh)


@pytest.fixture
def block_kernel_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for the product of fp8 blocks, which vLLM has for AMX processors only. It packs nothing."""
    from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUFp8BlockScaledMMKernel as Kernel

    def apply(self: Any, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None, **_: Any) -> torch.Tensor:
        spread = layer.weight_scale_inv.repeat_interleave(128, 0)[: layer.weight.shape[0]]
        spread = spread.repeat_interleave(128, 1)[:, : layer.weight.shape[1]]
        return torch.nn.functional.linear(x, (layer.weight.float() * spread).to(x.dtype), bias)

    monkeypatch.setattr(Kernel, "is_supported", classmethod(lambda *_: (True, None)))
    monkeypatch.setattr(Kernel, "process_weights_after_loading", lambda *_: None)
    monkeypatch.setattr(Kernel, "apply_weights", apply)


def fp8_blocks(name: str, weight: torch.Tensor) -> Tensors:
    rows, columns = weight.shape
    high, wide = -(-rows // 128), -(-columns // 128)
    padded = torch.zeros(high * 128, wide * 128)
    padded[:rows, :columns] = weight.float()
    tiles = padded.view(high, 128, wide, 128)
    scales = tiles.abs().amax(dim=(1, 3)) / 448
    codes = (tiles / scales[:, None, :, None]).view(high * 128, wide * 128)[:rows, :columns]
    return {name: codes.to(torch.float8_e4m3fn).contiguous(), f"{name}_scale_inv": scales}


@pytest.mark.usefixtures("block_kernel_stand_in")
def test_fp8_blocks_with_uneven_edges_in_real_layers(start: Callable[..., Any], tmp_path: Path) -> None:
    sizes = {"hidden_size": 192, "num_key_value_heads": 4}
    model = make_model("qwen3", **sizes)
    config = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    save(tmp_path / "first", model, config, quantised(model, fp8_blocks))
    llm = start(tmp_path / "first")
    before = said_by(llm)
    with bridge.attach(llm) as b:
        for step in (1, 2):
            perturb(model, step)
            receipt = b.push(model.named_parameters(), verify="weights")
            assert receipt.verified is True
            assert all(0.01 < error < 0.05 for error in receipt.engines[0].quantised.values())
    save(tmp_path / "last", model, config, quantised(model, fp8_blocks))
    fresh = start(tmp_path / "last")
    assert said_by(llm) == said_by(fresh) != before
    assert bits(llm) == bits(fresh)


def fp8_whole(name: str, weight: torch.Tensor) -> Tensors:
    scale = weight.float().abs().amax() / 448
    return {name: (weight.float() / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale}


@pytest.mark.usefixtures("fp8_kernel_stand_in")
@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_one_fp8_scale_over_fused_parts(start: Callable[..., Any], tmp_path: Path, activations: str) -> None:
    """Each part has a scale of its own in the checkpoint; vLLM quantises the fused layer again, by the largest."""
    model = make_model("qwen2")
    kept = calibrated(model) if activations == "static" else {}
    config = {"quant_method": "fp8", "activation_scheme": activations}
    save(tmp_path / "first", model, config, {**quantised(model, fp8_whole), **kept})
    llm = start(tmp_path / "first")
    before = said_by(llm)
    with bridge.attach(llm) as b:
        name, value = next((n, p) for n, p in model.named_parameters() if n.endswith("q_proj.weight"))
        layer = name.removesuffix("q_proj.weight")
        others = {n for n, _ in model.named_parameters() if n.startswith(layer) and "o_proj" not in n} - {name}
        with pytest.raises(MissingTensor, match=r"all of its tensors; where: .*qkv_proj") as caught:
            b.push([(name, value)], partial=True, verify="weights")
        assert set(caught.value.names) == others, "no scales: the scales are made here"
        for step in (1, 2):
            perturb(model, step)
            receipt = b.push(model.named_parameters(), verify="weights")
            assert receipt.verified is True
            assert receipt.kept == tuple(sorted(kept))
    save(tmp_path / "last", model, config, {**quantised(model, fp8_whole), **kept})
    fresh = start(tmp_path / "last")
    assert said_by(llm) == said_by(fresh) != before
    assert bits(llm) == bits(fresh)
