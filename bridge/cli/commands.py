"""The commands of `weighbridge`: results on stdout, progress and logs on stderr, the exit code from the error class.

This imports neither torch, ray nor an engine before a command runs: `--help` has to answer at once.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import logging
import os
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from bridge import entry_points
from bridge.cli import render
from bridge.errors import BUG_EXIT, ERRORS_BY_NAME, UNHEALTHY_EXIT, BridgeError, ConfigError, NotFound, PushAborted
from bridge.model.levels import LEVELS_OF

if TYPE_CHECKING:
    from bridge.client import Bridge
    from bridge.coordinator.health import HealthReport

SCHEMA_VERSION = 1
USAGE_EXIT = ConfigError.exit_code
INTERRUPTED_EXIT = 130
SECONDS = click.FloatRange(0, min_open=True)


class Backend:
    """The calls that commands make, each imported on use. Tests put another object in its place."""

    def launch(self, engine: str, name: str, engines: int, arguments: Mapping[str, Any]) -> Bridge:
        """Start a daemon; see `bridge.launch`."""
        from bridge.api import launch

        return launch(engine, name=name, engines=engines, **arguments)

    def connect(self, name: str) -> Bridge:
        """Connect to a daemon; see `bridge.connect`."""
        from bridge.api import connect

        return connect(name)

    def examine(self, url: str, timeout_s: float) -> HealthReport:
        """Examine an engine's server; see `bridge.api.examine`."""
        from bridge.api import examine

        return examine(url, timeout_s)

    def running(self) -> list[str]:
        """Names of the daemons of this machine's Ray; empty when no Ray runs."""
        from bridge.daemon import actors, ray_cluster

        try:
            ray_cluster.ensure_ray(start=False)
        except NotFound:
            return []
        return actors.running()

    def stop(self, name: str) -> None:
        from bridge.daemon import actors

        actors.stop(name)

    def named_tensors(self, folder: Path) -> Iterable[tuple[str, Any]]:
        """Read the tensors of a checkpoint folder, under their names there."""
        tensors: Iterable[tuple[str, Any]] = entry_points.load(entry_points.CHECKPOINT)(folder)
        return tensors

    def demo(self) -> Any:
        """Import the demo's module: DemoOptions, run_demo, print_result."""
        return importlib.import_module(entry_points.load(entry_points.DEMO).__module__)

    def bench(self) -> Any:
        """Import the bench's module: BenchOptions, run_bench."""
        return importlib.import_module("bridge.bench.copy_bench")

    def engine_bench(self) -> Any:
        """Import the module of the bench into real engines: run."""
        return importlib.import_module("bridge.bench.engine_bench")


@dataclass(frozen=True)
class Output:
    """The stream and form of a command's one result."""

    as_json: bool
    stream: TextIO

    def result(self, command: str, payload: Mapping[str, Any], show: Callable[[Any, Mapping[str, Any]], None]) -> None:
        """Print the result: `payload` as one JSON object, or as `show(console, payload)` prints it for people."""
        if self.as_json:
            self.stream.write(_json({"schema_version": SCHEMA_VERSION, "command": command, **payload}))
        else:
            show(render.console(self.stream), payload)
        self.stream.flush()


def _json(payload: Mapping[str, Any]) -> str:
    """Encode one line of strict JSON: NaN and infinity become null."""
    import msgspec

    return msgspec.json.encode(payload).decode() + "\n"


def _epilog() -> str:
    """List the exit codes, from the error classes themselves."""
    by_code: dict[int, list[str]] = {}
    for name, cls in ERRORS_BY_NAME.items():
        if cls is not BridgeError:
            by_code.setdefault(cls.exit_code, []).append(name)
    rows = [(0, "done; healthy or degraded"), (UNHEALTHY_EXIT, "ran, and found something unhealthy")]
    rows += [(code, ", ".join(names)) for code, names in sorted(by_code.items())]
    rows += [(BUG_EXIT, "a bug of weighbridge"), (INTERRUPTED_EXIT, "interrupted")]
    lines = [textwrap.fill(text, 77, initial_indent=f"  {code:>3}  ", subsequent_indent=" " * 7) for code, text in rows]
    usage = f"A command line that does not fit exits with {USAGE_EXIT} too."
    return "\b\nExit codes:\n" + "\n".join(lines) + f"\n\n{usage}"


