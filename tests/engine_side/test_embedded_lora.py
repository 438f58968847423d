"""LoRAs of the embedded engine, per request: values, batches, publishing, retiring, caches, ranks; untying."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from bridge.errors import BridgeError, ConfigError, NotFound, UnexpectedTensor, UnsupportedLora
from bridge.model.lora_format import LoraLimits, LoraSpec, names_of
from bridge.model.manifest import TensorInfo, lay_out
from bridge.model.torch_dtypes import dtype_name
from bridge.protocol.codec import Completion, Sampling
from bridge.protocol.deadline import Deadline
from bridge.protocol.rank_jobs import (
    BakeJob,
    ForgetJob,
    LoadJob,
    LogprobsJob,
    MapJob,
    RankBake,
    RankDone,
    RankLoaded,
    RankReadBack,
    RankScores,
    ReadBackJob,
)
from bridge.push_settings import PushSettings
from bridge.shm.arena import Arena
from bridge.shm.mailbox import Mailbox
from engine_side.driver.rank_client import RankClient
from engine_side.embedded.config import EngineConfig
from engine_side.embedded.engine import Engine
from engine_side.embedded.kv import BlockPool, chain_start
from engine_side.embedded.layers import LinearBase
from engine_side.embedded.parallel import Parallel
from engine_side.embedded.runner import ModelRunner
from engine_side.embedded.wrappers import unwrap
from engine_side.engines.embedded import EmbeddedDriver, EmbeddedRankHost
from engine_side.engines.module import ModuleDriver, ModuleRankHost
from tests.engine_side import embedded_models as tiny
from tests.engine_side.stopped_engine import Call, no_step, scheduler_of

GREEDY = Sampling(max_tokens=24, temperature=0)
LONG = Sampling(max_tokens=200, temperature=0)
PROMPT = tiny.prompts()[-1]
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ENDS = ("embed_tokens", "lm_head")
MAX_RANK = 6


@dataclass(frozen=True)
class Lora:
    """A LoRA as PEFT runs it, and as it travels."""

    model: Any
    tensors: Mapping[str, torch.Tensor]
    rank: int

    @property
    def spec(self) -> LoraSpec:
        return LoraSpec(self.rank)


def make_lora(model: Any, seed: int, rank: int, targets: Sequence[str] = ALL) -> Lora:
    """A random LoRA with a large effect, alpha != r."""
    config = LoraConfig(r=rank, lora_alpha=2.5 * rank, target_modules=list(targets))
    peft = get_peft_model(copy.deepcopy(model), config).eval()
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for path, module in peft.base_model.model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        embedding = bool(module.lora_embedding_A)
        a = module.lora_embedding_A["default"] if embedding else module.lora_A["default"].weight
        b = module.lora_embedding_B["default"] if embedding else module.lora_B["default"].weight
        for param, size in ((a, 0.3), (b, 0.1)):
            param.data.copy_(torch.randn(param.shape, generator=generator) * size)
        name_a, name_b = names_of(path, embedding=embedding)
        tensors[name_a], tensors[name_b] = a.detach().clone(), (module.scaling["default"] * b.detach()).clone()
    assert tensors
    return Lora(peft, tensors, rank)


class Line:
    """The bridge's own way into all ranks of an engine."""

    def __init__(self, engine: Engine) -> None:
        self.driver = EmbeddedDriver(engine)
        self._mailbox = Mailbox.create("loras", self.driver.ranks)
        self._line = RankClient("engine", self.driver)
        self._line.assign(self._mailbox.path, 0)
        self._arenas: list[Arena] = []

    def ask(self, job: Any, kind: Any) -> Any:
        return self._line.ask(job, kind, Deadline.after(20))

    def plan(self, tensors: Mapping[str, torch.Tensor], spec: LoraSpec | None = None) -> int:
        """Bake and map a plan for these tensors, which lie in slot 0 of an arena of its own."""
        infos = tuple(TensorInfo(n, dtype_name(t.dtype, n), tuple(t.shape)) for n, t in tensors.items())
        plan = len(self._arenas)
        self.ask(BakeJob(plan, infos, lora=spec), RankBake)
        arena = Arena.create(lay_out(infos), name="loras")
        self._arenas.append(arena)
        for described, into in zip(arena.manifest.tensors, arena.tensors(0), strict=True):
            into.copy_(tensors[described.name])
        self.ask(MapJob(plan, str(arena.path), arena.manifest), RankDone)
        return plan

    def push(self, plan: int, *levels: str, adapter: str | None = None) -> None:
        """Load a plan's slot 0; every level has to pass."""
        for loaded in self.ask(LoadJob(plan, 0, PushSettings(levels=levels), lora=adapter), RankLoaded):
            assert loaded.report.levels
            assert all(level.ok for level in loaded.report.levels), loaded.report.levels

    def load(self, name: str, lora: Lora) -> None:
        self.push(self.plan(lora.tensors, lora.spec), "coverage", "read-back", adapter=name)

    def logprobs(self, prompts: Sequence[Sequence[int]], adapter: str | None) -> list[tuple[float, ...]]:
        job = LogprobsJob(tuple(tuple(p) for p in prompts), adapter)
        return list(self.ask(job, RankScores)[0].logprobs)

    def close(self) -> None:
        self.ask(ForgetJob(), RankDone)
        self._line.close()
        for file in (*self._arenas, self._mailbox):
            file.close()
            file.unlink()


