# SPDX-License-Identifier: BSD-3-Clause
"""docs/compatibility.md: every test that it names exists, and every row about fastrnn names one."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
PAGE = TESTS.parent / "docs" / "compatibility.md"
NAMED = sorted(set(re.findall(r"`(test_\w+\.py)::(test_\w+)`", PAGE.read_text(encoding="utf-8"))))


@pytest.mark.parametrize("file", sorted({file for file, _ in NAMED}))
def test_tests_named_by_the_page_exist(file: str) -> None:
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    there = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert {test for named, test in NAMED if named == file} <= there


def test_every_row_names_a_test_or_a_reason() -> None:
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.removeprefix("|").removesuffix("|").split("|")]
        if line.startswith("| ") and not line.startswith("| item"):
            assert len(cells) == 4, line
            assert cells[3] or "no test here" in line, line
