# SPDX-License-Identifier: BSD-3-Clause
"""Fails when a file knows what it must not: the arrows between the parts of fastrnn, checked on includes and imports.

Run by `make lint`. C++: csrc/cells includes nothing but cell.h; torch's headers are for TORCH_FILES; intrinsics stay in
csrc/cpu/isa; csrc/cpu and csrc/cuda do not include each other. Python: a module of fastrnn imports only what stands
above it in LAYERS; bench and examples use the public API.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

INCLUDE = re.compile(r'^\s*#\s*include\s*(?P<name>[<"][^>"]+[>"])', re.MULTILINE)
TORCH = re.compile(r"^(torch|ATen|c10|pybind11|caffe2)/|^Python\.h$")
INTRINSICS = re.compile(r"^([a-z]*intrin|arm_\w+)\.h$")
# Beside csrc/cpu/isa: what the instruction sets can reach; the caller's MXCSR and the pause of a spinning thread;
# conversions of 16-bit tensors.
INTRINSIC_FILES = {"csrc/cpu/roofline.cpp", "csrc/cpu/run.cpp", "csrc/cpu/half.cpp"}
TORCH_FILES = {"csrc/ops.cpp", "csrc/checks.h", "csrc/arguments.h", "csrc/cpu/layer.cpp", "csrc/cpu/backend.h"}
TORCH_FILES |= {"csrc/cpu/operands.h", "csrc/cpu/half.h", "csrc/cpu/half.cpp"}
TORCH_FILES |= {f"csrc/{name}" for name in ("module.cpp", "schemas.h", "doors.h")}
TORCH_FILES |= {f"csrc/cuda/{name}" for name in ("layer.cpp", "device.cpp")}
TORCH_FILES |= {f"csrc/{name}" for name in ("derivative.h", "derivative.cpp", "prepacked.cpp", "call.h", "event.h")}
TORCH_FILES |= {f"csrc/{name}_call.cpp" for name in ("module", "layer", "cell", "direct")}
TORCH_FILES |= {"csrc/own_cell.h", "csrc/own_cell.cpp"}

# The modules of fastrnn from the ground up; those of one line do not know each other.
LAYERS = (
    ("_C", "_build"),
    ("extension", "reference", "batching", "onnx_export", "stock", "tiers", "tracing"),
    ("direct_calls", "own_builds"),
    ("extras", "folding", "gradients"),
    ("checks",),
    ("operators",),
    ("derivatives", "fakes", "flops"),
    ("registration", "transforms"),
    ("autograd",),
    ("extended",),
    ("functional", "compiling", "scripting", "sequences", "own_cells"),
    ("stack", "own_modules"),
    ("modules", "cells"),
    ("conversion", "explanation", "info", "prepacking"),
    ("__init__",),
    ("__main__",),
)
PUBLIC = {"functional", "reference", "info"}  # beside the names of fastrnn itself


def include_faults(path: str, text: str) -> Iterator[str]:
    """What a file of csrc includes and should not."""
    for match in INCLUDE.finditer(text):
        quoted, name = match["name"], match["name"][1:-1]
        system = quoted.startswith("<")
        target = name if system else (Path(path).parent / name).as_posix()
        if not system and not (ROOT / target).exists():
            target = f"csrc/{name}"
        target = Path(re.sub(r"[^/]+/\.\./", "", target)).as_posix()
        if path.startswith("csrc/cells/") and target != "csrc/cells/cell.h":
            yield f"includes {quoted}: a cell knows cell.h alone"
        if TORCH.search(name) and path not in TORCH_FILES:
            yield f"includes {quoted}: torch is for {', '.join(sorted(TORCH_FILES))}"
        if INTRINSICS.search(name) and not path.startswith("csrc/cpu/isa/") and path not in INTRINSIC_FILES:
            yield f"includes {quoted}: intrinsics are for csrc/cpu/isa"
        for here, there in (("cpu", "cuda"), ("cuda", "cpu")):
            if path.startswith(f"csrc/{here}/") and target.startswith(f"csrc/{there}/"):
                yield f"includes {quoted}: csrc/{here} and csrc/{there} do not know each other"


def imports(tree: ast.Module, package: str) -> Iterator[str]:
    """Full names of the modules, or of the names in a module, that a file imports from the given package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, [package if node.level == 1 else "", node.module]))
            yield from (f"{module}.{alias.name}" for alias in node.names)


def package_faults(path: str, tree: ast.Module) -> Iterator[str]:
    """What a module of fastrnn imports from the same or a higher layer."""
    layer_of = {name: layer for layer, names in enumerate(LAYERS) for name in names}
    own = Path(path).stem
    if own not in layer_of:
        yield "has no place in LAYERS of tools/check_arrows.py"
        return
    for name in imports(tree, "fastrnn"):
        root, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if root == "fastrnn" and layer_of.get(target, -1) >= layer_of[own]:
            yield f"imports {target}: not below {own} in LAYERS of tools/check_arrows.py"


def user_faults(tree: ast.Module, package: str) -> Iterator[str]:
    """What bench or an example uses beyond the public API."""
    modules = {name for names in LAYERS for name in names} - PUBLIC
    for name in imports(tree, package):
        root, _, rest = name.partition(".")
        if root == "fastrnn" and rest.partition(".")[0] in modules:
            yield f"imports {name}, which is not public"
    for node in ast.walk(tree):
        is_inner = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "fastrnn"
        if is_inner and node.attr in modules - {"__init__"}:
            yield f"uses fastrnn.{node.attr}, which is not public"


def faults() -> Iterator[str]:
    """Every arrow that points the wrong way, with its file."""
    for file in sorted((ROOT / "csrc").rglob("*")):
        if file.suffix in {".h", ".cpp", ".cu", ".cuh"}:
            path = file.relative_to(ROOT).as_posix()
            yield from (f"{path} {fault}" for fault in include_faults(path, file.read_text()))
    for folder in ("fastrnn", "bench", "examples"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            path, tree = file.relative_to(ROOT).as_posix(), ast.parse(file.read_text())
            if folder == "fastrnn" and file.stem != "_build":
                found = package_faults(path, tree)
            else:
                found = user_faults(tree, "fastrnn.bench" if folder == "bench" else folder)
            yield from (f"{path} {fault}" for fault in found)


def main() -> None:
    """Prints each fault; exits with 1 if there is one."""
    found = list(faults())
    print(*found, f"check_arrows: {len(found)} arrows point the wrong way", sep="\n")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
