# SPDX-License-Identifier: BSD-3-Clause
"""Builds fastrnn._C with ninja: every C++ file with its own flags, again when the file, a header or a flag changed.

Environment: CXX, the compiler (c++); MAX_JOBS; FASTRNN_WERROR=1, warnings are errors; FASTRNN_CUDA=1 insists on CUDA,
0 forbids it, else it is built where nvcc and a CUDA torch are; TORCH_CUDA_ARCH_LIST, as torch's own extensions read it.
Everything else about the package stands in pyproject.toml.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

try:
    import torch
except ImportError:
    sys.exit(
        "fastrnn is compiled against the torch that it will run with, and this Python has none: "
        "type `pip install torch setuptools ninja && pip install --no-build-isolation .`"
    )
if torch.__version__ < (2, 11):
    sys.exit(f"fastrnn needs torch >= 2.11, and this is torch {torch.__version__}: type `pip install --upgrade torch`")
if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(f"fastrnn needs setuptools >= 77, and this is {setuptools.__version__}: type `pip install -U setuptools`")

ROOT = Path(__file__).parent.resolve()
TORCH = Path(torch.__file__).parent
NINJA_DIR = Path("build/ninja")  # relative to ROOT, fixed: pip's own build directory changes from call to call
OPTIMIZE = "-O3"
CXX = os.environ.get("CXX", "c++")
CXX_FLAGS = [OPTIMIZE, "-std=c++20", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-fopenmp", "-fPIC"]
CXX_FLAGS += ["-Wall", "-Wextra", *(["-Werror"] if os.environ.get("FASTRNN_WERROR") == "1" else [])]
AVX512 = ["-mprfchw", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-Wno-uninitialized"]
# One line for each file of csrc/cpu/isa: what this file alone may use; never -march=native. Other machines: scalar.
ISA_FLAGS = {
    "scalar": [],
    "avx2": ["-mprfchw", "-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16"],
    "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
    "amx_parts": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}  # -Wno-uninitialized: GCC 12 warns of the undefined operands inside its own avx512fintrin.h
# The only files that see torch.
TORCH_SOURCES = [f"csrc/{name}.cpp" for name in ("ops", "module", "derivative", "own_cell", "prepacked")]
TORCH_SOURCES += [f"csrc/cpu/{name}.cpp" for name in ("layer", "half")]
TORCH_SOURCES += [f"csrc/{name}_call.cpp" for name in ("module", "layer", "cell", "direct")]
CUDA_SOURCES = [f"csrc/cuda/{name}" for name in ("device.cpp", "layer.cpp", "sweep.cpp", "kernels.cu")]
NVCC_FLAGS = ["-O3", "-std=c++20", "-fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
ARCHITECTURES = "8.0;8.6;8.9;9.0+PTX"


def sources_with_flags(cuda: bool) -> dict[str, list[str]]:
    """Every source of the extension and the flags that it gets beside CXX_FLAGS or NVCC_FLAGS."""
    headers = [TORCH / "include", TORCH / "include/torch/csrc/api/include", sysconfig.get_path("include")]
    if cuda:  # the toolkit's headers, and those of the packages that torch's wheel brings along, where cuBLAS is
        headers += [Path(shutil.which("nvcc") or "").resolve().parent.parent / "include"]
        headers += [*sorted(TORCH.parent.glob("nvidia/*/include")), Path("/usr/local/cuda/include")]
    torch_flags = [flag for path in headers for flag in ("-isystem", str(path))]
    torch_flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    torch_flags += ["-DTORCH_EXTENSION_NAME=_C", "-DTORCH_API_INCLUDE_EXTENSION_H"]
    sources = dict.fromkeys(TORCH_SOURCES, torch_flags)
    for path in sorted(ROOT.glob("csrc/cpu/*.cpp")):
        sources.setdefault(path.relative_to(ROOT).as_posix(), [])
    for path in sorted(ROOT.glob("csrc/cpu/isa/*.cpp")):
        if path.stem not in ISA_FLAGS:
            sys.exit(f"setup.py: csrc/cpu/isa/{path.name} has no line in ISA_FLAGS")
        if path.stem == "scalar" or platform.machine() in ("x86_64", "AMD64"):
            sources[path.relative_to(ROOT).as_posix()] = ISA_FLAGS[path.stem]
    if cuda:
        sources |= {path: architecture_flags() if path.endswith(".cu") else torch_flags for path in CUDA_SOURCES}
    return sources


def architecture_flags() -> list[str]:
    """What nvcc compiles for: machine code for each architecture of the list, and PTX for those with +PTX."""
    flags = []
    for entry in re.split(r"[;, ]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or ARCHITECTURES):
        found = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", entry)
        if found is None:
            sys.exit(f"fastrnn: TORCH_CUDA_ARCH_LIST must be numbers like {ARCHITECTURES}, got {entry!r}")
        number = found[1] + found[2]
        codes = f"[sm_{number},compute_{number}]" if found[3] else f"sm_{number}"
        flags += ["-gencode", f"arch=compute_{number},code={codes}"]
    return flags


def ninja_file(sources: dict[str, list[str]]) -> str:
    """The text of build.ninja; -MD lists torch's headers too, so that another torch in the same place rebuilds."""

    def quoted(arguments: list[str]) -> str:
        return shlex.join(arguments).replace("$", "$$")

    lines = [f"builddir = {NINJA_DIR}", f"cxx = {quoted(shlex.split(CXX))}", f"flags = {quoted(CXX_FLAGS)}"]
    lines += ["rule compile", "  command = $cxx -MD -MF $out.d $flags $own -c $in -o $out", "  deps = gcc"]
    lines += ["  depfile = $out.d", "  description = $cxx $in"]
    lines += ["rule link", "  command = $cxx -shared -fopenmp $in -o $out $libraries", "  description = link $out"]
    libraries = [f"-L{TORCH / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"]
    if CUDA_SOURCES[0] in sources:  # cuBLAS and the runtime are those that torch's libraries bring into the process
        lines += ["rule device", f"  command = nvcc -MD -MF $out.d {quoted(NVCC_FLAGS)} $own -c $in -o $out"]
        lines += ["  deps = gcc", "  depfile = $out.d", "  description = nvcc $in"]
        libraries += ["-lc10_cuda", "-ltorch_cuda"]
    objects = [f"{NINJA_DIR}/{os.path.splitext(source)[0]}.o" for source in sources]
    for target, (source, own) in zip(objects, sources.items(), strict=True):
        rule = "device" if source.endswith(".cu") else "compile"
        lines += [f"build {target}: {rule} {source}", f"  own = {quoted(own)}"]
    lines += [f"build {NINJA_DIR}/_C.so: link {' '.join(objects)}", f"  libraries = {quoted(libraries)}", ""]
    return "\n".join(lines)


