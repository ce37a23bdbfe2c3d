# SPDX-License-Identifier: BSD-3-Clause
"""What can be said of csrc/cuda without a GPU; `make lint` and .ci/run call it. Without nvcc it says so and passes.

Every .cu compiles for ARCHITECTURES with warnings as errors; ptxas's report of registers is printed, and a spill or a
stack frame is a fault; neither the PTX nor, where cuobjdump can show it, the machine code has local memory, and the
wide kernels load and store 16 bytes at a time; there are at most MOST_KERNELS of them for an architecture. device.cpp,
the one file that needs torch's CUDA headers, passes a syntax check against those of the torch at hand, which a CPU
build has too. The headers of cuBLAS and its like that torch includes, but the toolkit at hand may lack, are replaced by
the few declarations below.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = {"sm_80": "compute_80", "sm_90a": "compute_90a"}
NVCC = ["nvcc", "-std=c++20", "-O3", "-fmad=false", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror"]
MOST_KERNELS = 60
# Used by every kernel of four units: loads of 16 bytes, stores of 16 bytes.
WIDE = re.compile(r"(Cell|Project)(Forward|Backward)I.*Li4E")

OPAQUE = {
    "cusparse.h": "typedef struct cusparseContext* cusparseHandle_t; typedef int cusparseStatus_t;",
    "cublasLt.h": "typedef struct cublasLtContext* cublasLtHandle_t;",
    "cusolverDn.h": "typedef struct cusolverDnContext* cusolverDnHandle_t;",
    "cusolver_common.h": "typedef int cusolverStatus_t;",
    "cublas_v2.h": """
#include <cuda_runtime_api.h>
#include <library_types.h>
typedef struct cublasContext* cublasHandle_t;
typedef enum { CUBLAS_STATUS_SUCCESS = 0 } cublasStatus_t;
typedef enum { CUBLAS_OP_N = 0, CUBLAS_OP_T = 1 } cublasOperation_t;
typedef enum { CUBLAS_DEFAULT_MATH = 0, CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION = 16 } cublasMath_t;
typedef enum { CUBLAS_COMPUTE_32F = 68, CUBLAS_COMPUTE_32F_FAST_TF32 = 77, CUBLAS_COMPUTE_64F = 70 }
    cublasComputeType_t;
typedef enum { CUBLAS_GEMM_DEFAULT = -1 } cublasGemmAlgo_t;
cublasStatus_t cublasGetMathMode(cublasHandle_t, cublasMath_t*);
cublasStatus_t cublasSetMathMode(cublasHandle_t, cublasMath_t);
cublasStatus_t cublasGemmStridedBatchedEx(
    cublasHandle_t, cublasOperation_t, cublasOperation_t, int m, int n, int k, const void* alpha, const void* A,
    cudaDataType Atype, int lda, long long strideA, const void* B, cudaDataType Btype, int ldb, long long strideB,
    const void* beta, void* C, cudaDataType Ctype, int ldc, long long strideC, int batchCount,
    cublasComputeType_t computeType, cublasGemmAlgo_t algo);
""",
}


def run(command: list[str]) -> str:
    """The output of a command, which must succeed."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"check_cuda: {' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def short(mangled: str) -> str:
    """A kernel's name as a reader wants it: CellForward Lstm float 4."""
    words = re.findall(r"(Begin|Cell|Project|End|Sum)(Forward|Backward|Rows|Parts)", mangled)
    cell = re.search(r"(4Lstm|3Gru|4Tanh|4Relu)", mangled)
    scalar = "double" if re.search(r"(Relu|Tanh)?E*d(Li|E)", mangled) else "float"
    width = re.search(r"Li(\d)E", mangled)
    name = "".join(words[0]) if words else "check"
    return " ".join(filter(None, [name, cell and cell[1][1:], words and scalar, words and width and width[1]]))


def allowed(kernel: str) -> int:
    """Bytes of local memory that a kernel may have: the arguments of the assertion on lengths; and the division of
    doubles is a call in the machine code, around which a register or two are kept there."""
    return 64 if kernel == "check" else 16 if "double" in kernel else 0


def check_registers(report: str, architecture: str) -> list[str]:
    """The kernels of one architecture, each with its registers printed; exits where one spills."""
    kernels = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        report,
        re.DOTALL,
    )
    for name, frame, stores, loads, registers in kernels:
        print(f"check_cuda: {architecture:7} {registers:>3} registers  {short(name)}")
        if max(int(frame), int(stores), int(loads)) > allowed(short(name)):
            sys.exit(f"check_cuda: {short(name)} spills on {architecture}: frame {frame}, {stores} and {loads} bytes")
    return [name for name, *_ in kernels]