Opened = tuple[Engine, Line]
Open = Callable[..., Opened]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Any]]:
    made: dict[tuple[str, bool], tuple[Path, Any]] = {}

    def get(family: str = "qwen2", tied: bool = False) -> tuple[Path, Any]:
        if (family, tied) not in made:
            folder = tmp_path_factory.mktemp(family)
            made[family, tied] = folder, tiny.save(folder, family, tied)
        return made[family, tied]

    return get


@pytest.fixture
def start(models: Callable[..., tuple[Path, Any]]) -> Iterator[Open]:
    opened: list[Opened] = []

    def make(family: str = "qwen2", tied: bool = False, **options: Any) -> Opened:
        options = {"max_loras": 3, "max_lora_rank": MAX_RANK, **options}
        engine = Engine(EngineConfig(str(models(family, tied)[0]), **options))
        opened.append((engine, Line(engine)))
        return opened[-1]

    yield make
    for engine, line in opened:
        line.close()
        engine.close()


@pytest.fixture(scope="module")
def model(models: Callable[..., tuple[Path, Any]]) -> Any:
    return models()[1]


@pytest.fixture(scope="module")
def one(model: Any) -> Lora:
    return make_lora(model, 1, 3)


@pytest.fixture(scope="module")
def two(model: Any) -> Lora:
    return make_lora(model, 2, 5, (*ALL, *ENDS))


def until(ready: Callable[[], bool]) -> None:
    deadline = Deadline.after(20)
    while not ready():
        deadline.check("waiting for the engine")
        time.sleep(0.001)


def assert_close(got: Sequence[Sequence[float]], wanted: Sequence[Sequence[float]], limit: float = 1e-5) -> None:
    assert [len(row) for row in got] == [len(row) for row in wanted]
    worst = max((abs(a - b) for x, y in zip(got, wanted) for a, b in zip(x, y)), default=0.0)
    assert worst < limit


def scored(model: Any, prompt: Sequence[int], completion: Completion) -> list[float]:
    """What `model` says of a completion's tokens."""
    (row,) = tiny.reference_logprobs(model, [[*prompt, *completion.token_ids]])
    return row[len(prompt) - 1 :]


# ---- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"layout": "packed"}, {"layout": "transposed", "wrap_linears": True, "wrap_levels": 2}],
    ids=["canonical", "packed", "transposed-wrapped"],
)
def test_each_lora_is_what_peft_computes(start: Open, model: Any, one: Lora, two: Lora, options: Any) -> None:
    engine, line = start(**options)
    base = line.logprobs(tiny.prompts(), None)
    assert_close(base, tiny.reference_logprobs(model, tiny.prompts()))
    line.load("one", one)
    line.load("two", two)
    for name, lora in (("one", one), ("two", two)):
        wanted = tiny.reference_logprobs(lora.model, tiny.prompts())
        assert_close(line.logprobs(tiny.prompts(), name), wanted)
        assert tiny.mean_difference(base, wanted) > 0.1, "the LoRA would not be missed"
        assert_close(engine.prompt_logprobs(tiny.prompts(), name), wanted)
    assert line.logprobs(tiny.prompts(), None) == base
    assert engine.adapters == ("one", "two")


