"""`bridge.attach` of any nn.Module: an evaluation or reference copy that follows the trainer, bit for bit."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bridge
from engine_side.load.loader import Loader
from tests.conftest import perturb, tiny_qwen2, tiny_qwen3_moe
from trainer_side.checkpoint import named_tensors
from trainer_side.names.naming import bake_names

Attach = Callable[..., bridge.Bridge]


@pytest.fixture
def attach() -> Iterator[Attach]:
    made: list[bridge.Bridge] = []

    def open_bridge(module: nn.Module, model: nn.Module | None = None) -> bridge.Bridge:
        made.append(bridge.attach(module, model=model))
        return made[-1]

    yield open_bridge
    for each in reversed(made):
        each.close()


def same(live: nn.Module, model: nn.Module) -> list[str]:
    """Names of the live module whose values are not the model's, after the cast to the live dtype."""
    theirs, ours = dict(model.state_dict()), dict(live.state_dict())
    assert theirs.keys() == ours.keys()
    return [name for name, t in ours.items() if not torch.equal(t, theirs[name].to(t.dtype))]


def addresses(module: nn.Module) -> dict[str, tuple[int, int, tuple[int, ...]]]:
    found = (*module.named_parameters(), *module.named_buffers())
    return {name: (id(t), t.data_ptr(), t.stride()) for name, t in found}


def pushed(b: bridge.Bridge, model: nn.Module, live: nn.Module, steps: int = 2) -> Any:
    """A few optimiser steps, each pushed and compared; parameters stay the same objects at the same places."""
    before = addresses(live)
    for step in range(steps):
        perturb(model, seed=step + 1)
        assert same(live, model), "the step must be visible, else this test shows nothing"
        receipt = b.push(model.named_parameters())
        assert same(live, model) == []
        assert receipt.verified is True
    assert addresses(live) == before
    return receipt


class Mlp(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(7, 16), nn.GELU(), nn.Linear(16, 3, bias=False))


