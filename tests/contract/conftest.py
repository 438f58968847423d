"""What every engine promises alike, over the rig of one engine: embedded, vLLM or SGLang.

It is the engine that is installed, or `--engine`. In an environment with vLLM or SGLang run this folder together with
that engine's own: they share engines.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec

import pytest

from tests.rigs import EngineRig, Rigs, ignore_what_engines_leave_open, one_version, rigs_of

RIGS = {
    "sglang": ("tests.sglang.rig", "SglangRig"),  # first: its shims hold a stub of vLLM
    "vllm": ("tests.vllm.rig", "VllmRig"),
    "embedded": ("tests.contract.embedded", "EmbeddedRig"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--engine", choices=list(RIGS), help="the engine under contract; default: the one installed")


def pytest_configure(config: pytest.Config) -> None:
    if engine_of(config) != "embedded":
        ignore_what_engines_leave_open(config)


def engine_of(config: pytest.Config) -> str:
    installed = next((name for name in RIGS if find_spec(name)), "embedded")
    chosen: str = config.getoption("engine", None) or installed
    return chosen


def rig_class(config: pytest.Config) -> type[EngineRig]:
    module, name = RIGS[engine_of(config)]
    kind: type[EngineRig] = getattr(import_module(module), name)
    return kind


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `case` runs for every family of the rig, one that takes `lora_case` for those with LoRA."""
    kind = rig_class(metafunc.config)
    for argument, cases in (("case", kind.families), ("lora_case", kind.lora_families)):
        if argument in metafunc.fixturenames:
            ids = ["-".join([family, *(f"{k}={v}" for k, v in ways.items())]) for family, ways in cases]
            metafunc.parametrize(argument, cases, ids=ids)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """SGLang warns of what this machine lacks."""
    if engine_of(config) == "sglang":
        for item in items:
            item.add_marker(pytest.mark.filterwarnings("ignore::UserWarning"))
            item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))


@pytest.fixture(scope="session")
def rigs(request: pytest.FixtureRequest) -> Iterator[Rigs]:
    made = rigs_of(rig_class(request.config))
    yield made
    made.close()


@pytest.fixture
def rig(rigs: Rigs) -> Iterator[EngineRig]:
    yield from one_version(rigs)
