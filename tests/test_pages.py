# SPDX-License-Identifier: BSD-3-Clause
"""The pages: examples run as they stand there, tables are those of the results, maps name every file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from bench import pages, report

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


ROOT = DOCS.parent


@pytest.mark.parametrize("page", ["README.md", "docs/benchmarks.md"])
def test_tables_are_those_of_the_result_that_the_page_names(page):
    marks = pages.BETWEEN.search((ROOT / page).read_text(encoding="utf-8"))
    result = report.read_json(ROOT / marks[2])
    assert marks[0] == f"{marks[1]}{pages.texts(result)[page]}{marks[3]}"


def test_tables_are_written_between_the_marks_alone(tmp_path):
    name = "bench/results/some.json"
    (tmp_path / "bench/results").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    result = report.read_json(ROOT / "bench/results/epyc-zen-5-2-cores.json")
    for page in pages.texts(result):
        (tmp_path / page).write_text("before\n<!-- table of old.json -->\nstale\n<!-- end of the table -->\nafter\n")
    written = pages.renew(result, tmp_path / name, tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in written] == list(pages.texts(result))
    for page, text in pages.texts(result).items():
        expected = f"before\n<!-- table of {name} -->\n{text}<!-- end of the table -->\nafter\n"
        assert (tmp_path / page).read_text() == expected
    (tmp_path / "README.md").write_text("no marks")
    with pytest.raises(ValueError, match=r"README\.md has no lines"):
        pages.renew(result, tmp_path / name, tmp_path)
    with pytest.raises(ValueError, match="subpath"):
        pages.renew(result, tmp_path.parent / "elsewhere.json", tmp_path)


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md"])
def test_maps_name_every_module(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    modules = sorted(path.name for path in (ROOT / "fastrnn").glob("*.py") if not path.name.startswith("_"))
    assert [name for name in modules if name not in text] == []


def test_prose_keeps_to_120_columns():
    long = []
    for path in (*ROOT.glob("*.md"), *DOCS.glob("*.md")):
        text = pages.BETWEEN.sub("", path.read_text(encoding="utf-8"))
        long += [
            (path.name, line) for line in text.splitlines() if len(line) > 120 and not line.lstrip().startswith("|")
        ]
    assert long == []