@pytest.mark.parametrize("family", ["moe", "llama-biased"])
def test_families(start: Open, models: Any, family: str) -> None:
    _, model = models(family)
    targets = ("q_proj", "o_proj") if family == "moe" else ALL
    lora = make_lora(model, 3, 2, targets)
    _, line = start(family)
    line.load("a", lora)
    assert_close(line.logprobs(tiny.prompts(), "a"), tiny.reference_logprobs(lora.model, tiny.prompts()))


def make_expert_lora(model: Any, seed: int, rank: int) -> Lora:
    """Every matrix of every expert, and the reference as one model with all effects added to its weights."""
    merged, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for index, layer in enumerate(merged.model.layers):
        experts = layer.mlp.experts
        for number in range(len(experts.gate_up_proj)):
            gate, up = experts.gate_up_proj.data[number].chunk(2)
            for part, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", experts.down_proj.data[number])):
                a = torch.randn(rank, weight.shape[1], generator=generator) * 0.3
                b = torch.randn(weight.shape[0], rank, generator=generator) * 0.1
                name_a, name_b = names_of(f"model.layers.{index}.mlp.experts.{number}.{part}")
                tensors[name_a], tensors[name_b] = a, b
                weight += b @ a
    return Lora(merged, tensors, rank)


@pytest.mark.parametrize("layout", ["canonical", "packed"])
def test_experts_have_loras(start: Open, models: Any, layout: str) -> None:
    model = models("moe")[1]
    engine, line = start("moe", layout=layout)
    loras = {"one": make_expert_lora(model, 1, 2), "two": make_expert_lora(model, 2, 4)}
    for name, lora in loras.items():
        line.load(name, lora)
        assert_close(line.logprobs(tiny.prompts(), name), tiny.reference_logprobs(lora.model, tiny.prompts()), 2e-5)
    assert_close(line.logprobs(tiny.prompts(), None), tiny.reference_logprobs(model, tiny.prompts()))
    calls = {name: Call(lambda n=name: engine.generate(tiny.prompts(), GREEDY, n)) for name in loras}  # type: ignore[misc]
    for name, call in calls.items():
        for prompt, completion in zip(tiny.prompts(), call.result()):
            assert completion.logprobs == pytest.approx(scored(loras[name].model, prompt, completion), abs=2e-5)


def test_one_batch_of_two_loras_and_the_base(start: Open, model: Any, one: Lora, two: Lora) -> None:
    engine, line = start(max_num_seqs=64)
    line.load("one", one)
    line.load("two", two)
    cold = engine.generate(tiny.prompts() * 3, GREEDY, "base")
    assert engine.reset_prefix_cache()
    engine.pause("keep")  # the calls wait at the gate, so that they are admitted together
    asked = ("base", "one", "two")
    before = engine.steps
    calls = {name: Call(lambda n=name: engine.generate(tiny.prompts(), GREEDY, n)) for name in asked}  # type: ignore[misc]
    time.sleep(0.2)
    engine.resume()
    got = {name: call.result() for name, call in calls.items()}
    assert engine.steps - before < 2 * 24, "they ran one after the other"
    references = {"base": model, "one": one.model, "two": two.model}
    for name in asked:
        for prompt, completion in zip(tiny.prompts(), got[name]):
            assert list(completion.token_ids) == tiny.reference_greedy(references[name], prompt, 24), name
            assert completion.logprobs == pytest.approx(scored(references[name], prompt, completion), abs=1e-5)
    assert [c.token_ids for c in got["base"]] == [c.token_ids for c in cold[: len(tiny.prompts())]]


def test_base_rows_of_a_mixed_batch_keep_their_bits(start: Open, one: Lora, two: Lora) -> None:
    """The same frame, once all base and once with LoRAs on the other rows."""
    engine, line = start()
    line.load("one", one)
    line.load("two", two)
    from engine_side.embedded.runner import SequenceBatch

    def logits(loras: tuple[str, ...]) -> torch.Tensor:
        prompts = [list(PROMPT), list(PROMPT), list(PROMPT), list(reversed(PROMPT))]
        tables = tuple(tuple(range(i * 3, i * 3 + 3)) for i in range(4))
        tokens = tuple(token for prompt in prompts for token in prompt)
        return engine.runner.forward(SequenceBatch(tokens, (40,) * 4, (0,) * 4, tables, loras))

    plain, mixed = logits(()), logits(("", "one", "two", ""))
    assert torch.equal(plain[0], mixed[0])
    assert torch.equal(plain[3], mixed[3])
    assert not torch.allclose(plain[1], mixed[1], atol=0.1)
    assert not torch.allclose(plain[2], mixed[2], atol=0.1)
    assert not torch.allclose(mixed[1], mixed[2], atol=0.1)
    assert torch.equal(plain, logits(("", "", "", "")))


