"""What every engine promises alike, over the rig of one engine: embedded, vLLM or SGLang.

It is the engine that is installed, or `--engine`. In an environment with vLLM or SGLang run this folder together with
that engine's own: they share engines.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

import pytest

from tests.rigs import EngineRig, Hosting, Rigs, ignore_what_engines_leave_open, one_version, rigs_of

if TYPE_CHECKING:
    from tests.contract.served import EngineServer


@dataclass(frozen=True)
class Names:
    """Where the parts of one engine are found."""

    rig: str
    server: str = ""
    hosting: str = ""


ENGINES = {  # SGLang first: its shims hold a stub of vLLM
    "sglang": Names("tests.sglang.rig:SglangRig", "tests.sglang.server:SglangServer", "tests.sglang.rig:HOSTING"),
    "vllm": Names("tests.vllm.rig:VllmRig", "tests.vllm.server:VllmServer", "tests.vllm.rig:HOSTING"),
    "embedded": Names("tests.contract.embedded:EmbeddedRig"),
}
EMBEDDED_ELSEWHERE = ("test_through_ray.py", "test_through_server.py")
"""It has no server, and is hosted in `tests/ray`."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-families", action="store_true", help="also recurrent families that take minutes together")
    parser.addoption("--engine", choices=list(ENGINES), help="the engine under contract; default: the one installed")


def pytest_configure(config: pytest.Config) -> None:
    if engine_of(config) != "embedded":
        ignore_what_engines_leave_open(config)


def engine_of(config: pytest.Config) -> str:
    installed = next((name for name in ENGINES if find_spec(name)), "embedded")
    chosen: str = config.getoption("engine", None) or installed
    return chosen


def part(config: pytest.Config, name: str) -> Any:
    """Import a part of the engine under contract, by its name in `Names`."""
    return resolve_name(getattr(ENGINES[engine_of(config)], name))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if engine_of(config) == "embedded" and collection_path.name in EMBEDDED_ELSEWHERE else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test for every case of the engine that its argument stands for."""
    sources = {
        "case": ("rig", "families"),
        "lora_case": ("rig", "lora_families"),
        "recurrent_case": ("rig", "recurrent_families"),
        "unattachable": ("server", "unattachable"),
        "wrong_argument": ("hosting", "wrong"),
    }
    for argument in sources.keys() & set(metafunc.fixturenames):
        name, attribute = sources[argument]
        found = part(metafunc.config, name)
        cases = list(getattr(found, attribute))
        if argument == "recurrent_case" and metafunc.config.getoption("all_families"):
            cases += found.more_recurrent_families
        metafunc.parametrize(argument, cases, ids=[_id(k, case) for k, case in enumerate(cases)])


def _id(k: int, case: tuple[Any, Any]) -> str:
    first, ways = case
    if isinstance(first, str):
        return "-".join([first, *(f"{k}={v}" for k, v in ways.items())])
    return f"{k}-{ways.partition('.')[0]}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """SGLang warns of what this machine lacks."""
    if engine_of(config) == "sglang":
        for item in items:
            item.add_marker(pytest.mark.filterwarnings("ignore::UserWarning"))
            item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))


@pytest.fixture(scope="session")
def rigs(request: pytest.FixtureRequest) -> Iterator[Rigs]:
    made = rigs_of(part(request.config, "rig"))
    yield made
    made.close()


@pytest.fixture
def rig(rigs: Rigs) -> Iterator[EngineRig]:
    yield from one_version(rigs)


@pytest.fixture(scope="session")
def server_class(request: pytest.FixtureRequest) -> type[EngineServer]:
    found: type[EngineServer] = part(request.config, "server")
    return found


@pytest.fixture(scope="session")
def hosting(request: pytest.FixtureRequest) -> Hosting:
    found: Hosting = part(request.config, "hosting")
    return found