@click.group(epilog=_epilog(), context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-v", "--verbose", is_flag=True, help="Log every step to stderr.")
@click.version_option(package_name="weighbridge", prog_name="weighbridge")
def cli(verbose: bool) -> None:
    """Sync the weights of an RL trainer into its inference engines, verify them, and examine live runs."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        stream=sys.stderr,
        format="%(levelname)s %(name)s: %(message)s",
    )


Body = Callable[..., int | None]


def _command(name: str) -> Callable[[Body], click.Command]:
    """Register a command with `--json`. Its body is called with the backend, an Output and its own options, and returns
    an exit code (None is 0). With `--json`, other prints to stdout go to stderr meanwhile."""

    def register(body: Body) -> click.Command:
        def run(backend: Backend, /, as_json: bool, **options: Any) -> int:
            out = Output(as_json, sys.stdout)
            with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
                return body(backend, out, **options) or 0

        functools.update_wrapper(run, body)
        with_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
        return cli.command(name)(with_json(click.pass_obj(run)))

    return register


# ---- a daemon's life -------------------------------------------------------------------------------------------------


@_command("up")
@click.argument("name")
@click.option("--engine", required=True, metavar="SPEC", help="Engine to host: embedded:PATH, vllm:PATH, sglang:PATH.")
@click.option("--engines", type=click.IntRange(1), default=1, show_default=True, help="Number of engines.")
@click.option("--tp", "tensor_parallel_size", type=click.IntRange(1), help="Tensor-parallel ranks of each engine.")
@click.option("--dtype", help="Dtype that the engine computes in: bf16, fp16, fp32.")
@click.option("--layout", help="Post-load layout of the embedded engine: canonical, transposed, shuffled, packed.")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any other engine argument; value as JSON or text."
)
def up(
    backend: Backend, out: Output, name: str, engine: str, engines: int, settings: tuple[str, ...], **given: Any
) -> None:
    """Start daemon NAME with its engines on Ray (a local Ray is started when none runs) and leave it running."""
    arguments = {**_settings(settings), **{key: value for key, value in given.items() if value is not None}}
    scheme, colon, path = engine.partition(":")
    folder = Path(path).expanduser()
    if colon and folder.exists():  # an actor has another working directory
        engine = f"{scheme}:{folder.resolve()}"
    with render.progress(f"starting {engines} engine(s) of {engine}"):
        made = backend.launch(engine, name, engines, arguments)
    with made:
        out.result("up", _status(made), render.show_status)


def _settings(pairs: Sequence[str]) -> dict[str, Any]:
    """Parse `KEY=VALUE` pairs: a value that is JSON as that, any other as text. Raises ConfigError."""
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise ConfigError(
                "not a setting", where="--set", expected="KEY=VALUE", got=repr(pair), remedy="--set max_num_seqs=8"
            )
        if key in found:
            raise ConfigError(
                "a setting was given twice",
                where=f"--set {key}",
                expected="each key once",
                got=repr(pair),
                remedy="give it once",
            )
        try:
            found[key] = json.loads(text)
        except ValueError:
            found[key] = text
    return found


@_command("down")
@click.argument("name")
def down(backend: Backend, out: Output, name: str) -> None:
    """Stop daemon NAME: its engines, its shared memory, and the local Ray if weighbridge started it, no other daemon
    runs on it and no trainer is connected to it. A Ray of another owner is left alone."""
    with render.progress(f"stopping {name}"):
        backend.stop(name)
    out.result("down", {"name": name, "stopped": True}, render.show_stopped)


# ---- pushing ---------------------------------------------------------------------------------------------------------


@_command("push")
@click.argument("name")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--verify", type=click.Choice(tuple(LEVELS_OF)), default="weights", show_default=True, help="How much is checked."
)
@click.option("--partial", is_flag=True, help="The folder holds a subset; all other weights stay as they are.")
@click.option("--version", type=click.IntRange(0), help="Number of this version; default the highest ever issued + 1.")
@click.option("--allow-nonfinite", is_flag=True, help="Allow NaN and infinity.")
@click.option("--timeout", "timeout_s", type=SECONDS, metavar="SECONDS", help="Deadline of the push.")
def push(backend: Backend, out: Output, name: str, folder: Path, **options: Any) -> None:
    """Push the checkpoint in FOLDER into every engine of NAME. Takes the lease, like any trainer. A LoRA adapter that a
    trainer has pushed before is removed, since it was trained over other weights; the output says so."""
    tensors = backend.named_tensors(folder)
    with backend.connect(name) as made, render.progress(f"pushing {folder}"):
        receipt = made.push(tensors, **options)
    out.result("push", {"name": name, "receipt": receipt.to_dict()}, render.show_receipt)


# ---- looking ---------------------------------------------------------------------------------------------------------


@_command("health")
@click.argument("name", required=False)
@click.option("--server", metavar="URL", help="Examine an engine's own server, http://HOST:PORT, in place of a daemon.")
@click.option(
    "--timeout", type=SECONDS, default=120.0, show_default=True, metavar="SECONDS", help="Longest wait for the engines."
)
def health(backend: Backend, out: Output, name: str | None, server: str | None, timeout: float) -> int:
    """Examine the live run NAME: actors, versions, the last receipt, a fresh read-back of every weight, a fresh canary,
    orphaned shared memory; or a single server, with or without a trainer. Writes nothing. Exits 1 when unhealthy."""
    if (name is None) == (server is None):
        raise click.UsageError("give the NAME of a daemon, or --server URL")
    if server is not None:
        with render.progress(f"examining {server}"):
            report = backend.examine(server, timeout)
    else:
        with backend.connect(str(name)) as made, render.progress(f"examining {name}"):
            report = made.health(timeout)
    out.result("health", report.to_dict(), render.show_health)
    return 0 if report.healthy else UNHEALTHY_EXIT


@_command("status")
@click.argument("name", required=False)
def status(backend: Backend, out: Output, name: str | None) -> None:
    """Show engines and versions of daemon NAME, or list the daemons that run."""
    if name is None:
        out.result("status", {"daemons": [_brief(backend, each) for each in backend.running()]}, render.show_daemons)
        return
    with backend.connect(name) as made:
        payload = _status(made)
    out.result("status", payload, render.show_status)


def _status(made: Bridge) -> dict[str, Any]:
    import msgspec

    plain: dict[str, Any] = msgspec.to_builtins(made.status())
    plain.pop("kind", None)
    return plain


def _brief(backend: Backend, name: str) -> dict[str, Any]:
    """Make one line of the list; a daemon that does not answer is listed with its error."""
    try:
        with backend.connect(name) as made:
            return _status(made)
    except BridgeError as error:
        return {"name": name, "error": str(error)}


@_command("history")
@click.argument("name")
@click.option("--last", type=click.IntRange(1), default=20, show_default=True, help="Number of receipts.")
def history(backend: Backend, out: Output, name: str, last: int) -> None:
    """List the newest receipts of NAME from its journal, oldest first."""
    with backend.connect(name) as made:
        receipts = made.history(last)
    out.result("history", {"name": name, "receipts": receipts}, render.show_history)


@_command("explain")
@click.argument("name")
@click.argument("tensor")
def explain(backend: Backend, out: Output, name: str, tensor: str) -> None:
    """Show the destination of TENSOR (its name in a checkpoint) on every engine rank of NAME, how it is loaded there,
    and why so."""
    with backend.connect(name) as made:
        rows = made.explain(tensor)
    out.result("explain", {"name": name, "tensor": tensor, "rows": rows}, render.show_explained)


# ---- showing ---------------------------------------------------------------------------------------------------------


@_command("demo")
@click.option("--model", type=click.Path(path_type=Path), metavar="DIR", help="Checkpoint folder to start from.")
@click.option("--steps", type=click.IntRange(1), help="Optimiser steps.")
@click.option("--seed", type=click.IntRange(0), help="Seed of the random policy, the prompts and the sampling.")
@click.option("--tied/--untied", default=None, help="Tie the random policy's embeddings.")
@click.option("--no-push", is_flag=True, help="Never push: the engine keeps serving the first policy.")
@click.option("--out", "out_dir", type=click.Path(path_type=Path), metavar="DIR", help="Folder for the files.")
@click.option("--layout", help="Post-load layout of the engine: canonical, transposed, shuffled, packed.")
@click.option("--quiet", is_flag=True, help="No progress.")
def demo(backend: Backend, out: Output, no_push: bool, quiet: bool, **given: Any) -> int:
    """Train a small policy with GRPO: an engine in its own process samples, every step ends in a verified push."""
    module = backend.demo()
    chosen = {key: value for key, value in given.items() if value is not None}
    result = module.run_demo(module.DemoOptions(**chosen, push=not no_push, quiet=quiet))
    if out.as_json:
        out.result("demo", result.to_dict(), render.show_stopped)
    else:
        module.print_result(result)
    return int(result.exit_code)


@_command("bench")
@click.option("--shapes", type=click.Choice(("qwen2-0.5b", "many-small", "both")), default="both", show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=10, show_default=True, help="Timed rounds of each variant.")
@click.option("--threads", default="1,2", show_default=True, metavar="N,N", help="Copy threads to measure with.")
@click.option("--ray", is_flag=True, help="Also into a hosted embedded engine, in another process.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the values and of the order of variants.")
@click.option("--engine", metavar="KIND:PATH", help="Instead: into a real engine (vllm:PATH, sglang:PATH; PATH a folder"
              " or qwen2-0.5b[-untied]), against its own way to take weights.")  # fmt: skip
def bench(
    backend: Backend, out: Output, shapes: str, rounds: int, threads: str, ray: bool, seed: int, engine: str | None
) -> None:
    """Measure pushes against a flat one-thread copy of the same bytes, interleaved; every push is checked."""
    progress = functools.partial(click.echo, err=True)
    if engine is not None:
        report = backend.engine_bench().run(engine, rounds, seed, progress=progress)
        out.result("bench", report, render.show_engine_bench)
        return
    module = backend.bench()
    options = module.BenchOptions.of(shapes=shapes, rounds=rounds, threads=threads, ray=ray, seed=seed)
    report = module.run_bench(options, progress=progress)
    out.result("bench", report, render.show_bench)


# ---- the way out -----------------------------------------------------------------------------------------------------


def main(args: Sequence[str] | None = None, backend: Backend | None = None) -> int:
    """Run one command line and return its exit code; the console script's entry point."""
    argv = list(sys.argv[1:] if args is None else args)
    as_json = "--json" in argv
    try:
        code = cli.main(args=argv, prog_name="weighbridge", standalone_mode=False, obj=backend or Backend())
        return int(code or 0)
    except click.ClickException as error:
        if not as_json:
            error.show(sys.stderr)
        return _fail(as_json, {"name": "UsageError", "what": error.format_message()}, USAGE_EXIT, "")
    except BridgeError as error:
        return _fail(as_json, _facts(error), error.exit_code, render.error_block(error))
    except (KeyboardInterrupt, click.Abort):
        return _fail(as_json, {"name": "Interrupted", "what": "interrupted"}, INTERRUPTED_EXIT, "interrupted\n")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else the interpreter complains once more when it flushes
        return UNHEALTHY_EXIT
    except Exception as error:  # the program's edge: any other error is a bug of ours
        sys.stderr.write(
            f"{traceback.format_exc()}\nThis is a bug of weighbridge. Please report it with these lines.\n"
        )
        return _fail(as_json, {"name": type(error).__name__, "what": str(error)}, BUG_EXIT, "")


def _facts(error: BridgeError) -> dict[str, Any]:
    import msgspec

    from bridge.protocol.codec import ErrorInfo

    facts: dict[str, Any] = msgspec.to_builtins(ErrorInfo.of(error))
    if isinstance(error, PushAborted):
        facts["serving"] = error.serving
        facts["receipt"] = None if error.receipt is None else error.receipt.to_dict()
    return facts


def _fail(as_json: bool, facts: Mapping[str, Any], code: int, text: str) -> int:
    if as_json:
        sys.stdout.write(_json({"schema_version": SCHEMA_VERSION, "error": {**facts, "exit_code": code}}))
        sys.stdout.flush()
    else:
        sys.stderr.write(text)
    return code
