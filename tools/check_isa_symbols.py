# SPDX-License-Identifier: BSD-3-Clause
"""Fails when a weak symbol of an ISA object is defined in another object too.

The linker keeps one definition of a weak symbol, whichever comes first: were it the AVX-512 one, a function shared with
portable code would stop a machine without AVX-512. Run by `make lint`.
"""

import sys

from isa_objects import isa_objects, objects, symbols

WEAK = set("WwVvu")


def main() -> None:
    """Prints each clash; exits with 1 if there is one."""
    definitions = {path: symbols(path) for path in objects()}
    clashes = list[str]()
    for path in isa_objects():
        weak = {symbol.name for symbol in definitions[path] if symbol.kind in WEAK}
        for other, defined in definitions.items():
            shared = weak & {symbol.name for symbol in defined} if other != path else set()
            clashes += [f"{path.name} and {other.name} both define {name}" for name in sorted(shared)]
    print(*clashes, f"check_isa_symbols: {len(isa_objects())} ISA objects, {len(clashes)} shared symbols", sep="\n")
    sys.exit(bool(clashes))


if __name__ == "__main__":
    main()