class Zoo(nn.Module):
    """Layers of many kinds, persistent and derived buffers, a bare parameter, a scalar and an empty one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(19, 8, padding_idx=0)
        self.bag = nn.EmbeddingBag(5, 8)
        self.conv = nn.Conv2d(3, 4, (3, 1), groups=1)
        self.up = nn.ConvTranspose1d(4, 2, 3)
        self.norms = nn.ModuleList([nn.LayerNorm(8), nn.BatchNorm1d(8), nn.GroupNorm(2, 8)])
        self.attention = nn.MultiheadAttention(8, 2)
        self.recurrent = nn.GRU(8, 4, num_layers=2)
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.nothing = nn.Parameter(torch.empty(0, 4))
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("derived", torch.zeros(2), persistent=False)


@pytest.mark.parametrize("bound", [True, False], ids=["bound", "unbound"])
def test_a_plain_network(attach: Attach, bound: bool) -> None:
    model, live = Mlp(), Mlp()
    b = attach(live, model if bound else None)
    receipt = pushed(b, model, live)
    assert receipt.tensors == 3
    x = torch.randn(5, 7)
    assert torch.equal(live(x), model(x))
    report = b.health()
    assert report.status == "degraded", "a module has no canary, and health must say so"
    live[0].bias.data[3] += 1
    unhealthy = [check.name for check in b.health().checks if not check.ok]
    assert any("0.bias" in name for name in unhealthy), unhealthy


def test_layers_of_many_kinds_with_their_buffers(attach: Attach) -> None:
    torch.manual_seed(0)
    model = Zoo()
    torch.manual_seed(1)
    live = Zoo()
    b = attach(live, model)
    with torch.no_grad():
        model.norms[1].running_mean.add_(2.0)
        model.count.fill_(9)
        model.mask.logical_not_()
    live.derived.fill_(7.0)
    pushed(b, model, live)
    assert all(p is q for p, q in zip(live.recurrent._flat_weights, live.recurrent.parameters(), strict=True))
    x = torch.randn(2, 1, 8)
    assert torch.equal(live.recurrent(x)[0], model.recurrent(x)[0])
    assert int(live.count) == 9
    assert float(live.derived[0]) == 7.0, "a derived buffer does not travel"


def test_looking_at_a_copy_changes_nothing(attach: Attach) -> None:
    """A copy in training mode, whose layers move statistics and draw random numbers whenever they are called."""

    class Noisy(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + torch.randn(x.shape[0], 1)

    def make() -> nn.Module:
        return nn.ModuleList([nn.BatchNorm1d(6), Noisy(6, 6)]).train()

    model, live = make(), make()
    b = attach(live, model)
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    b.push(model.named_parameters())
    b.push(model.named_parameters())
    b.health()
    assert torch.equal(torch.rand(3), expected), "a push must leave the trainer's random state alone"
    assert same(live, model) == []
    assert all(module.training for module in live.modules())


def test_the_mode_of_a_live_module_is_never_written(attach: Attach) -> None:
    """Not even for the time of a probe: another thread may be running the model."""
    modes: list[nn.Module] = []

    class Watched:
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "training":
                modes.append(self)  # type: ignore[arg-type]
            super().__setattr__(name, value)

    class Linear(Watched, nn.Linear):
        pass

    class Norm(Watched, nn.BatchNorm1d):
        pass

    def make() -> nn.Module:
        return nn.ModuleList([Linear(6, 6), Norm(6)]).train()

    model, live = make(), make()
    b = attach(live, model)
    modes.clear()
    b.push(model.named_parameters())
    b.push(model.named_parameters(), verify=["read-back", "probe"])
    assert not [module for module in modes if any(module is own for own in (*live.modules(), *model.modules()))]


def test_without_a_bound_model_the_missing_buffers_are_named(attach: Attach) -> None:
    model, live = Zoo(), Zoo()
    before = {name: t.clone() for name, t in live.state_dict().items()}
    with pytest.raises(bridge.MissingTensor, match="bind") as caught:
        attach(live).push(model.named_parameters())
    assert "count" in caught.value.names
    assert all(torch.equal(t, before[name]) for name, t in live.state_dict().items())


@pytest.mark.parametrize("bound", [True, False], ids=["bound", "unbound"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_language_model_of_another_dtype(attach: Attach, tied: bool, bound: bool) -> None:
    model, live = tiny_qwen2(tied=tied), tiny_qwen2(tied=tied, seed=5).to(torch.bfloat16)
    pushed(attach(live, model if bound else None), model, live)
    assert (live.lm_head.weight is live.model.embed_tokens.weight) is tied


def test_a_tied_trainer_reaches_both_ends_of_an_untied_copy(attach: Attach) -> None:
    model, live = tiny_qwen2(tied=True), tiny_qwen2(seed=5)
    b = attach(live, model)
    perturb(model)
    b.push(model.named_parameters())
    assert torch.equal(live.lm_head.weight, model.model.embed_tokens.weight)
    assert torch.equal(live.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_an_untied_trainer_is_refused_by_a_tied_copy(attach: Attach) -> None:
    model, live = tiny_qwen2(), tiny_qwen2(tied=True, seed=5)
    before = live.lm_head.weight.clone()
    with pytest.raises(bridge.DuplicateTensor):
        attach(live, model).push(model.named_parameters())
    assert torch.equal(live.lm_head.weight, before)


def tiny_mixtral(*, seed: int = 0) -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(seed)
    return MixtralForCausalLM(config).eval()


@pytest.mark.parametrize("make", [tiny_qwen3_moe, tiny_mixtral], ids=["qwen3-moe", "mixtral"])
@pytest.mark.parametrize("bound", [True, False], ids=["bound", "unbound"])
def test_fused_experts_take_checkpoint_names(attach: Attach, make: Any, bound: bool) -> None:
    """transformers >= 5 holds experts in one tensor, the checkpoint one by one: the copy's own conversion, inverted."""
    model, live = make(), make(seed=5)
    b = attach(live, model if bound else None)
    receipt = pushed(b, model, live)
    fused = [name for name, p in live.named_parameters() if p.dim() == 3]
    assert fused, "this model has no fused experts any more: the test needs another one"
    assert (receipt.tensors > len(list(model.parameters()))) is bound
    if bound:
        expert = next(tensor.name for tensor in bake_names(model).tensors if ".experts." in tensor.name)
        assert b.explain(expert)[0]["parameter"] in fused


