# SPDX-License-Identifier: BSD-3-Clause
"""docs/compatibility.md: every test that it names exists, every row names one, and no cell is empty."""

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


ROWS = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
ROWS = [line for line in ROWS if not line.startswith("| item")]


@pytest.mark.parametrize("line", ROWS, ids=lambda line: line[2:40])
def test_every_row_is_full_and_names_a_test(line: str) -> None:
    item, stock, ours, shown = (cell.strip() for cell in line.removeprefix("|").removesuffix("|").split("|"))
    assert item
    assert stock
    assert ours
    assert re.search(r"`test_\w+\.py::test_\w+`", shown) or "no test here" in ours
