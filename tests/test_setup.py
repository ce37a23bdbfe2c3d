# SPDX-License-Identifier: BSD-3-Clause
"""What setup.py says where fastrnn cannot be built: one sentence that says what to type."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WITHOUT = "sys.modules['torch'] = None"
OLDER = "import torch; torch.__version__ = torch.torch_version.TorchVersion('2.10.1')"
OLD_TOOLS = "import setuptools; setuptools.__version__ = '59.6.0'"


@pytest.mark.parametrize(
    ("world", "words"),
    [
        (WITHOUT, ("this Python has none", "pip install --no-build-isolation .")),
        (OLDER, ("needs torch >= 2.11, and this is torch 2.10.1", "pip install --upgrade torch")),
        (OLD_TOOLS, ("needs setuptools >= 77, and this is 59.6.0", "pip install -U setuptools")),
    ],
    ids=["no-torch", "older-torch", "older-setuptools"],
)
def test_what_is_missing_is_named_in_a_sentence(world: str, words: tuple[str, ...]) -> None:
    if not (ROOT / "setup.py").exists():
        pytest.skip("setup.py is not beside the tests")
    program = f"import sys, runpy; {world}; runpy.run_path('setup.py')"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    for wanted in words:
        assert wanted in done.stderr
    assert "Traceback" not in done.stderr