def test_a_checkpoint_pushed_into_fused_experts(attach: Attach, checkpoint: Any) -> None:
    """What `weighbridge push` does: checkpoint names, nothing bound."""
    model, live = tiny_qwen3_moe(), tiny_qwen3_moe(seed=5)
    attach(live).push(named_tensors(checkpoint(model)))
    assert same(live, model) == []


def test_fused_experts_that_lie_otherwise_in_memory(attach: Attach) -> None:
    model, live = tiny_qwen3_moe(), tiny_qwen3_moe(seed=5)
    for module in live.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if p.dim() == 3:
                setattr(module, name, nn.Parameter(p.detach().permute(2, 0, 1).contiguous().permute(1, 2, 0)))
    assert any(not p.is_contiguous() for p in live.parameters())
    pushed(attach(live, model), model, live)


def test_non_contiguous_and_sharing_parameters(attach: Attach) -> None:
    class Odd(nn.Module):
        """Parameters in another order of dimensions, and two that are halves of one flat buffer."""

        def __init__(self) -> None:
            super().__init__()
            self.turned = nn.Parameter(torch.randn(6, 4).t())
            self.cube = nn.Parameter(torch.randn(2, 3, 4).permute(2, 0, 1))
            flat = torch.randn(24)
            self.left, self.right = nn.Parameter(flat[:12].view(3, 4)), nn.Parameter(flat[12:].view(4, 3))

    model, live = Odd(), Odd()
    pushed(attach(live, model), model, live)
    assert live.left.untyped_storage().data_ptr() == live.right.untyped_storage().data_ptr()


@pytest.mark.parametrize("odd", [torch.randn(10, 3)[::2], torch.randn(4, 1).expand(4, 3)], ids=["gaps", "shared"])
def test_a_parameter_that_is_not_dense_is_refused_by_name(attach: Attach, odd: torch.Tensor) -> None:
    live = nn.ParameterDict({"odd": nn.Parameter(odd)})
    before = live["odd"].clone()
    with pytest.raises(bridge.ConfigError, match="contiguous") as caught:
        attach(live).push([("odd", torch.zeros(odd.shape))])
    assert caught.value.names == ("odd",)
    assert torch.equal(live["odd"], before)


def test_a_trainers_strides_do_not_matter(attach: Attach) -> None:
    live = nn.ParameterDict({"a": nn.Parameter(torch.zeros(5, 3)), "b": nn.Parameter(torch.zeros(4, 3))})
    sent = {"a": torch.randn(10, 3)[::2], "b": torch.randn(4, 1).expand(4, 3)}
    attach(live).push(sent.items())
    assert all(torch.equal(live[name], tensor) for name, tensor in sent.items())


def test_a_compiled_and_a_data_parallel_copy(attach: Attach) -> None:
    for wrap in (torch.compile, nn.DataParallel):
        model, live = tiny_qwen2(), tiny_qwen2(seed=5)
        b = attach(wrap(live), model)
        perturb(model)
        b.push(model.named_parameters())
        assert same(live, model) == []
        b.close()


def test_a_copy_that_was_resized_between_pushes(attach: Attach) -> None:
    model, live = tiny_qwen2(), tiny_qwen2(seed=5)
    b = attach(live, model)
    pushed(b, model, live)
    for each in (model, live):
        each.resize_token_embeddings(140)
    b.bind(model)
    pushed(b, model, live)


