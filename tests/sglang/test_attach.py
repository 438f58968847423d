"""What an Engine has to be started with, and who is told so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import bridge
from engine_side.engines.common.hosting import Leavings
from tests.families import make_model
from tests.sglang.rig import LOADER, start

pytestmark = pytest.mark.timeout(300)


class WithLoader:
    """The arguments of an engine, as if the loader had been among them."""

    custom_weight_loader = [LOADER]

    def __init__(self, arguments: Any) -> None:
        self._arguments = arguments

    def __getattr__(self, name: str) -> Any:
        return getattr(self._arguments, name)


def test_an_engine_without_the_loader_or_the_plugin_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rigs: Any
) -> None:
    rigs.close()  # the end of one engine ends every child of this process, those of another one too
    leavings = Leavings()
    make_model("llama").save_pretrained(tmp_path)
    monkeypatch.setenv("SGLANG_PLUGINS", "weighbridge_cpu_shims")
    engine = start(tmp_path, custom_weight_loader=None)
    try:
        with pytest.raises(bridge.ConfigError, match=r'custom_weight_loader=\["engine_side.engines.sglang.load"\]'):
            bridge.attach(engine)
        monkeypatch.setattr(engine, "server_args", WithLoader(engine.server_args))
        with pytest.raises(bridge.ConfigError, match="SGLANG_PLUGINS"):
            bridge.attach(engine)
        outputs = engine.generate(input_ids=[[3, 4, 5]], sampling_params={"max_new_tokens": 2, "temperature": 0})
        assert len(outputs[0]["output_ids"]) == 2, "a refused engine is left as it was"
    finally:
        leavings.note()
        engine.shutdown()
        leavings.remove()
