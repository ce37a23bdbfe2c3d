# SPDX-License-Identifier: BSD-3-Clause
"""Fails when a register tile keeps vectors in memory: reads the disassembly of every loop that multiplies and adds.

Run by `make lint`; `python tools/check_spills.py OBJECT...` looks at other objects. Three things are wrong in the
innermost loop of a matrix product: a whole zmm or ymm moved to or from the stack (a spill), one stored at all (an
array of accumulators that was not taken apart), unless the tile packs as it goes, and more loads than the tile has
rows and vectors of weights (a vector read again for every row). Other loops with fused multiply-adds (the math of a
cell) are printed alone: a constant that the compiler spills there costs little. Tiles of AMX are named in the code: no
compiler moves them.
"""

import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from isa_objects import isa_objects

FUNCTION = re.compile(r"^[0-9a-f]+ <(?P<name>.+)>:$")
INSTRUCTION = re.compile(r"^\s*(?P<address>[0-9a-f]+):\s+(?P<text>\S.*?)\s*$")
JUMP = re.compile(r"^j\w+\s+(?P<target>[0-9a-f]+)\b")
MEMORY = re.compile(r"(?:-?0x[0-9a-f]+)?\((?P<base>%\w+)?(?:,%\w+)?(?:,\d)?\)(?P<element>\{1to\d+\})?")
VECTOR = re.compile(r"%[yz]mm")
MULTIPLY_ADDS = ("vfmadd", "vfnmadd", "vfmsub", "vfnmsub", "vdpbf16ps")
SIZES = re.compile(r"\b(?:dot_)?tile<(?:[^,]*, )?(?P<rows>\d+), (?P<vectors>\d+)(?:, (?P<panels>\d+))?>")
PACKS = re.compile(r"\bdirect_tile<.*, true, [\w:]+>")
FRAME = re.compile(r"^mov\s+%rsp,%rbp$")


class Instruction(NamedTuple):
    """One line of the disassembly."""

    address: int
    text: str

    @property
    def has_vector(self) -> bool:
        return VECTOR.search(self.text) is not None

    @property
    def is_fma(self) -> bool:
        return self.text.startswith(MULTIPLY_ADDS) and self.has_vector

    @property
    def is_load(self) -> bool:
        return self.has_vector and MEMORY.search(self.text) is not None and not self.is_store

    @property
    def is_store(self) -> bool:
        return self.text.startswith("v") and self.has_vector and re.search(r"\)(\{%k\d\})?$", self.text) is not None

    @property
    def is_element(self) -> bool:
        """Reads one element into all lanes; constants of the code (%rip) do not count."""
        memory = MEMORY.search(self.text)
        return memory is not None and memory["base"] != "%rip" and ("broadcast" in self.text or bool(memory["element"]))

    def touches_stack(self, stack: set[str]) -> bool:
        """Moves a whole vector between a register and the stack, or computes on one that lies there."""
        memory = MEMORY.search(self.text)
        whole = memory is not None and not memory["element"] and "broadcast" not in self.text and self.has_vector
        return whole and memory is not None and memory["base"] in stack


def functions(path: Path) -> Iterator[tuple[str, list[Instruction]]]:
    """Every function of an object with its instructions."""
    command = ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", str(path)]
    name, body = "", list[Instruction]()
    for line in subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines():
        if header := FUNCTION.match(line):
            if body:
                yield name, body
            name, body = header["name"], []
        elif found := INSTRUCTION.match(line):
            body.append(Instruction(int(found["address"], 16), found["text"].split(" <")[0].split("#")[0].strip()))
    if body:
        yield name, body


def innermost_loops(body: list[Instruction]) -> Iterator[list[Instruction]]:
    """The stretches between a jump backwards and its target that hold no smaller one."""
    ends = dict[int, int]()
    for instruction in body:
        jump = JUMP.match(instruction.text)
        if jump and body[0].address <= (target := int(jump["target"], 16)) <= instruction.address:
            ends[target] = max(ends.get(target, 0), instruction.address)
    for start, end in ends.items():
        if not any(start <= other and last <= end and (start, end) != (other, last) for other, last in ends.items()):
            yield [instruction for instruction in body if start <= instruction.address <= end]


def is_product(name: str, loop: list[Instruction]) -> bool:
    """A matrix product: the loop of a tile, or any other that broadcasts elements from memory."""
    return "tile<" in name or any(line.is_element for line in loop)


def most_loads(name: str) -> float:
    """Of a step of the tile of this name: an element of each row, and each vector of weights. No bound for others."""
    sizes = SIZES.search(name)
    if not sizes or "direct_tile" in name:
        return math.inf
    return int(sizes["rows"]) + int(sizes["vectors"]) * int(sizes["panels"] or 1)


def short(name: str) -> str:
    """The function's name without namespaces and parameters."""
    return re.sub(r"\(anonymous namespace\)::|\bfastrnn::(cpu::)?|^void ", "", name).partition("(")[0]


def check(path: Path) -> tuple[int, int]:
    """Prints the loops of one object; the number of matrix products among them, and of those that have a fault."""
    products = bad = 0
    for name, body in functions(path):
        packs = PACKS.search(name) is not None
        stack = {"%rsp"} | ({"%rbp"} if any(FRAME.match(instruction.text) for instruction in body) else set())
        for loop in innermost_loops(body):
            if not (fmas := sum(line.is_fma for line in loop)):
                continue
            product = is_product(name, loop)
            wrong = [line for line in loop if line.touches_stack(stack) or (product and line.is_store and not packs)]
            loads = sum(line.is_load for line in loop)
            again = loads > most_loads(name)
            products, bad = products + product, bad + (product and (bool(wrong) or again))
            verdict = "SPILL" if product and wrong else "AGAIN" if again else "ok"
            counts = f"{fmas:3} fma {loads:3} loads {len(loop):4} instructions"
            kind = "product" if product else "other"
            print(f"{verdict:5} {kind:7} {counts} {len(wrong):2} in memory  {short(name)}")
            if verdict == "SPILL":
                print(*(f"      {line.address:x}: {line.text}" for line in wrong), sep="\n")
    return products, bad


def main() -> None:
    """Checks the given objects, else every AVX2 and AVX-512 object; exits with 1 when one has a fault."""
    paths = [Path(argument) for argument in sys.argv[1:]]
    paths = paths or [path for path in isa_objects() if path.stem.startswith("avx")]
    if not paths:
        print("check_spills: no AVX2 or AVX-512 object in this build")
    failed = False
    for path in paths:
        products, bad = check(path)
        print(f"check_spills: {path.name}: {products} matrix products, {bad} with vectors in memory or read again")
        failed |= bad > 0 or not products
    sys.exit(failed)


if __name__ == "__main__":
    main()