# ---- publishing ----------------------------------------------------------------------------------------------------


def test_current_is_what_was_published(start: Open, model: Any, one: Lora, two: Lora) -> None:
    engine, line = start()
    line.load("one", one)
    line.load("two", two)
    for version, name, reference in ((4, "one", one.model), (5, "two", two.model), (6, None, model)):
        line.driver.publish(version, name)
        (got,) = line.driver.generate([PROMPT], GREEDY)
        assert list(got.token_ids) == tiny.reference_greedy(reference, PROMPT, 24)
        assert got.weight_version == version
        assert engine.generate([PROMPT], GREEDY, "current")[0].token_ids == got.token_ids
        assert_close(engine.prompt_logprobs([PROMPT]), tiny.reference_logprobs(reference, [PROMPT]))
    with pytest.raises(NotFound, match="nobody"):
        line.driver.publish(7, "nobody")
    assert engine.weight_version == 6
    for call in (line.driver.generate, engine.generate):
        with pytest.raises(NotFound, match="nobody"):
            call([PROMPT], GREEDY, "nobody")
    with pytest.raises(ConfigError, match="name"):
        engine.generate([PROMPT], GREEDY, None)  # type: ignore[arg-type]


def in_the_middle(engine: Engine, adapter: str = "current") -> tuple[Call, int]:
    """A long request, kept in the middle of its sequence, and how many tokens it has."""
    before = engine.steps
    call = Call(lambda: engine.generate([PROMPT], LONG, adapter))
    until(lambda: engine.steps >= before + 5)
    engine.pause("keep")
    done = engine.steps - before
    assert 5 <= done < 200
    return call, done


@pytest.mark.parametrize("reset", [True, False], ids=["recomputed", "kept-cache"])
def test_a_kept_request_ends_with_what_it_began_with(start: Open, one: Lora, two: Lora, reset: bool) -> None:
    engine, line = start()
    line.load("one", one)
    line.driver.publish(1, "one")
    call, _ = in_the_middle(engine)
    line.load("two", two)
    if reset:
        assert line.driver.reset_caches()
    line.driver.publish(2, "two")
    line.driver.retire(["one"])
    assert engine.adapters == ("one", "two"), "it is in use"
    with pytest.raises(NotFound, match="retired"):
        engine.prompt_logprobs([PROMPT], "one")
    line.driver.resume()
    (new,) = engine.generate([PROMPT], GREEDY)
    (old,) = call.result()
    assert list(old.token_ids) == tiny.reference_greedy(one.model, PROMPT, 200)
    assert old.weight_version == 1
    assert list(new.token_ids) == tiny.reference_greedy(two.model, PROMPT, 24)
    assert new.weight_version == 2
    until(lambda: engine.adapters == ("two",))


def test_an_aborted_request_ends_and_frees_its_lora(start: Open, one: Lora, two: Lora) -> None:
    engine, line = start(max_loras=1)
    line.load("one", one)
    line.driver.publish(1, "one")
    call, done = in_the_middle(engine)
    line.driver.publish(2)
    line.driver.retire(["one", "never-heard-of"])
    assert engine.adapters == ("one",)
    with no_step(engine):  # the engine's own thread does not come to drop it
        line.driver.pause("abort", Deadline.after(20))
        line.load("two", two)  # into the only slot
    assert engine.adapters == ("two",)
    (got,) = call.result()
    assert got.finish_reason == "abort"
    assert list(got.token_ids) == tiny.reference_greedy(one.model, PROMPT, done)
    line.driver.publish(3, "two")
    line.driver.resume()
    assert list(engine.generate([PROMPT], GREEDY)[0].token_ids) == tiny.reference_greedy(two.model, PROMPT, 24)


def test_a_preempted_request_keeps_its_lora(start: Open, one: Lora, two: Lora) -> None:
    engine, line = start(max_seq_len=64, block_size=8, num_blocks=9)
    line.load("one", one)
    line.load("two", two)
    preempted: list[int] = []
    preempt = scheduler_of(engine).preempt
    scheduler_of(engine).preempt = lambda rs: preempted.append(len(rs)) or preempt(rs)  # type: ignore[method-assign,func-returns-value]
    calls = [
        (lora, Call(lambda n=name: engine.generate(tiny.prompts(), GREEDY, n)))  # type: ignore[misc]
        for name, lora in (("one", one), ("two", two))
    ]
    for lora, call in calls:
        for prompt, completion in zip(tiny.prompts(), call.result()):
            assert list(completion.token_ids) == tiny.reference_greedy(lora.model, prompt, 24)
    assert preempted


