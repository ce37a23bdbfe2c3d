# SPDX-License-Identifier: BSD-3-Clause
"""Compiling a cell of one's own: from a source tree and from an installed package, again only when something changed,
with clear errors; and the program of examples/own_cell."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from own_cells import BUILT, CELLS, ROOT, missing, own_cells

import fastrnn
from fastrnn import extension

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "compiles")

HEADERS = ROOT / "examples" / "own_cell"

# The smallest cell: h' = x + r.
LINEAR = """
#include "cells/cell.h"
namespace mine {
struct Linear {
  static constexpr int kGates = 1, kStates = 1, kSaved = 0, kStored = 1, kParameters = 0, kInput = 0, kRecurrent = 0;
  static constexpr bool kProjects = false;
  FASTRNN_INLINE static constexpr int input_gate(int s) { return s; }
  FASTRNN_INLINE static constexpr int recurrent_gate(int s) { return s; }
  template <class V>
  FASTRNN_INLINE static void forward(const V* x, const V* r, const V*, V* next, V*) {
    next[0] = x[0] + r[0];
  }
  template <class V>
  FASTRNN_INLINE static void backward(const V* d_next, const V*, const V*, const V*, V* d, V* d_prev) {
    d[0] = d_next[0];
    d_prev[0] = V::zero();
  }
};
}
"""


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    own_cells()  # as they are compiled for use
    monkeypatch.setenv("CXXFLAGS", "-O0")


def linear_step(x, r, state, parameters):
    return (x[0] + r[0],)


def test_include_has_the_contract():
    assert (Path(fastrnn.get_include()) / "cells" / "cell.h").read_text().count("kParameters") > 1


@pytest.mark.parametrize("header", sorted(HEADERS.glob("*.h")), ids=lambda path: path.stem)
def test_headers_of_the_example_are_short(header):
    assert len(header.read_text().splitlines()) <= 80


def test_cell_is_compiled_again_only_when_its_header_changes(tmp_path):
    header, folder = tmp_path / "line $ar.h", tmp_path / "built here"
    header.write_text(LINEAR)
    options = {"isas": ["scalar"], "directory": folder}
    cell = fastrnn.load_cell(header, "mine::Linear", linear_step, **options)
    assert (cell.gates, cell.states, cell.parameters, cell.isas) == (1, 1, 0, ("scalar",))
    built = (folder / "cell.so").stat().st_mtime_ns
    library = fastrnn.build_cell(header, "mine::Linear", **options)
    assert library.parent == folder
    assert (folder / "cell.so").stat().st_mtime_ns == built
    weights = [torch.ones(3, 2), torch.zeros(3, 3), None, None]
    arguments = (torch.ones(1, 1, 2), [torch.zeros(1, 1, 3)], weights)
    assert torch.equal(cell.layer(*arguments)[0], torch.full((1, 1, 3), 2.0))
    header.write_text(LINEAR.replace("x[0] + r[0]", "x[0] + x[0] + r[0]"))
    changed = fastrnn.load_cell(header, "mine::Linear", linear_step, **options)
    assert torch.equal(changed.layer(*arguments)[0], torch.full((1, 1, 3), 4.0))
    assert torch.equal(cell.layer(*arguments)[0], torch.full((1, 1, 3), 2.0))  # loaded before, it stays as it was


def test_instruction_set_that_was_not_compiled_runs_in_plain_cpp(tmp_path, isa):
    own = own_cells().MinimalGatedUnit.cell
    best = extension.module.own_isa() if isa == extension.module.available_isas()[-1] else own.isas[-1]
    assert set(own.isas) == {"scalar", best}
    module = own_cells().MinimalGatedUnit(3, 4)
    x = torch.randn(5, 2, 3)
    y = module(x)[0]
    extension.module.select_isa(best if extension.module.own_isa() == best else "scalar")
    assert torch.equal(module(x)[0], y)


def test_error_of_the_compiler_is_shown(tmp_path):
    header = tmp_path / "linear.h"
    for wrong, said in (
        (LINEAR.replace("d_next[0];", "d_next[0] +;"), "expected primary-expression"),
        (LINEAR.replace("kGates = 1", "kGates = 5").replace("kStored = 1", "kStored = 5"), "a cell has 1 to 4 gates"),
        (
            LINEAR.replace("kStored = 1", "kStored = 2, kExtra = 1").replace("kInput = 0", "kInput = 2"),
            "kInput: a window",
        ),
    ):
        header.write_text(wrong)
        with pytest.raises(RuntimeError, match=r"linear\.h does not compile") as caught:
            fastrnn.build_cell(header, "mine::Linear", isas=["scalar"], directory=tmp_path / "built")
        if "expected" not in said or "g++" in extension.module.compiler():
            assert said.split("-")[0] in str(caught.value)


def test_bad_arguments_are_named(tmp_path):
    header = tmp_path / "linear.h"
    with pytest.raises(FileNotFoundError, match="no header"):
        fastrnn.build_cell(header, "Linear")
    header.write_text(LINEAR)
    with pytest.raises(ValueError, match=r"struct must be the name of a C\+\+ struct"):
        fastrnn.build_cell(header, "Linear; int x")
    with pytest.raises(ValueError, match=r"isas must be of scalar, .*got sse2"):
        fastrnn.build_cell(header, "Linear", isas=["sse2"])
    with pytest.raises(TypeError, match="isas must be a sequence of names, got 'avx2'"):
        fastrnn.build_cell(header, "Linear", isas="avx2")
    with pytest.raises(RuntimeError, match="does not load"):
        fastrnn.OwnCell(tmp_path / "nothing.so", linear_step)
    with pytest.raises(RuntimeError, match="has no fastrnn_own_cell"):
        fastrnn.OwnCell(extension.module.__file__, linear_step)


def test_library_of_another_fastrnn_is_refused(tmp_path, monkeypatch):
    own_cells()
    built = BUILT.glob("fastrnn_minimal_gated_unit_*/cell_*.so")  # by this fastrnn, and earlier by others
    library = max(built, key=lambda path: path.stat().st_mtime)
    monkeypatch.setattr("fastrnn.own_cells.sources_digest", lambda: "another")
    with pytest.raises(RuntimeError, match="was built with another fastrnn: build it again"):
        fastrnn.OwnCell(library, linear_step)
    copied = tmp_path / "cell.so"  # the layout of the structs, first in what the library hands over, is another
    shutil.copy(library, copied)
    entry = ctypes.CDLL(str(copied)).fastrnn_own_cell
    entry.restype = ctypes.POINTER(ctypes.c_int64)
    layout = entry().contents.value.to_bytes(8, "little", signed=True)
    content = library.read_bytes()
    assert content.count(layout) == 1
    other = tmp_path / "other.so"
    other.write_bytes(content.replace(layout, bytes(8)))
    with pytest.raises(RuntimeError, match="compiled from the headers of another fastrnn"):
        fastrnn.OwnCell(other, linear_step)


def test_cell_is_compiled_against_an_installed_package(tmp_path):
    """The package as a wheel has it, in a directory of its own; nothing of the source tree is looked at."""
    installed, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    build = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(installed)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    package = installed / "fastrnn"
    for path in (Path(extension.module.__file__), Path(fastrnn.__file__).with_name("_build.py")):
        shutil.copy(path, package)
    (work / "linear.h").write_text(LINEAR)
    program = f"""
        import sys
        sys.meta_path[:] = [f for f in sys.meta_path if getattr(f, "__name__", "") != "_EditableFinder"]
        import torch, fastrnn
        assert fastrnn.__file__.startswith({str(package)!r}), fastrnn.__file__
        assert fastrnn.get_include() == {str(package / "csrc")!r}, fastrnn.get_include()
        class Linear(fastrnn.CellModule):
            cell = fastrnn.load_cell("linear.h", "mine::Linear", lambda x, r, s, p: (x[0] + r[0],), isas=["scalar"])
        module = Linear(3, 4, num_layers=2, bidirectional=True)
        y, h = module(torch.randn(5, 2, 3), lengths=torch.tensor([5, 2]))
        y.sum().backward()
        assert y.shape == (5, 2, 8) and not y[2:, 1].any() and all(p.grad.any() for p in module.parameters())
        from pathlib import Path
        deps = " ".join(path.read_text() for path in Path("cache").rglob("build.ninja"))
        assert {str(ROOT / "csrc")!r} not in deps and "linear.h" in deps
    """
    environment = {**os.environ, "PYTHONPATH": str(installed), "TORCH_EXTENSIONS_DIR": str(work / "cache")}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_example_learns_and_measures(capsys):
    figures = own_cells().main(["--steps", "40", "--repeats", "1"])
    for cell in CELLS:
        assert figures[f"{cell}_last_loss"] < 0.5 * figures[f"{cell}_first_loss"]
        assert all(figures[f"{cell}_{kind}_{hidden}"] > 0 for kind in ("infer", "learn") for hidden in (128, 256))
    assert "PeepholeLSTM: loss" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        own_cells().main(["--threads", "0"])


def test_page_shows_the_header_and_the_step_of_the_example():
    page = (ROOT / "docs" / "own-cells.md").read_text()
    header = re.findall(r"```cpp\n(.*?)```", page, re.DOTALL)[0]
    there = [line for line in (HEADERS / "minimal_gated_unit.h").read_text().splitlines() if "//" not in line]
    assert [line for line in header.splitlines() if line] == [line for line in there if line and "#pragma" not in line]
    step = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[1]
    program = (HEADERS / "own_cells.py").read_text()
    assert all(line in program for line in step.splitlines()[1:])


def test_checks_of_the_page_run():
    page = (ROOT / "docs" / "own-cells.md").read_text()
    (check,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "gradcheck" in block]
    exec(check, {"torch": torch, "MinimalGatedUnit": own_cells().MinimalGatedUnit})
