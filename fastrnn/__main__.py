# SPDX-License-Identifier: BSD-3-Clause
"""`python -m fastrnn info` and `python -m fastrnn bench [arguments]`."""

from __future__ import annotations

import importlib
import sys

USAGE = """usage: python -m fastrnn <command> [arguments]

commands:
  info    what this installation can do, and a self-test against torch.nn
  bench   the benchmark; python -m fastrnn bench --help shows its arguments"""


def main(argv: list[str]) -> int:
    """Runs one command; returns the exit status."""
    command, arguments = (argv[0], argv[1:]) if argv else ("", [])
    if command == "info":
        from . import info

        return info.main()
    if command == "bench":
        return importlib.import_module("fastrnn.bench.__main__").main(arguments) or 0
    print(USAGE, file=sys.stdout if command in ("-h", "--help") else sys.stderr)
    return 0 if command in ("-h", "--help") else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