def test_a_request_that_has_not_begun_follows_what_is_published(start: Open, one: Lora, two: Lora) -> None:
    """The version that it reports and the LoRA that it runs with belong together."""
    engine, line = start(max_num_seqs=1)
    line.load("one", one)
    line.load("two", two)
    line.driver.publish(1, "one")
    first, _ = in_the_middle(engine)
    with no_step(engine):
        engine.resume()
        second = Call(lambda: engine.generate([PROMPT], GREEDY))
        named = Call(lambda: engine.generate([PROMPT], GREEDY, "one"))
        until(lambda: len(scheduler_of(engine).waiting) == 2)
        engine.pause("keep")
    line.driver.publish(2, "two")
    assert engine.generate([PROMPT], Sampling(max_tokens=0), "one", past_gate=True)[0].weight_version == 1
    line.driver.retire(["one"])
    engine.resume()
    assert first.result()[0].weight_version == 1
    (got,) = second.result()
    assert (got.weight_version, list(got.token_ids)) == (2, tiny.reference_greedy(two.model, PROMPT, 24))
    (by_name,) = named.result()
    assert (by_name.weight_version, list(by_name.token_ids)) == (1, tiny.reference_greedy(one.model, PROMPT, 24))
    until(lambda: engine.adapters == ("two",))


def test_a_named_lora_reports_the_version_it_was_published_under_last(start: Open, one: Lora, two: Lora) -> None:
    """A base push that keeps the LoRA publishes it again: what begins after it comes from the newer version."""
    engine, line = start(max_num_seqs=1)
    assert line.driver.published == (0, None)
    line.load("one", one)
    assert engine.generate([PROMPT], GREEDY, "one")[0].weight_version == 0, "loaded, and published by nobody"
    line.driver.publish(1, "one")
    first, _ = in_the_middle(engine)
    queued = Call(lambda: engine.generate([PROMPT], GREEDY, "one"))
    engine.resume()
    until(lambda: len(scheduler_of(engine).waiting) == 1)
    line.driver.publish(2, "one")
    assert (first.result()[0].weight_version, queued.result()[0].weight_version) == (1, 2)
    line.load("two", two)
    line.driver.publish(3, "two")
    assert line.driver.published == EmbeddedDriver(engine).published == (3, "two")
    assert {name: engine.generate([PROMPT], GREEDY, name)[0].weight_version for name in ("one", "two")} == {
        "one": 2,
        "two": 3,
    }
    line.driver.retire(["one"])
    line.driver.publish(4)
    with pytest.raises(NotFound, match="one"):
        engine.generate([PROMPT], GREEDY, "one")


def test_the_users_of_a_lora_are_ended_while_paused(start: Open, one: Lora, two: Lora) -> None:
    engine, line = start(max_num_seqs=2)
    line.load("one", one)
    line.load("two", two)
    line.driver.publish(1, "one")
    users = [in_the_middle(engine)[0]]
    with no_step(engine):
        engine.resume()
        follower = Call(lambda: engine.generate([PROMPT], GREEDY))
        users.append(Call(lambda: engine.generate([PROMPT], GREEDY, "one")))
        others = {name: Call(lambda n=name: engine.generate([PROMPT], GREEDY, n)) for name in ("two", "base")}  # type: ignore[misc]
        until(lambda: len(scheduler_of(engine).waiting) == 4)
        engine.pause("keep")
        check = Call(lambda: engine.generate([PROMPT], GREEDY, "one", past_gate=True))
        until(lambda: len(scheduler_of(engine).waiting) == 5)
        line.driver.end_users(["one", "never-heard-of"])
        assert [call.result()[0].finish_reason for call in users] == ["abort", "abort"]
    assert users[0].result()[0].token_ids, "what there was is theirs"
    assert list(check.result()[0].token_ids) == tiny.reference_greedy(one.model, PROMPT, 24)
    line.driver.publish(2, "two")
    engine.resume()
    assert list(follower.result()[0].token_ids) == tiny.reference_greedy(two.model, PROMPT, 24)
    assert {name: call.result()[0].finish_reason for name, call in others.items()} == {
        "two": "length",
        "base": "length",
    }


