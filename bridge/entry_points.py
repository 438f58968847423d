"""Reach the sides from `bridge`, and an engine or transport from its table: by string, imported on use.

Importing `bridge` thereby imports neither side, and looking at a table imports none of its entries.
"""

from __future__ import annotations

import importlib
import re
from importlib.metadata import PackageNotFoundError, requires
from typing import Any

from bridge.errors import ConfigError

TRAINER = "trainer_side.trainer:TrainerSide"
ROUTES = "trainer_side.names.naming:routes_into"
ADAPT = "engine_side.engines.registry:adapt"
EXAMINE = "engine_side.engines.common.server_discovery:examine_server"
CHECK_SPEC = "engine_side.engines.registry:check_spec"
ENVIRONMENT = "engine_side.engines.registry:environment"
SERVICE = "engine_side.driver.service:EngineService"
TRAINER_ACTOR = "trainer_side.actor:TrainerActor"
ENGINE_ACTOR = "engine_side.actor:EngineActor"
NATIVE_RELOAD = "engine_side.engines.common.native_reload:start"
DEMO = "trainer_side.demo.run:run_demo"
CHECKPOINT = "trainer_side.checkpoint:named_tensors"


def load(target: str) -> Any:
    """Import the object behind "module:attribute".

    Raises ConfigError for a package that is not installed or cannot be imported, with the command that installs it, and
    for an attribute that the module does not have.
    """
    module_name, _, attribute = target.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError)
        raise ConfigError(
            f"a package that this needs {'is not installed' if missing else 'cannot be imported'}",
            where=module_name,
            expected="an environment in which it can be imported",
            got=f"no module named {error.name}" if missing else str(error),
            remedy=install_command(error.name or module_name),
        ) from error
    if not hasattr(module, attribute):
        raise ConfigError(
            "a module does not have this attribute",
            where=module_name,
            expected=attribute,
            got="none of this name",
            remedy=install_command(module_name),
        )
    return getattr(module, attribute)


def install_command(module: str) -> str:
    """The command that installs the package of a module: by the smallest extra of weighbridge that contains it, if one
    does."""
    package = module.partition(".")[0].replace("_", "-").lower()
    if package in ("bridge", "trainer-side", "engine-side"):
        return "pip install --force-reinstall weighbridge: this installation lacks a part"
    try:
        wanted = " ; ".join(requires("weighbridge") or ())
    except PackageNotFoundError:  # run from a source folder
        wanted = ""
    by_extra: dict[str, list[str]] = {}
    for name, extra in re.findall(r"([\w.-]+)[^;]*; extra == ['\"](\w+)['\"]", wanted):
        by_extra.setdefault(extra, []).append(name.replace("_", "-").lower())
    fitting = [extra for extra, names in by_extra.items() if package in names]
    if not fitting:
        return f"pip install {package}"
    return f"pip install 'weighbridge[{min(fitting, key=lambda extra: len(by_extra[extra]))}]'"
