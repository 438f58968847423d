"""What `import bridge` offers, what it loads, and how long it takes beyond torch."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from typing import Any

import pytest

from bridge import entry_points
from bridge.errors import ConfigError

HEAVY = ("ray", "vllm", "sglang", "transformers", "peft", "click", "rich", "safetensors", "matplotlib", "trainer_side",
         "engine_side")  # fmt: skip

PUBLIC = [
    "ArenaFull",
    "Bridge",
    "BridgeError",
    "Busy",
    "CanaryMismatch",
    "Check",
    "Closed",
    "Completion",
    "ConfigError",
    "DeadlineExceeded",
    "DigestMismatch",
    "DtypeMismatch",
    "DuplicateTensor",
    "EngineHandle",
    "EngineQuarantined",
    "EngineReport",
    "HealthReport",
    "IntegrityError",
    "LeaseHeld",
    "MissingTensor",
    "NonFinite",
    "NotFound",
    "OutOfMemory",
    "PeerLost",
    "PendingPush",
    "ProtocolError",
    "PushAborted",
    "Receipt",
    "Sampling",
    "ShapeMismatch",
    "StaleVersion",
    "TransportError",
    "UnexpectedTensor",
    "UnsupportedLora",
    "attach",
    "bind",
    "connect",
    "health",
    "launch",
    "push",
]


def _python(code: str) -> Any:
    """Run code in a fresh interpreter; its last line of output as JSON."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_public_names_are_these() -> None:
    import bridge

    assert sorted(bridge.__all__) == PUBLIC
    assert [name for name in PUBLIC if not hasattr(bridge, name)] == []
    assert set(PUBLIC) <= set(dir(bridge))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = bridge.no_such_name  # type: ignore[attr-defined]


@cache
def _loaded(attempt: int) -> tuple[list[str], float]:
    """All that is public, in a fresh interpreter that has torch: heavy packages that came with it, seconds it took."""
    heavy, seconds = _python(
        "import torch, time, json, sys; t = time.perf_counter()\n"
        "import bridge; [getattr(bridge, n) for n in bridge.__all__]\n"
        f"print(json.dumps([[m for m in {HEAVY!r} if m in sys.modules], time.perf_counter() - t]))"
    )
    return heavy, seconds


def test_everything_public_loads_none_of_the_heavy_packages() -> None:
    assert _loaded(0)[0] == []


def test_a_bare_import_and_the_command_that_ends_a_daemon_do_not_even_load_torch() -> None:
    assert _python("import bridge, bridge.daemon.actors, json, sys; print(json.dumps('torch' in sys.modules))") is False


def test_push_and_health_are_functions_whatever_was_imported_first() -> None:
    code = """
import inspect, json, sys
found = []
for first in ("from bridge.client import Bridge", "from bridge import health as h", "import bridge.api"):
    for name in [name for name in sys.modules if name.split(".")[0] == "bridge"]:
        del sys.modules[name]
    exec(first)
    import bridge
    from bridge.handles import PendingPush
    from bridge.coordinator.health import assess
    found += [inspect.isfunction(f) for f in (bridge.push, bridge.health)]
print(json.dumps(found))
"""
    assert _python(code) == [True] * 6


def test_all_of_it_takes_at_most_a_quarter_second_beyond_torch() -> None:
    assert any(_loaded(attempt)[1] <= 0.25 for attempt in range(3)), "the best of three, on a busy machine"


@pytest.mark.parametrize(
    ("module", "command"),
    [
        ("transformers.models", "pip install 'weighbridge[hf]'"),
        ("matplotlib", "pip install 'weighbridge[demo]'"),
        ("peft", "pip install 'weighbridge[peft]'"),
        ("vllm", "pip install vllm"),
        ("engine_side.nowhere", "pip install --force-reinstall weighbridge: this installation lacks a part"),
    ],
)
def test_the_error_of_a_missing_package_says_what_to_type(
    monkeypatch: pytest.MonkeyPatch, module: str, command: str
) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(entry_points.importlib, "import_module", missing)
    with pytest.raises(ConfigError, match="not installed") as caught:
        entry_points.load("somewhere:thing")
    assert caught.value.remedy == command


def test_an_entry_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"bridge\.config.*no_such_name"):
        entry_points.load("bridge.config:no_such_name")


@pytest.mark.parametrize("name", [name for name, target in vars(entry_points).items() if name.isupper()])
def test_every_entry_of_the_table_is_there(name: str) -> None:
    assert callable(entry_points.load(vars(entry_points)[name]))