def test_retiring_what_nobody_uses_drops_it_at_once_and_what_is_published_later(
    start: Open, model: Any, one: Lora, two: Lora
) -> None:
    engine, line = start()
    line.load("one", one)
    line.load("two", two)
    line.driver.retire(["two"])
    assert line.driver.loaded_loras() == ("one",)
    line.driver.publish(1, "one")
    line.driver.retire(["one"])
    assert list(engine.generate([PROMPT], GREEDY)[0].token_ids) == tiny.reference_greedy(one.model, PROMPT, 24)
    with pytest.raises(NotFound, match="retired"):
        engine.generate([PROMPT], GREEDY, "one")
    line.driver.publish(2)
    until(lambda: not engine.adapters)
    assert list(engine.generate([PROMPT], GREEDY)[0].token_ids) == tiny.reference_greedy(model, PROMPT, 24)
    with pytest.raises(BridgeError, match="one"):  # a name is never used twice
        line.load("one", two)


def test_a_lora_that_is_dropped_from_under_a_request_ends_only_that_one(start: Open, model: Any, one: Lora) -> None:
    engine, line = start()
    line.load("one", one)
    other = Call(lambda: engine.generate([PROMPT], LONG, "base"))
    with no_step(engine):  # no step: they will be in one batch
        call = Call(lambda: engine.generate([PROMPT], LONG, "one"))
        until(lambda: len([*scheduler_of(engine).running, *scheduler_of(engine).waiting]) == 2)
    until(lambda: len(scheduler_of(engine).running) == 2)
    engine.pause("keep")
    EmbeddedRankHost(engine.runner).remove_lora("one")
    EmbeddedRankHost(engine.runner).remove_lora("one")
    engine.resume()
    with pytest.raises(NotFound, match="one"):
        call.result()
    assert list(other.result()[0].token_ids) == tiny.reference_greedy(model, PROMPT, 200)


# ---- caches --------------------------------------------------------------------------------------------------------


