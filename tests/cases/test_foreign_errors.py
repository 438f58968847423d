"""An exception of an engine's own code, at whatever step of a push, becomes an error of ours that names the step, the
module and a remedy; what was served before is served again, and the next push goes through."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import bridge
import engine_side.load.loader
from engine_side.engines.embedded import EmbeddedRankHost
from tests.conftest import tiny_qwen2
from tests.push.rig import PROMPTS, Rig, drift

FOREIGN = "Tensor on device meta is not on the expected device cpu!"
Fault = Callable[[pytest.MonkeyPatch, Rig], None]


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """Its weights are packed away, so that every push rebuilds and probes modules."""
    model = tiny_qwen2()
    model.save_pretrained(tmp_path)
    made = Rig(tmp_path, model, layout="packed")
    yield made
    made.close()


def raises_once(
    patch: pytest.MonkeyPatch, owner: Any, name: str, error: Exception, when: Any = lambda *_: True
) -> None:
    real, left = getattr(owner, name), [1]

    def faulty(*args: Any, **kwargs: Any) -> Any:
        if left[0] and when(*args):
            left[0] = 0
            raise error
        return real(*args, **kwargs)

    patch.setattr(owner, name, faulty)


def in_a_live_post_load(patch: pytest.MonkeyPatch, rig: Rig) -> None:
    live = {id(module) for module in rig.engine.runner.model.modules()}
    when = lambda _, module: id(module) in live and bool(module._parameters)  # noqa: E731
    raises_once(patch, EmbeddedRankHost, "post_load", RuntimeError(FOREIGN), when)


def in_a_call(patch: pytest.MonkeyPatch, rig: Rig) -> None:
    raises_once(patch, EmbeddedRankHost, "apply", ImportError(FOREIGN))


def in_a_copy(patch: pytest.MonkeyPatch, rig: Rig) -> None:
    raises_once(patch, engine_side.load.loader, "copy_all", RuntimeError(FOREIGN))


def in_a_comparison(patch: pytest.MonkeyPatch, rig: Rig) -> None:
    raises_once(patch, engine_side.load.loader, "compare_all", RuntimeError(FOREIGN))


STEPS = {
    in_a_live_post_load: r"while rebuilding a module; where: model\.layers\.0.*\(\w+\)",
    in_a_call: r"while probing a module; where: model\.\w+.*\(\w+\)",
    in_a_copy: r"while writing weights; where: \w+",
    in_a_comparison: r"while reading weights back; where: \w+",
}


@pytest.mark.parametrize("fault", STEPS, ids=lambda fault: fault.__name__)
def test_a_foreign_error_is_explained_and_undone(rig: Rig, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.step()
    assert rig.push(verify="weights").verified is True
    before = rig.engine.prompt_logprobs(PROMPTS)
    rig.step()
    with monkeypatch.context() as patch:
        fault(patch, rig)
        with pytest.raises(bridge.PushAborted, match=STEPS[fault]) as caught:
            rig.push(verify="weights")
    assert isinstance(caught.value.__cause__, bridge.ConfigError)
    assert FOREIGN in caught.value.__cause__.got
    assert caught.value.__cause__.remedy
    assert rig.engine.prompt_logprobs(PROMPTS) == before
    assert rig.push(verify="weights").verified is True
    assert drift(rig.engine, rig.model) < 1e-3


@pytest.mark.parametrize("step", ["skeleton", "load_weights", "post_load"])
def test_a_foreign_error_before_the_first_write_changes_nothing(
    rig: Rig, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = rig.engine.prompt_logprobs(PROMPTS)
    rig.step()
    with monkeypatch.context() as patch:
        raises_once(patch, EmbeddedRankHost, step, RuntimeError(FOREIGN))
        with pytest.raises(bridge.ConfigError) as caught:
            rig.push()
    assert FOREIGN in caught.value.got
    assert caught.value.remedy
    assert rig.engine.prompt_logprobs(PROMPTS) == before
    assert rig.push().verified is True
