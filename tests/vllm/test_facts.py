"""Settings of an engine that no push could take into account."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bridge.errors import ConfigError
from bridge.protocol.codec import pack, unpack
from tests.families import make_model

pytestmark = pytest.mark.timeout(300)
UNREACHED = [
    (("kv_transfer_config", "kv_connector", "LMCacheConnectorV1"), "kv_transfer_config"),
    (("kv_transfer_config", "kv_connector", None), None),
    (("ec_transfer_config", "ec_connector", "ECExampleConnector"), "ec_transfer_config"),
    (("parallel_config", "enable_eplb", True), "enable_eplb"),
]


@pytest.mark.parametrize(("setting", "said"), UNREACHED)
def test_what_no_push_could_take_into_account_is_refused(
    tmp_path: Path, setting: tuple[str, str, Any], said: str | None
) -> None:
    """As a server's front tells it to a bridge."""
    from vllm.config import WeightTransferConfig
    from vllm.engine.arg_utils import EngineArgs

    from engine_side.engines.vllm.facts import VllmFacts, check_facts, facts_of

    make_model("llama").save_pretrained(tmp_path)
    asked = EngineArgs(
        model=str(tmp_path), skip_tokenizer_init=True, weight_transfer_config=WeightTransferConfig(backend="bridge")
    )
    config = asked.create_engine_config()
    part, name, value = setting
    holder = getattr(config, part)
    if holder is None:
        setattr(config, part, SimpleNamespace(**{name: value}))
    else:
        setattr(holder, name, value)
    facts = unpack(pack(facts_of(config)), VllmFacts)
    if said is None:
        check_facts(facts, where="x", expected="x", remedy="x")
        return
    with pytest.raises(ConfigError) as caught:
        check_facts(facts, where="x", expected="x", remedy="x")
    assert caught.value.where == said
    assert said in (caught.value.remedy or "")