def test_no_prefix_is_shared_between_loras(start: Open, model: Any, one: Lora, two: Lora) -> None:
    engine, line = start()
    line.load("one", one)
    line.load("two", two)
    for name, reference in (("base", model), ("one", one.model), ("two", two.model)):
        wanted = tiny.reference_greedy(reference, PROMPT, 24)
        hits = engine.cached_blocks_read
        assert list(engine.generate([PROMPT], GREEDY, name)[0].token_ids) == wanted
        assert engine.cached_blocks_read == hits, "another LoRA's keys and values"
        (warm,) = engine.generate([PROMPT], GREEDY, name)
        assert list(warm.token_ids) == wanted
        assert engine.cached_blocks_read == hits + len(PROMPT) // 16, "its own are found again"
        assert warm.logprobs == pytest.approx(scored(reference, PROMPT, warm), abs=1e-5)
        # "current" and the name are one LoRA
        line.driver.publish(1, None if name == "base" else name)
        engine.generate([PROMPT], GREEDY)
        assert engine.cached_blocks_read == hits + 2 * (len(PROMPT) // 16)


def test_a_chain_of_blocks_begins_with_the_lora() -> None:
    assert len({chain_start(None), chain_start("a"), chain_start("b")}) == 3
    pool = BlockPool(4, 2)
    assert pool.match([1, 2, 3], "a") == []


# ---- ranks ---------------------------------------------------------------------------------------------------------


def test_two_ranks_serve_loras_and_drop_them(start: Open, model: Any, one: Lora, two: Lora) -> None:
    engine, line = start(tensor_parallel_size=2, threads=1, timeout_s=20, max_loras=2)
    line.load("one", one)
    line.load("two", two)
    for name, lora in (("one", one), ("two", two)):
        wanted = tiny.reference_logprobs(lora.model, tiny.prompts())
        assert_close(line.logprobs(tiny.prompts(), name), wanted)
        assert_close(engine.prompt_logprobs(tiny.prompts(), name), wanted)
    with pytest.raises(NotFound):
        line.logprobs([PROMPT], "nobody")
    line.driver.publish(1, "one")
    call, _ = in_the_middle(engine)
    line.driver.publish(2, "two")
    line.driver.retire(["one"])
    engine.resume()
    assert list(engine.generate([PROMPT], GREEDY)[0].token_ids) == tiny.reference_greedy(two.model, PROMPT, 24)
    assert list(call.result()[0].token_ids) == tiny.reference_greedy(one.model, PROMPT, 200)
    until(lambda: engine.adapters == ("two",))
    line.load("three", Lora(one.model, one.tensors, one.rank))  # every rank has the slot back
    assert_close(line.logprobs([PROMPT], "three"), tiny.reference_logprobs(one.model, [PROMPT]))
    assert_close(line.logprobs([PROMPT], None), tiny.reference_logprobs(model, [PROMPT]))


# ---- the protocol without LoRA, and its limits ---------------------------------------------------------------------


def test_a_lora_is_placed_or_refused_without_a_walk_of_the_model(
    start: Open, one: Lora, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = start()
    walks: list[int] = []
    named_modules = torch.nn.Module.named_modules

    def counted(module: torch.nn.Module, *args: Any, **options: Any) -> Any:
        if module is engine.runner.model:
            walks.append(1)
        return named_modules(module, *args, **options)

    infos = [TensorInfo(n, dtype_name(t.dtype, n), tuple(t.shape)) for n, t in one.tensors.items()]
    strange = [TensorInfo(i.name.replace("self_attn", "elsewhere"), i.dtype, i.shape) for i in infos]
    norms = [n for name in ("input_layernorm", "post_attention_layernorm") for n in names_of(f"model.layers.0.{name}")]
    monkeypatch.setattr(torch.nn.Module, "named_modules", counted)
    host = EmbeddedRankHost(engine.runner)
    with pytest.raises(UnexpectedTensor, match=r"not in this model: .*elsewhere.*not wrapped for LoRA: .*layernorm"):
        host.plan_lora([*strange, *(TensorInfo(n, "float32", (3, 3)) for n in norms)], one.spec)
    host.plan_lora(infos, one.spec)
    assert not walks


def test_an_engine_without_lora_says_so(start: Open, one: Lora) -> None:
    engine, line = start(max_loras=0, max_lora_rank=16)
    assert line.driver.lora is None
    assert line.driver.loaded_loras() == ()
    with pytest.raises(UnsupportedLora, match="max_loras"):
        line.load("one", one)
    host = EmbeddedRankHost(engine.runner)
    with pytest.raises(NotFound):
        host.lora_views("one")
    host.remove_lora("one")
    line.driver.retire(["one"])
    with pytest.raises(NotFound):
        line.driver.publish(1, "one")


def test_limits_are_told_and_kept(start: Open, model: Any, one: Lora) -> None:
    engine, line = start(max_loras=1)
    assert line.driver.lora == LoraLimits(max_rank=MAX_RANK, slots=1)
    with pytest.raises(UnsupportedLora):
        line.load("big", make_lora(model, 4, MAX_RANK + 1))
    for reserved in ("current", "base", ""):
        with pytest.raises(ConfigError, match="name"):
            EmbeddedRankHost(engine.runner).load_lora(reserved, one.tensors, one.spec)
    line.load("one", one)
    with pytest.raises(ConfigError, match="slot"):
        line.load("two", one)
    assert_close(line.logprobs([PROMPT], "one"), tiny.reference_logprobs(one.model, [PROMPT]))


@pytest.mark.parametrize(
    "options",
    [
        {"max_loras": -1},
        {"max_loras": 1, "max_lora_rank": 0},
        {"wrap_levels": 0},
        {"lora_targets": ("q_proj",)},
        {"max_loras": 1, "lora_targets": ()},
        {"max_loras": 1, "lora_targets": "q_proj"},
    ],
)
def test_lora_options_are_checked(options: Any) -> None:
    with pytest.raises(ConfigError, match="EngineConfig"):
        EngineConfig("nowhere", **options)


def test_a_plain_module_takes_no_lora(one: Lora) -> None:
    module = torch.nn.Linear(2, 2)
    driver, host = ModuleDriver(module), ModuleRankHost(module)
    assert (driver.lora, driver.loaded_loras(), host.untie(["weight"])) == (None, (), False)
    driver.publish(3)
    driver.retire(["one"])
    host.remove_lora("one")
    with pytest.raises(UnsupportedLora, match="merged"):
        host.plan_lora((), one.spec)
    with pytest.raises(UnsupportedLora, match="merged"):
        host.load_lora("one", one.tensors, one.spec)
    for call in (lambda: driver.publish(3, "one"), lambda: host.lora_views("one")):
        with pytest.raises(NotFound):
            call()


def test_a_module_is_called_alone_below_its_wrappers(start: Open, one: Lora) -> None:
    """A probe sees the base weights, whatever LoRAs are loaded."""
    engine, line = start(wrap_linears=True)
    host = EmbeddedRankHost(engine.runner)
    layer = engine.runner.model.model.layers[0].self_attn.o_proj
    base = unwrap(layer)
    assert isinstance(base, LinearBase)
    assert base is not layer
    x = torch.randn(3, base.input_size_per_partition)
    before = host.apply(layer, x)
    line.load("one", one)
    assert torch.equal(host.apply(layer, x), before)
    assert torch.equal(before, x @ base.weight.t())


# ---- ties ----------------------------------------------------------------------------------------------------------

LAYOUTS = ("canonical", "transposed", "shuffled", "packed")


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tied_head_is_untied(models: Any, layout: str, lora: bool) -> None:
    folder, model = models("qwen2", True)
    options = {"max_loras": 1, "max_lora_rank": 2, "wrap_linears": True} if lora else {}
    runner = ModelRunner(EngineConfig(str(folder), layout=layout, **options), Parallel())
    host = EmbeddedRankHost(runner)
    before = runner.prompt_logprobs(tiny.prompts())
    assert "lm_head.weight" not in set(runner.model.checkpoint_names())
    assert not host.untie(["lm_head.weight", "model.nobody.weight"])
    assert unwrap(runner.model.lm_head).tied, "nothing was changed"
    for _ in range(2):
        assert host.untie(["lm_head.weight"])
    live = dict(runner.model.named_parameters())
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= live.keys()
    assert live["lm_head.weight"] is unwrap(runner.model.lm_head).weight, "a wrapper shows the old Parameter"
    assert live["lm_head.weight"].data_ptr() != live["model.embed_tokens.weight"].data_ptr()
    assert_close(runner.prompt_logprobs(tiny.prompts()), before, 1e-6)
    skeleton = dict(host.skeleton().named_parameters())
    assert skeleton["lm_head.weight"] is not skeleton["model.embed_tokens.weight"]
    assert vars(live["lm_head.weight"]).keys() == vars(skeleton["lm_head.weight"]).keys()
    # the ends are apart: the embedding moves, the head stays
    other = copy.deepcopy(model)
    other.lm_head.weight = torch.nn.Parameter(other.lm_head.weight.detach().clone())
    with torch.no_grad():
        other.model.embed_tokens.weight.mul_(1.5)
        live["model.embed_tokens.weight"].mul_(1.5)
    assert_close(runner.prompt_logprobs(tiny.prompts()), tiny.reference_logprobs(other, tiny.prompts()), 1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_ends_are_pushed_into_an_untied_engine(start: Open, layout: str) -> None:
    other = tiny.make_model("qwen2", tied=False, seed=8)
    engine, line = start(tied=True, layout=layout)
    assert EmbeddedRankHost(engine.runner).untie(["lm_head.weight"])
    plan = line.plan(other.state_dict())
    (zero,) = line.ask(ReadBackJob(plan, 1), RankReadBack)
    assert "lm_head.weight" not in zero.unreadable, "its tied checkpoint does not hold it"
    line.push(plan, "coverage", "attributes", "read-back", "probe")
    assert_close(engine.prompt_logprobs(tiny.prompts()), tiny.reference_logprobs(other, tiny.prompts()), 1e-4)


def test_each_rank_unties_its_part(models: Any) -> None:
    folder, _ = models("qwen2", True)
    for rank in range(2):
        runner = ModelRunner(EngineConfig(str(folder), tensor_parallel_size=2, max_loras=1), Parallel(rank, 2))
        assert runner.untie(["lm_head.weight"])
        head, embedding = runner.model.lm_head, runner.model.model.embed_tokens
        assert torch.equal(unwrap(head).weight, unwrap(embedding).weight)
        assert (head.weight.tp_rank, head.weight.tp_size) == (rank, 2)


def test_what_was_never_tied_stays_as_it_is(models: Any) -> None:
    folder, _ = models("qwen2")
    runner = ModelRunner(EngineConfig(str(folder)), Parallel())
    head = runner.model.lm_head.weight
    assert runner.untie(["lm_head.weight"])
    assert runner.model.lm_head.weight is head
    assert not runner.untie(["no.such.weight"])
