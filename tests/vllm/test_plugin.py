"""Where a server's front stands: in whatever process has an AsyncLLM, and in no other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(200)
STARTER = """
import multiprocessing, sys

def serve(queue):
    from vllm.plugins import load_general_plugins
    load_general_plugins()
    before = "vllm.v1.engine.async_llm" in sys.modules
    from vllm.v1.engine.async_llm import AsyncLLM
    queue.put([before] + [hasattr(way, "__wrapped__") for way in (AsyncLLM.add_request, AsyncLLM.collective_rpc)])

if __name__ == "__main__":
    spawn = multiprocessing.get_context("spawn")
    queue = spawn.Queue()
    process = spawn.Process(target=serve, args=(queue,))
    process.start()
    print("found", *queue.get(timeout=150))
    process.join()
"""


def test_a_server_in_a_process_that_multiprocessing_started_has_a_front(tmp_path: Path) -> None:
    """An engine core, which never imports AsyncLLM, is not made to."""
    script = tmp_path / "starter.py"
    script.write_text(STARTER)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=180, check=False)
    assert "found False True True" in done.stdout, done.stdout + done.stderr
