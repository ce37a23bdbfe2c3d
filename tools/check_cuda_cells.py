# SPDX-License-Identifier: BSD-3-Clause
"""Compiles one trivial kernel over each cell of csrc/cells for sm_80 and sm_90: the cells are code for CUDA as well.

Run by .ci/run where nvcc exists; needs no GPU. Warnings are errors, and a cell without a kernel is one too.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "csrc/cuda/cells_compile.cu"
ARCHITECTURES = ("sm_80", "sm_90")
NVCC = ["nvcc", "-std=c++20", "-O3", "-fmad=false", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror"]


def main() -> None:
    """Exits with 1 when a cell has no kernel or does not compile."""
    included = SOURCE.read_text()
    for header in sorted((ROOT / "csrc/cells").glob("*.h")):
        if header.name != "cell.h" and f'"../cells/{header.name}"' not in included:
            sys.exit(f"check_cuda_cells: {SOURCE.name} does not include {header.name}")
    with tempfile.TemporaryDirectory() as folder:
        for architecture in ARCHITECTURES:
            output = str(Path(folder) / f"{architecture}.o")
            if subprocess.run([*NVCC, f"-arch={architecture}", "-c", str(SOURCE), "-o", output]).returncode:
                sys.exit(f"check_cuda_cells: a cell does not compile for {architecture}")
            print(f"check_cuda_cells: every cell compiles for {architecture}")


if __name__ == "__main__":
    main()
