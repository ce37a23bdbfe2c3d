# SPDX-License-Identifier: BSD-3-Clause
"""Where the compiled module is missing or does not fit: importing works and warns once, everything computes, and info
says what to do. Each case is a copy of the package, broken as installations are, in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastrnn
from fastrnn import extension

PACKAGE = Path(fastrnn.__file__).parent
BUILD = "TORCH_VERSION = {torch!r}\nCXX11_ABI = {abi}\nFLAGS = 'c++'\nISA_FLAGS = {{}}\nCUDA = 'not built: no nvcc'\n"

# An editable installation would find the library of the source tree.
IMPORT = """
import sys, warnings
sys.meta_path[:] = [finder for finder in sys.meta_path if getattr(finder, "__name__", "") != "_EditableFinder"]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fastrnn
    import fastrnn.functional, fastrnn.info, torch
    x = torch.randn(3, 2, 4, requires_grad=True)
"""
COMPUTE = """
    for name in ("LSTM", "GRU", "RNN"):
        module = getattr(fastrnn, name)(4, 5)
        y = module(x)[0]
        torch.testing.assert_close(y, module.to_torch()(x)[0])
        z = getattr(fastrnn.functional, name.lower())(x, weights=tuple(module.parameters()))[0]
        torch.testing.assert_close(y, z)
        (g,) = torch.autograd.grad(z.sum(), x, create_graph=True)
        g.square().sum().backward()
    fastrnn.GRUCell(4, 5)(x[0])
    fastrnn.autograd.gru_layer(x, torch.zeros(1, 2, 5), torch.ones(15, 4), torch.ones(15, 5), *(None,) * 7)
    model = torch.nn.Sequential(torch.nn.LSTM(4, 5))
    assert fastrnn.convert(model).converted
    model(x)
"""
REPORT = """
print(*[f"{warning.category.__name__}: {warning.message}" for warning in caught], sep="\\n")
print(fastrnn.explain(fastrnn.LSTM(4, 5), x))
from fastrnn.__main__ import main
print(main(["info"]), main(["check"]))
"""


def run(tmp_path: Path, program: str, build: str | None, library: bytes | None) -> str:
    """The output of the program with such a fastrnn/_build.py and such a library."""
    copied = tmp_path / "fastrnn"
    shutil.copytree(PACKAGE, copied, ignore=shutil.ignore_patterns("_C*", "_build.py", "__pycache__"))
    if build is not None:
        (copied / "_build.py").write_text(build)
    if library is not None:
        suffix = next(path.name.partition(".")[2] for path in PACKAGE.glob("_C.*.so"))
        (copied / f"_C.{suffix}").write_bytes(library)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "no kernels to check" in done.stderr
    return done.stdout


ABI = torch.compiled_with_cxx11_abi()
CASES = {
    "not built": (None, None, "it is not built (fastrnn/_build.py is missing)"),
    "another torch": (
        BUILD.format(torch="1.2.3+cpu", abi=ABI),
        None,
        f"it was built for torch 1.2.3+cpu but torch {torch.__version__} is running",
    ),
    "library is broken": (
        BUILD.format(torch=str(torch.__version__), abi=ABI),
        b"\x7fELF and then nothing",
        "fastrnn._C does not load: ",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_importing_warns_once_and_everything_works(tmp_path, case, request):
    build, library, reason = CASES[case]
    if library is not None:
        request.getfixturevalue("compiled")  # whose name tells that of the library
    program = IMPORT + (COMPUTE if case == "not built" else "") + REPORT
    lines = run(tmp_path, program, build, library).splitlines()
    said = "RuntimeWarning: fastrnn runs without its kernels, on torch.nn's code: the extension is not loaded, since "
    assert lines[0].startswith(said + reason)
    assert lines[0].endswith(". " + extension.ADVICE)
    explained = "fastrnn.LSTM -> torch: torch.nn's own forward, because the extension is not loaded: "
    assert lines[1].startswith(explained + reason)  # the second line: nothing else was warned of
    info = {name: value.strip() for name, _, value in (line.partition("  ") for line in lines[2:])}
    assert info["extension"].startswith("not loaded: " + reason)
    assert info["what to do"] == extension.ADVICE
    match = {"not built": "nothing built", "another torch": "they do NOT match"}
    assert info["torch"].endswith(match.get(case, "they match"))
    assert info["CUDA"].startswith("not built")
    assert info["self-test"].startswith("passed")
    assert lines[-1] == "0 1"  # info passes, since what runs is right; check has nothing to check


def test_library_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastrnn._C", None)
    monkeypatch.delattr(fastrnn, "_C", raising=False)
    module, reason = extension.load()
    assert module is None
    assert reason.startswith("fastrnn._C does not load: ") or reason == extension.reason


def test_release_counts_and_the_local_version_does_not():
    assert extension.mismatch(torch.__version__, ABI) is None
    assert extension.mismatch(torch.__version__.split("+")[0] + "+another", ABI) is None
    assert "built for torch 1.2.3+cpu but torch" in extension.mismatch("1.2.3+cpu", ABI)
    assert "ABI" in extension.mismatch(torch.__version__, not ABI)