def ninja_program() -> str:
    """The ninja of the Python package, which need not be on the PATH, else the machine's."""
    try:
        import ninja

        return os.path.join(ninja.BIN_DIR, "ninja")
    except ImportError:
        return shutil.which("ninja") or sys.exit("fastrnn is built with ninja: type `pip install ninja`")


def cuda_decision() -> tuple[bool, str]:
    """Whether CUDA is built, and a sentence for the log and for fastrnn/_build.py. It never looks for a GPU."""
    wish = os.environ.get("FASTRNN_CUDA")
    missing = "torch is built without CUDA" if torch.version.cuda is None else ""
    missing = missing or ("" if shutil.which("nvcc") else "nvcc is not on the PATH")
    if wish == "1" and missing:
        sys.exit(f"fastrnn: FASTRNN_CUDA=1, but {missing}")
    if missing or wish == "0":
        return False, f"not built: {'FASTRNN_CUDA=0' if wish == '0' else missing}"
    architectures = " ".join(flag for flag in architecture_flags() if flag != "-gencode")
    return True, f"built for torch's CUDA {torch.version.cuda}: {architectures}"


class NinjaBuild(build_ext):
    """Hands the one extension to ninja, and leaves fastrnn/_build.py beside it: what `_C` was built for."""

    def build_extension(self, ext: Extension) -> None:
        directory = ROOT / NINJA_DIR
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "build.ninja").write_text(ninja_file(sources_with_flags(cuda_decision()[0])))
        jobs = ["-j", os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))]
        if subprocess.run([ninja_program(), "-f", str(NINJA_DIR / "build.ninja"), *jobs], cwd=ROOT).returncode:
            hint = "; FASTRNN_CUDA=0 builds without CUDA" if cuda_decision()[0] else ""
            raise CompileError(f"a file of fastrnn does not compile; the compiler's message stands above{hint}")
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        # Replaced, not written over: a program that has the old one loaded keeps it.
        shutil.copy2(directory / "_C.so", output.with_suffix(".new"))
        os.replace(output.with_suffix(".new"), output)

    def run(self) -> None:
        cuda = cuda_decision()[1]
        print(f"fastrnn: CUDA {cuda}")
        super().run()
        built_for = [f"TORCH_VERSION = {str(torch.__version__)!r}", f"CXX11_ABI = {torch.compiled_with_cxx11_abi()}"]
        built_for += [f"FLAGS = {shlex.join([CXX, *CXX_FLAGS])!r}", f"ISA_FLAGS = {ISA_FLAGS!r}"]
        built_for += [f"CUDA = {cuda!r}", ""]
        text = "# SPDX-License-Identifier: BSD-3-Clause\n# Written by setup.py: what _C was built for.\n"
        path = Path(self.get_ext_fullpath("fastrnn._C")).with_name("_build.py")
        path.write_text(text + "\n".join(built_for))


setup(ext_modules=[Extension("fastrnn._C", TORCH_SOURCES)], cmdclass={"build_ext": NinjaBuild})
