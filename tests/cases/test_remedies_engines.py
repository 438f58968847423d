"""What an engine's layout, quantisation, memory or state refuses: each remedy is followed, and a push then works."""

from __future__ import annotations

import copy
import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bridge
from bridge.bench import engine_bench
from bridge.bench.copy_bench import BenchOptions
from bridge.errors import (
    ConfigError,
    DigestMismatch,
    DtypeMismatch,
    EngineQuarantined,
    MissingTensor,
    NotFound,
    PushAborted,
    UnexpectedTensor,
    UnsupportedLora,
)
from bridge.transports import connect
from engine_side.embedded.config import EngineConfig
from engine_side.embedded.decoder import CausalLM
from engine_side.embedded.engine import Engine
from engine_side.engines.registry import host
from tests.cases.raised import provoked
from tests.conftest import perturb, tiny_qwen2
from tests.engine_side import embedded_models as tiny
from tests.push.faults import Breaker, bend_rope, corrupt_a_byte, swap_rows
from tests.push.lora_rig import LoraRig, wrap
from tests.push.rig import PROMPTS, Rig

LOADER, PLAN, MODULE = "engine_side/load/loader.py", "engine_side/plan", "engine_side/engines/module.py"
LEVELS = "engine_side/driver/level_errors.py"
HOSTING, UNUSED = "engine_side/engines/common/hosting.py", "bridge/coordinator/unused_tensors.py"
TRAINER = "trainer_side/trainer.py"
CAPABILITY = "trainer_side/lora/capability.py: {}: {} cannot be pushed in {} mode: {}{}"
EMBEDDED, HTTP = "engine_side/embedded", "engine_side/engines/common/http.py"
SHORT = bridge.Sampling(max_tokens=2, temperature=0.0)
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def rigs(checkpoint: Callable[..., Path]) -> Iterator[Callable[..., Rig]]:
    made: list[Rig] = []

    def make(model: Any = None, **config: Any) -> Rig:
        model = tiny_qwen2() if model is None else model
        made.append(Rig(checkpoint(model), model, **config))
        return made[-1]

    yield make
    for one in made:
        one.close()


# ---- layouts --------------------------------------------------------------------------------------------------------


def test_a_part_of_a_packed_layer(rigs: Callable[..., Rig]) -> None:
    """The message names what the layer needs besides, and with it the push goes through."""
    rig = rigs(layout="packed")
    rig.step()
    live = dict(rig.named())
    key = f"{PLAN}/refusals.py: a module whose storage is packed needs all of its tensors"
    with provoked(MissingTensor, key) as caught:
        rig.b.push([(Q, live[Q])], partial=True)
    partners = caught.value.names
    assert Q not in partners
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in partners} == {"q_proj", "k_proj", "v_proj"}
    assert all(name in str(caught.value.remedy) for name in partners)
    assert rig.b.push([(n, live[n]) for n in (Q, *partners)], partial=True).verified is True
    rig.good_push()


def test_a_module_that_was_replaced(rigs: Callable[..., Rig]) -> None:
    rig = rigs()
    rig.good_push()
    layers = rig.engine.runner.model.model.layers
    layers[0].mlp = copy.deepcopy(layers[0].mlp)
    rig.step()
    with provoked(ConfigError, f"{LOADER}: a module of the engine was replaced after it was attached", "attach"):
        rig.push()
    rig.b.close()
    rig.b = bridge.attach(rig.engine, model=rig.model)
    rig.good_push()


