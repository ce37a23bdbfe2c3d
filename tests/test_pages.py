# SPDX-License-Identifier: BSD-3-Clause
"""The examples of the pages on lengths, resets and noise run as they stand there, and do what the page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.mark.parametrize("page", ["lengths", "resets", "noise"])
def test_examples_of_the_page_run(page, compiled):
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, object] = {}
    for block in blocks:
        assert len([line for line in block.splitlines() if line]) == 5
        exec(block, names)
        if block is blocks[0] and page == "lengths":
            assert not names["y"][37:, 0].any()
            assert torch.equal(names["y"][36, 0, :256], names["h"][2, 0])
