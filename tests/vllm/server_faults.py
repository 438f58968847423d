"""Faults inside a `vllm serve` of a test: the server starts with this file as its `sitecustomize`.

The switch is a file named by WEIGHBRIDGE_TEST_FAULT: "K once" fails the K-th module that a load rebuilds, once; "K
always" every load; "K hang" lets it wait there; "flip" changes a live weight before the next look at it. Once a bridge
has come, every step of the engine takes STEP_S longer, so that requests are in flight for as long as a test needs.
"""

import os
import sys
import time
from importlib.abc import MetaPathFinder

STEP_S = 0.01


class Install(MetaPathFinder):
    """Patches what `engine_side.worker.rank` imports, once a process with live weights imports that module."""

    busy = False

    def find_spec(self, name, path=None, target=None):
        if name == "engine_side.worker.rank" and not self.busy:
            self.busy = True
            import importlib

            importlib.import_module(name)
            patch()
        return None


def patch():
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    from engine_side.load.loader import Loader
    from engine_side.load.rebuild import Rebuilder
    from engine_side.verify.verify import Verifier

    switch = os.environ["WEIGHBRIDGE_TEST_FAULT"]
    apply, rebuild, run = Loader.apply, Rebuilder.rebuild, Verifier.run
    state = {"loading": False, "count": 0}

    def asked():
        try:
            return open(switch).read().split()
        except FileNotFoundError:
            return []

    def counted_apply(self, *args, **kwargs):
        state.update(loading=True, count=0)
        try:
            return apply(self, *args, **kwargs)
        finally:
            state["loading"] = False

    def faulty_rebuild(self, *args):
        words = asked()
        if state["loading"] and len(words) == 2 and state["count"] == int(words[0]):
            if words[1] != "always":
                os.unlink(switch)
            if words[1] == "hang":
                time.sleep(5)
            else:
                raise RuntimeError(f"write {words[0]} failed")
        state["count"] += 1
        return rebuild(self, *args)

    def flipped(self, *args, **kwargs):
        if asked() == ["flip"]:
            os.unlink(switch)
            self.loader.host.model.get_parameter("model.norm.weight").data.mul_(2)
        return run(self, *args, **kwargs)

    execute = WorkerWrapperBase.execute_model

    def slow(self, *args, **kwargs):
        time.sleep(STEP_S)
        return execute(self, *args, **kwargs)

    WorkerWrapperBase.execute_model = slow
    Loader.apply, Rebuilder.rebuild, Verifier.run = counted_apply, faulty_rebuild, flipped


if "WEIGHBRIDGE_TEST_FAULT" in os.environ:
    sys.meta_path.insert(0, Install())