class Spread(nn.Module):
    """One parameter, whose elements lie as `make` lays them."""

    def __init__(self, make: Callable[[], torch.Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(make())


@pytest.mark.parametrize("lay", [lambda: torch.randn(4, 6)[:, ::2], lambda: torch.randn(4, 1).expand(4, 3)])
def test_parameters_with_gaps(lay: Callable[[], torch.Tensor]) -> None:
    model, live = Spread(lambda: torch.randn(4, 3)), Spread(lay)
    key = f"{PLAN}/targets.py: a parameter's elements do not fill one stretch of memory"
    with provoked(ConfigError, key, "contiguous"), bridge.attach(live) as b:
        b.push(model.named_parameters())
    live.weight = nn.Parameter(live.weight.detach().contiguous())
    with bridge.attach(live) as b:
        assert b.push(model.named_parameters()).verified is True
    assert torch.equal(live.weight, model.weight)


# ---- quantised ------------------------------------------------------------------------------------------------------


def test_codes_without_scales(tmp_path: Path) -> None:
    first = tiny.save_fp8(tmp_path / "first", tiny.make_model("qwen2"), (2, 8))
    model = tiny.make_model("qwen2", seed=99)
    second = tiny.save_fp8(tmp_path / "second", model, (2, 8))
    assert first.keys() == second.keys()
    engine = Engine(EngineConfig(str(tmp_path / "first"), threads=1))
    with bridge.attach(engine) as b:
        scale = next(n for n in second if n.endswith("q_proj.weight_scale_inv"))
        code = scale.removesuffix("_scale_inv")
        key = (
            f"{PLAN}/quant_groups.py: a quantised weight, its scales and its zero points arrive together or not at all"
        )
        with provoked(MissingTensor, key, scale) as caught:
            b.push([(n, t) for n, t in second.items() if n != scale])
        assert caught.value.names == (code, scale)
        with pytest.raises(MissingTensor):  # "or leave it out": then it is missing
            b.push([(n, t) for n, t in second.items() if n not in (code, scale)])
        key = f"{EMBEDDED}/weights.py: a quantised weight takes no other dtype"
        value = dict(model.named_parameters())[code].detach()
        with provoked(DtypeMismatch, key, "leave its scales out"):
            b.push([(n, value if n == code else t) for n, t in second.items()])
        assert b.push([(n, value if n == code else t) for n, t in second.items() if n != scale]).verified is True
        assert b.push(second.items()).verified is True
        assert (
            tiny.mean_difference(engine.prompt_logprobs(tiny.prompts()), tiny.reference_logprobs(model, tiny.prompts()))
            < 1e-3
        )
    engine.close()


def test_layers_that_are_quantised_in_part(tmp_path: Path) -> None:
    part = "model.layers.0.self_attn.q_proj"
    tiny.save_fp8(tmp_path / "part", tiny.make_model("qwen2"), (2, 8), (*tiny.PLAIN, part))
    with provoked(ConfigError, f"{EMBEDDED}/quant.py: a fused layer cannot be quantised in part", "alike"):
        Engine(EngineConfig(str(tmp_path / "part"), threads=1))
    tiny.save_fp8(tmp_path / "cut", tiny.make_model("qwen2"), (7, 8))
    with provoked(
        ConfigError, f"{EMBEDDED}/quant.py: a block of scales would be cut through", "modules_to_not_convert"
    ):
        Engine(EngineConfig(str(tmp_path / "cut"), threads=1))
    whole = tiny.save_fp8(tmp_path / "whole", tiny.make_model("qwen2"), (2, 8))
    with Engine(EngineConfig(str(tmp_path / "whole"), threads=1)) as engine, bridge.attach(engine) as b:
        assert b.push(whole.items()).verified is True


# ---- what the engine does not use, or computes otherwise ------------------------------------------------------------


def test_a_tensor_that_the_loader_passes_over(rigs: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    """Some engines' loaders skip names that they do not know."""
    monkeypatch.setattr(CausalLM, "ignores", lambda self, name: "extra" in name)
    rig = rigs(bound=False)
    with provoked(UnexpectedTensor, f"{UNUSED}: {{}}", "b.bind(model)") as caught:
        rig.b.push([*rig.named(), ("model.extra.weight", torch.ones(3))])
    assert "leave" not in str(caught.value.remedy), "what the trainer computes with would be left out"

    class Policy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.lm_head = rig.model.model, rig.model.lm_head
            self.model.extra = nn.Linear(3, 3)

    policy = Policy()
    rig.b.bind(policy)
    with provoked(UnexpectedTensor, f"{TRAINER}: the engine has no place for these tensors", "save_pretrained"):
        rig.b.push(policy.named_parameters())
    del policy.model.extra
    rig.b.bind(rig.model)
    rig.good_push()


def test_derived_state_that_is_wrong(rigs: Callable[..., Rig]) -> None:
    """Bits pass, answers do not: an engine that is started anew has the right ones."""
    rig = rigs()
    with pytest.MonkeyPatch.context() as patch:
        bend_rope(rig, patch)
        rig.step()
        key = f"{LEVELS}: the canary check failed: the engine's log-probabilities are not the trainer's"
        with provoked(PushAborted, key, "start the engine anew"):
            rig.push()
    rigs(rig.model).good_push()


@pytest.mark.parametrize(
    ("fault", "kind", "key"),
    [
        (corrupt_a_byte, DigestMismatch, "bridge/shm/seal.py: {}{}: the bytes are not those that were sealed"),
        (swap_rows, PushAborted, f"{LEVELS}: the {{}} check failed"),
    ],
)
def test_a_level_that_fails(rigs: Callable[..., Rig], fault: Callable[..., Any], kind: Any, key: str) -> None:
    rig = rigs()
    rig.good_push()
    with pytest.MonkeyPatch.context() as patch:
        fault(rig, patch)
        rig.step()
        with provoked(kind, key, "push again"):
            rig.push()
    rig.good_push()


def test_sharded_tensors(rigs: Callable[..., Rig]) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    rig = rigs()
    rig.step()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded = [(n, distribute_tensor(p, mesh, [Shard(0)])) for n, p in rig.named()]
        key = "trainer_side/names/tensor_checks.py: sharded tensors cannot be pushed yet"
        with provoked(ConfigError, key, "full_tensor()"):
            rig.b.push(sharded)
        assert rig.b.push([(n, t.full_tensor()) for n, t in sharded]).verified is True
        assert rig.serves(rig.model)
    finally:
        dist.destroy_process_group()


# ---- states ---------------------------------------------------------------------------------------------------------


def test_a_module_that_nobody_verified() -> None:
    model, live = nn.Linear(4, 3), nn.Linear(4, 3)
    with bridge.attach(live) as b:
        assert b.push(model.named_parameters()).verified is True
        perturb(model)
        with pytest.MonkeyPatch.context() as patch:
            Breaker(patch, 0, always=True)
            with pytest.raises(EngineQuarantined, match="remedy: engines now serve engine0: nothing"):
                b.push(model.named_parameters())
        with provoked(EngineQuarantined, f"{MODULE}: this module holds weights that nobody verified", "push again"):
            live(torch.zeros(1, 4))
        assert b.push(model.named_parameters()).verified is True
        assert torch.equal(live(torch.ones(1, 4)), model(torch.ones(1, 4)))


def test_a_push_that_fails_midway(rigs: Callable[..., Rig]) -> None:
    rig = rigs()
    rig.good_push()
    with pytest.MonkeyPatch.context() as patch:
        Breaker(patch, 3)
        rig.step()
        with pytest.raises(PushAborted, match="remedy: engines now serve engine0: version 1; ") as caught:
            rig.push()
    assert caught.value.serving == {"engine0": 1}
    rig.good_push()


def test_an_adapter_over_weights_that_nobody_verified(checkpoint: Callable[..., Path]) -> None:
    base = tiny_qwen2()
    rig = LoraRig(checkpoint(base), wrap(base))
    try:
        assert rig.push(mode="base").verified is True
        with pytest.MonkeyPatch.context() as patch:
            Breaker(patch, 0, always=True)
            rig.step()
            with pytest.raises(EngineQuarantined):
                rig.push(mode="merged")
        with pytest.raises((EngineQuarantined, UnsupportedLora), match="mode='base'"):
            rig.push(mode="adapter")
        assert rig.push(mode="base").verified is True
        assert rig.push(mode="adapter").verified is True
        assert rig.serves(rig.truth())
    finally:
        rig.close()


def test_calls_of_an_engine(rigs: Callable[..., Rig]) -> None:
    rig = rigs()
    with provoked(ConfigError, f"{EMBEDDED}/engine.py: unknown pause mode", "choose"):
        rig.engine.pause("gently")
    with provoked(ConfigError, f"{EMBEDDED}/engine.py: a LoRA is asked for by name", "leave it out"):
        rig.engine.generate(PROMPTS, SHORT, 3)  # type: ignore[arg-type]
    rig.engine.pause("abort")
    rig.engine.resume()
    assert rig.engine.generate(PROMPTS, SHORT)
    rig.good_push()


# ---- LoRA layers that cannot be read --------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_tuner_that_is_not_lora() -> None:
    import peft

    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    live = copy.deepcopy(base)
    model: Any = peft.get_peft_model(base, peft.IA3Config(target_modules=["0"], feedforward_modules=[]))
    with torch.no_grad():
        model.base_model.model[0].ia3_l["default"].mul_(1.5)
    with bridge.attach(live) as b:
        b.bind(model)
        with provoked(UnsupportedLora, CAPABILITY, "merge_and_unload"):
            b.push(model.named_parameters())
        merged = model.merge_and_unload()
        b.bind(merged)
        assert b.push(merged.named_parameters()).verified is True
    x = torch.randn(2, 4)
    assert torch.allclose(live(x), merged(x))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_convolution_without_a_single_weight() -> None:
    base = nn.Sequential(nn.Conv2d(6, 6, 3, groups=3))
    live = copy.deepcopy(base)
    model: Any = wrap(base, target_modules=["0"])
    with bridge.attach(live, model=model) as b:
        with pytest.raises(UnsupportedLora, match=r'remedy: .*mode="base"'):
            b.push(model.named_parameters(), mode="merged")
        assert b.push(model.named_parameters(), mode="base").verified is True
    x = torch.randn(1, 6, 5, 5)
    with model.disable_adapter():
        assert torch.allclose(live(x), model(x))


# ---- servers, hosting, tools ----------------------------------------------------------------------------------------


class Answers(http.server.BaseHTTPRequestHandler):
    """A server of another kind."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *given: Any) -> None:
        """Print nothing."""


def test_addresses(rigs: Callable[..., Rig]) -> None:
    """The engine's own object will do as well as its address."""
    key = "engine_side/engines/common/server_discovery.py: the server at this address is not one that can be driven"
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            with provoked(ConfigError, key, "engine's own server"):
                bridge.attach(f"http://127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()
    with provoked(ConfigError, f"{HTTP}: not the address of a server", "give the address"):
        bridge.attach("http://nowhere:port")
    rigs().good_push()


def test_arguments_of_a_hosted_engine(checkpoint: Callable[..., Path]) -> None:
    spec = f"embedded:{checkpoint(tiny_qwen2())}"
    with provoked(ConfigError, f"{HOSTING}: the engine has no such argument", "correct its name") as caught:
        host(spec, {"layuot": "packed"})
    assert "layout" in str(caught.value.expected)
    with provoked(ConfigError, f"{HOSTING}: the model is the PATH of {{}}:PATH", "leave this argument out"):
        host(spec, {"path": "elsewhere"})
    driver = host(spec, {"layout": "packed"})
    driver.close()


def test_tools(tmp_path: Path) -> None:
    with provoked(ConfigError, "bridge/bench/copy_bench.py: not a list of thread counts", "leave it out for 1,2"):
        BenchOptions.of(shapes="both", rounds=1, threads="many", ray=False, seed=0)
    assert BenchOptions.of(shapes="both", rounds=1, threads="1,2", ray=False, seed=0).threads == (1, 2)
    with provoked(ConfigError, "bridge/transports/__init__.py: no such transport", "choose one") as caught:
        connect("pigeon")
    assert "gloo" in str(caught.value.expected)
    with provoked(ConfigError, "bridge/bench/engine_bench.py: not an engine that can be measured", "qwen2-0.5b"):
        engine_bench.run("vllm", 1, 0)
    from trainer_side.demo.policy import load_policy

    with provoked(NotFound, "trainer_side/demo/policy.py: no checkpoint there", "save_pretrained"):
        load_policy(tmp_path)
