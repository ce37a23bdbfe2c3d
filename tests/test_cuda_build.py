# SPDX-License-Identifier: BSD-3-Clause
"""What setup.py builds of csrc/cuda and when, without a GPU, nvcc or a torch with CUDA."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
START = """
import runpy, setuptools, torch
setuptools.setup = lambda **options: None
torch.version.cuda = {cuda!r}
setup = runpy.run_path("setup.py")
"""


@pytest.fixture
def setup(tmp_path):
    """Runs a program with the names of setup.py in `setup`; cuda: torch's version, nvcc: whether there is one."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("setup.py is not beside the tests")
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)

    def run(program: str, cuda: str | None = "13.0", with_nvcc: bool = True, **environment: str):
        changed = {k: v for k, v in os.environ.items() if k not in ("FASTRNN_CUDA", "TORCH_CUDA_ARCH_LIST")}
        path = f"{tmp_path}:{Path(sys.executable).parent}" if with_nvcc else str(Path(sys.executable).parent)
        changed |= {"PATH": path, **environment}
        command = [sys.executable, "-c", START.format(cuda=cuda) + program]
        return subprocess.run(command, cwd=ROOT, env=changed, capture_output=True, text=True)

    return run


def test_cuda_is_built_where_both_are_there_and_says_why_not(setup):
    decide = "print(*setup['cuda_decision']())"
    for options, beginning in (
        ({}, "True built for torch's CUDA 13.0: arch=compute_80,code=sm_80 arch=compute_86"),
        ({"FASTRNN_CUDA": "1"}, "True built"),
        ({"FASTRNN_CUDA": "0"}, "False not built: FASTRNN_CUDA=0"),
        ({"cuda": None}, "False not built: torch is built without CUDA"),
        ({"with_nvcc": False}, "False not built: nvcc is not on the PATH"),
    ):
        assert setup(decide, **options).stdout.startswith(beginning), options
    refused = setup(decide, cuda=None, FASTRNN_CUDA="1")
    assert refused.returncode != 0
    assert "FASTRNN_CUDA=1, but torch is built without CUDA" in refused.stderr


@pytest.mark.parametrize(
    ("given", "flags"),
    [
        ("", "arch=compute_80,code=sm_80 arch=compute_86,code=sm_86 arch=compute_89,code=sm_89 "
             "arch=compute_90,code=[sm_90,compute_90]"),
        ("9.0a", "arch=compute_90a,code=sm_90a"),
        ("8.0 10.0+PTX", "arch=compute_80,code=sm_80 arch=compute_100,code=[sm_100,compute_100]"),
    ],
)  # fmt: skip
def test_architectures_are_read_as_torch_reads_them(given, flags, setup):
    program = "print(*[flag for flag in setup['architecture_flags']() if flag != '-gencode'])"
    assert setup(program, TORCH_CUDA_ARCH_LIST=given).stdout == f"{flags}\n"


def test_an_architecture_that_is_no_number_is_named(setup):
    done = setup("setup['architecture_flags']()", TORCH_CUDA_ARCH_LIST="Hopper")
    assert done.returncode != 0
    assert "TORCH_CUDA_ARCH_LIST must be numbers like 8.0;8.6;8.9;9.0+PTX, got 'Hopper'" in done.stderr


def test_every_file_of_cuda_is_built_and_none_without(setup):
    found = setup("print(setup['ninja_file'](setup['sources_with_flags'](True)))").stdout
    for file in sorted((ROOT / "csrc/cuda").glob("*.c*")):
        if file.suffix in (".cu", ".cpp"):
            rule = "device" if file.suffix == ".cu" else "compile"
            assert f": {rule} csrc/cuda/{file.name}\n" in found
    assert "-lc10_cuda -ltorch_cuda" in found
    plain = setup("print(setup['ninja_file'](setup['sources_with_flags'](False)))").stdout
    assert "cuda" not in plain.replace(str(ROOT), "")
