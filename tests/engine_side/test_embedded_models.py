"""Log-probabilities agree with transformers for every family, layout and number of ranks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import embedded_models as tiny  # noqa: E402