def test_the_trainers_own_module_is_refused(attach: Attach) -> None:
    model = Mlp()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(bridge.ConfigError, match="share storage"):
        attach(model).push(model.named_parameters())
    tail = nn.Sequential(copy.deepcopy(model[0]), nn.GELU(), model[2])
    with pytest.raises(bridge.ConfigError, match="share storage") as caught:
        attach(tail).push(model.named_parameters())
    assert caught.value.names == ("2.weight",)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_module_without_weights(attach: Attach) -> None:
    with pytest.raises(bridge.BridgeError) as caught:
        attach(nn.ReLU()).push(Mlp().named_parameters())
    assert "0.weight" in str(caught.value)
    with pytest.raises(bridge.MissingTensor, match="empty"):
        attach(nn.ReLU()).push(nn.ReLU().named_parameters())
    with pytest.raises(bridge.ConfigError, match="no parameters"):
        attach(Mlp(), nn.ReLU())


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda n: n.pop("0.bias"), bridge.MissingTensor),
        (lambda n: n.update({"0.extra": torch.zeros(3)}), bridge.UnexpectedTensor),
        (lambda n: n.update({"0.weight": n["0.weight"].t()}), bridge.ShapeMismatch),
        (lambda n: n.update({"0.weight": n["0.weight"] * float("nan")}), bridge.NonFinite),
        (lambda n: n.update({"0.bias": n["0.bias"].to("meta")}), bridge.IntegrityError),
    ],
    ids=["missing", "unexpected", "transposed", "nan", "meta"],
)
def test_what_does_not_fit_is_refused_and_nothing_moves(attach: Attach, spoil: Any, error: Any) -> None:
    model, live = Mlp(), Mlp()
    b = attach(live)
    named = {name: p.detach().clone() for name, p in model.named_parameters()}
    spoil(named)
    before = {name: t.clone() for name, t in live.state_dict().items()}
    with pytest.raises(error, match=r"0\.(weight|bias|extra)"):
        b.push(named.items())
    assert all(torch.equal(t, before[name]) for name, t in live.state_dict().items())
    b.push(model.named_parameters())
    assert same(live, model) == []


def test_what_changed_behind_our_back_is_put_right_by_the_next_push(attach: Attach) -> None:
    model, live = Mlp(), Mlp()
    b = attach(live, model)
    b.push(model.named_parameters())
    live[2].weight.data.zero_()
    b.push(model.named_parameters())
    assert same(live, model) == []


def test_a_module_that_nobody_can_verify_serves_nothing(attach: Attach, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both the push and the way back leave wrong bits: the forward is refused until a push verifies."""
    model, live = Mlp(), Mlp()
    b = attach(live, model)
    b.push(model.named_parameters())
    good = Loader.apply

    def bad(self: Loader, *args: Any, **options: Any) -> Any:
        outcome = good(self, *args, **options)
        live[0].bias.data[1] += 1
        return outcome

    perturb(model)
    with monkeypatch.context() as patch:
        patch.setattr(Loader, "apply", bad)
        with pytest.raises(bridge.EngineQuarantined, match=r"0\.bias") as caught:
            b.push(model.named_parameters())
    assert caught.value.serving == {"engine0": None}
    with pytest.raises(bridge.EngineQuarantined, match="nobody verified"):
        live(torch.zeros(1, 7))
    assert not b.health().healthy
    b.push(model.named_parameters())
    live(torch.zeros(1, 7))
    assert same(live, model) == []


def test_a_process_that_ends_without_close_leaves_nothing(tmp_path: Path) -> None:
    code = """
import bridge, torch
model, live = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
bridge.attach(live).push(model.named_parameters())
"""
    environment = {**os.environ, "WEIGHBRIDGE_SHM_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert os.listdir(tmp_path) == []


def test_a_subset_leaves_the_rest(attach: Attach) -> None:
    model, live = Mlp(), Mlp()
    b = attach(live, model)
    head = live[2].weight.clone()
    b.push([(n, p) for n, p in model.named_parameters() if n.startswith("0.")], partial=True)
    assert torch.equal(live[0].weight, model[0].weight)
    assert torch.equal(live[2].weight, head)