def check_code(listing: str, start: str, accesses: tuple[str, str], local: str, where: str) -> None:
    """Exits where a kernel of a listing uses local memory, or a wide one has no load or no store of 16 bytes."""
    functions = re.split(start, listing)[1:]
    for function in functions:
        name, code = function.split("\n", 1)
        if allowed(short(name)) == 0 and re.search(local, code):
            sys.exit(f"check_cuda: {short(name)} uses local memory in {where}")
        if WIDE.search(name):
            for access in accesses:
                if access not in code:
                    sys.exit(f"check_cuda: {short(name)} has no {access} in {where}")
    print(f"check_cuda: {where} read, {len(functions)} kernels")
    if not functions:
        sys.exit(1)


def check_kernels(folder: str) -> None:
    for architecture, virtual in ARCHITECTURES.items():
        count = 0
        for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
            output = f"{folder}/{source.stem}.{architecture}.cubin"
            target = ["-gencode", f"arch={virtual},code={architecture}"]
            report = run([*NVCC, *target, "-Xptxas", "-v", "-cubin", str(source), "-o", output])
            count += len(check_registers(report, architecture))
            if shutil.which("cuobjdump"):
                listing = run(["cuobjdump", "-sass", output])
                sass = ("LDG.E.128", "STG.E.128"), r"\b(LDL|STL)\b"
                check_code(listing, r"\n\s*Function : ", *sass, f"the machine code for {architecture}")
            else:
                print("check_cuda: machine code not read, cuobjdump is not on the PATH")
            run([*NVCC, "-gencode", f"arch={virtual},code={virtual}", "-ptx", str(source), "-o", output])
            ptx = ("ld.global.v4.f32", "st.global.v4.f32"), r"\.local\b"
            check_code(Path(output).read_text(), r"\n(?:\.visible )?\.entry ", *ptx, f"the PTX for {virtual}")
        print(f"check_cuda: {count} kernels for {architecture}, at most {MOST_KERNELS}; no spill")
        if not 0 < count <= MOST_KERNELS:
            sys.exit(1)


def check_device(folder: str) -> None:
    toolkit = Path(shutil.which("nvcc") or "").resolve().parent.parent
    headers = [toolkit / "include", toolkit / "cuda/include", Path("/usr/local/cuda/include")]
    for name, text in OPAQUE.items():
        if not any((path / name).exists() for path in headers):
            (Path(folder) / name).write_text(f"#pragma once\n{text}\n")
    include = Path(torch.__file__).parent / "include"
    command = [
        "c++",
        "-std=c++20",
        "-fsyntax-only",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-DC10_USING_CUSTOM_GENERATED_MACROS",
    ]
    command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}", f"-I{folder}"]
    for path in (include, include / "torch/csrc/api/include", *headers):
        command += ["-isystem", str(path)]
    run([*command, "csrc/cuda/device.cpp"])
    print("check_cuda: device.cpp passes a syntax check")


def main() -> None:
    """Exits with 1 and a sentence at the first fault."""
    if shutil.which("nvcc") is None:
        print("check_cuda: skipped: nvcc is not on the PATH")
        return
    with tempfile.TemporaryDirectory() as folder:
        check_device(folder)
        check_kernels(folder)


if __name__ == "__main__":
    main()
