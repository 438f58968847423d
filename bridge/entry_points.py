"""The one place where `bridge` reaches the sides: by string, on use, so that importing bridge imports neither."""

from __future__ import annotations

import importlib
from typing import Any

from bridge.errors import ConfigError

TRAINER = "trainer_side.trainer:TrainerSide"
ROUTES = "trainer_side.names.naming:routes_into"
ADAPT = "engine_side.engines.registry:adapt"
EXAMINE = "engine_side.engines.common.server_discovery:examine_server"
HOST = "engine_side.engines.registry:host"
CHECK_SPEC = "engine_side.engines.registry:check_spec"
ENVIRONMENT = "engine_side.engines.registry:environment"
SERVICE = "engine_side.driver.service:EngineService"
TRAINER_ACTOR = "trainer_side.actor:TrainerActor"
ENGINE_ACTOR = "engine_side.actor:EngineActor"
RIVAL = "engine_side.engines.common.native_reload:start"
DEMO = "trainer_side.demo.run:run_demo"
CHECKPOINT = "trainer_side.checkpoint:named_tensors"


def load(target: str) -> Any:
    """The object behind "module:attribute", one of the constants of this module. Raises ConfigError, naming the missing
    package, when an extra is not installed."""
    module_name, _, attribute = target.partition(":")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        raise ConfigError(
            "a package that this needs is not installed",
            where=module_name,
            got=f"no module named {error.name}",
            remedy="pip install 'weighbridge[hf]' (or the extra named in the README)",
        ) from error
