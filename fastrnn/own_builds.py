# SPDX-License-Identifier: BSD-3-Clause
"""Compiles a cell of one's own, a C++ header, into a library for own_cells.py; users call it.

The loops around a cell, the tile and the lane classes are sources that come with the package (get_include). A library
is those files of isa/ that are asked for, each with its own flags, and two small ones; it needs neither torch nor
Python, and has none of fastrnn's symbols. ninja compiles, again when a header, a flag or fastrnn itself changed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import extension

_PACKAGE = Path(__file__).parent
_ISAS = ("scalar", "avx2", "avx512")  # the files of isa/ with kernels of float and double


def get_include() -> str:
    """The folder of fastrnn's C++ headers, to compile a cell of one's own against.

    Returns:
        The path to give a compiler after -I; the contract of a cell is "cells/cell.h" in it. What build_cell compiles
        beside them lies there, too.
    """
    for folder in (_PACKAGE / "csrc", _PACKAGE.parent / "csrc"):  # installed; a source tree or an editable one
        if (folder / "cells" / "cell.h").exists():
            return str(folder)
    raise RuntimeError("fastrnn.get_include: this installation has no headers; install fastrnn again")


def sources_digest() -> str:
    """A digest of everything in C++ that a library is compiled from but the cell itself."""
    root = Path(get_include())
    digest = hashlib.sha256()
    headers = [root / "cell_sizes.h", root / "cells" / "cell.h"]
    for path in sorted([*headers, *root.glob("cpu/*.h"), *root.glob("cpu/isa/*")]):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    for name in ("barrier.cpp", "core.cpp", "own/library.cpp"):
        digest.update((root / "cpu" / name).read_bytes())
    return digest.hexdigest()[:16]


def build_cell(
    header: str | os.PathLike[str],
    struct: str,
    *,
    isas: Sequence[str] | None = None,
    directory: str | os.PathLike[str] | None = None,
    verbose: bool = False,
) -> Path:
    """Compiles a cell of one's own for the instruction sets asked for; the second call finds it done.

    With the compiler and the flags of fastrnn itself; CXX and CXXFLAGS do what they say, MAX_JOBS too.

    Args:
        header: the file that defines the cell, a struct as "cells/cell.h" in get_include() asks for.
        struct: its name, with its namespaces: "mine::Mgu".
        isas: "scalar", "avx2", "avx512": what to compile for, each some 15 s of a core; the one in use here, if not
            given. Plain C++, "scalar", is always added: it runs where the instruction set in use is not there.
        directory: where to compile; if not given, a folder of its own in the cache of torch.utils.cpp_extension
            (TORCH_EXTENSIONS_DIR).
        verbose: whether the compiler's messages are printed when it succeeds.
    Returns:
        The library, for OwnCell. It is bound to this version of fastrnn, and to neither torch's nor Python's.
    Raises:
        RuntimeError: fastrnn's own kernels are not built here, ninja or the compiler is missing, or the header does not
            compile; the message has what the compiler said.
        ValueError: an instruction set is not known, or struct is no name.
        FileNotFoundError: there is no such header.
    """
    header = Path(header).resolve()
    if not header.is_file():
        raise FileNotFoundError(f"fastrnn.build_cell: no header {header}")
    if not re.fullmatch(r"[A-Za-z_]\w*(::[A-Za-z_]\w*)*", struct):
        raise ValueError(f"fastrnn.build_cell: struct must be the name of a C++ struct, got {struct!r}")
    if extension.module is None:
        raise RuntimeError(f"fastrnn.build_cell: fastrnn's own kernels are not there: {extension.reason}")
    build: Any = importlib.import_module("fastrnn._build")  # as fastrnn itself was built
    if isinstance(isas, str):
        raise TypeError(f"fastrnn.build_cell: isas must be a sequence of names, got {isas!r}")
    asked = [extension.module.own_isa()] if isas is None else list(isas)
    unknown = sorted(set(asked) - set(_ISAS))
    if unknown:
        raise ValueError(f"fastrnn.build_cell: isas must be of {', '.join(_ISAS)}, got {', '.join(unknown)}")
    chosen = [isa for isa in _ISAS if isa in asked or isa == "scalar"]
    ninja = _ninja_program()

    compiler, *flags = shlex.split(build.FLAGS)
    compilers = shlex.split(os.environ.get("CXX", compiler))
    flags = [flag for flag in flags if flag != "-Werror"]
    sources = sources_digest()
    flags += [f"-I{get_include()}", f"-DFASTRNN_CELL={struct}", f'-DFASTRNN_CELL_HEADER="{header}"']
    flags += [f'-DFASTRNN_SOURCES="{sources}"', f"-DFASTRNN_ISAS={' '.join(f'ISA({isa})' for isa in chosen)}"]
    flags += shlex.split(os.environ.get("CXXFLAGS", ""))
    text = _ninja_file(compilers, flags, {isa: build.ISA_FLAGS[isa] for isa in chosen})
    if directory is None:
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        tools: Any = importlib.import_module("torch.utils.cpp_extension")  # slow, and imports setuptools
        root = os.environ.get("TORCH_EXTENSIONS_DIR") or tools.get_default_build_root()
        directory = Path(root) / f"fastrnn_{header.stem}_{digest}"
    folder = Path(directory).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        _run_ninja(ninja, folder, text, header, verbose)
        return _named_by_content(folder / "cell.so")


def _ninja_file(compilers: Sequence[str], flags: Sequence[str], isas: dict[str, list[str]]) -> str:
    """The text of build.ninja. What is linked takes its place at once: a process may have the old library loaded."""

    def quoted(arguments: Sequence[str]) -> str:
        return shlex.join(arguments).replace("$", "$$")

    root = Path(get_include()) / "cpu"
    own = {f"isa_{isa}": (root / "isa" / f"{isa}.cpp", isa_flags) for isa, isa_flags in isas.items()}
    shared = {"library": "own/library.cpp", "barrier": "barrier.cpp", "core": "core.cpp"}
    own |= {name: (root / path, []) for name, path in shared.items()}
    lines = [f"cxx = {quoted(compilers)}", f"flags = {quoted(flags)}", "rule compile"]
    lines += ["  command = $cxx -MD -MF $out.d $flags $own -c $in -o $out", "  deps = gcc", "  depfile = $out.d"]
    lines += ["rule link", "  command = $cxx -shared $in -o $out.new && mv $out.new $out"]
    for name, (source, own_flags) in own.items():
        path = str(source).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
        lines += [f"build {name}.o: compile {path}", f"  own = {quoted(own_flags)}"]
    lines += [f"build cell.so: link {' '.join(f'{name}.o' for name in own)}", "default cell.so", ""]
    return "\n".join(lines)


def _ninja_program() -> str:
    """The ninja of the Python package, which need not be on the PATH, else the machine's."""
    with contextlib.suppress(ImportError):
        return os.path.join(importlib.import_module("ninja").BIN_DIR, "ninja")
    found = shutil.which("ninja")
    if found is None:
        raise RuntimeError("fastrnn.build_cell: a cell is compiled with ninja: type `pip install ninja`")
    return found


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Processes that want the same library build it one after the other."""
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _named_by_content(library: Path) -> Path:
    """A process that has loaded a library takes any other of that path for the same one."""
    digest = hashlib.sha256(library.read_bytes()).hexdigest()[:16]
    named = library.with_name(f"cell_{digest}.so")
    if not named.exists():
        for old in library.parent.glob("cell_*.so"):
            old.unlink()
        os.link(library, named)
    return named


def _run_ninja(ninja: str, folder: Path, text: str, header: Path, verbose: bool) -> None:
    file = folder / "build.ninja"
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
    jobs = ["-j", os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))]
    done = subprocess.run([ninja, *jobs], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"fastrnn.build_cell: {header} does not compile\n{done.stdout}")
    if verbose:
        print(done.stdout, end="")
