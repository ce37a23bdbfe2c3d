# SPDX-License-Identifier: BSD-3-Clause
"""`python -m fastrnn info`, `python -m fastrnn check` and `python -m fastrnn bench [arguments]`."""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings

COMMANDS = {
    "info": "what this installation can do, and why not more",
    "check": "every cell against torch.nn and float64, in seconds; exit code 1 where the kernels are wrong or missing",
    "bench": "the benchmark; python -m fastrnn bench --help shows its arguments",
}
USAGE = "usage: python -m fastrnn <command> [arguments]\n\ncommands:\n" + "\n".join(
    f"  {name:<7} {does}" for name, does in COMMANDS.items()
)


def main(argv: list[str]) -> int:
    """Runs one command; returns the exit status.

    Raises:
        SystemExit: --help, or arguments that the command does not have; as argparse does.
    """
    command, arguments = (argv[0], argv[1:]) if argv else ("", [])
    if command == "bench":
        return importlib.import_module("fastrnn.bench.__main__").main(arguments) or 0
    if command in COMMANDS:
        argparse.ArgumentParser(f"python -m fastrnn {command}", description=COMMANDS[command]).parse_args(arguments)
    if command == "info":
        from . import info

        return info.main()
    if command == "check":
        return _check()
    if command == "--version":
        from . import __version__

        print(f"fastrnn {__version__}")
        return 0
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    print(
        f"{USAGE}\n\nfastrnn: {f'unknown command {command!r}' if command else 'a command is missing'}", file=sys.stderr
    )
    return 2


def _check() -> int:
    from . import extension

    if extension.module is None:
        print(f"fastrnn check: no kernels to check: {extension.reason}. {extension.ADVICE}", file=sys.stderr)
        return 1
    with warnings.catch_warnings():
        # torch.nn says so of its own LSTM with a projection
        warnings.filterwarnings("ignore", message="LSTM with projections is not supported with oneDNN")
        _, right = importlib.import_module("fastrnn.bench.__main__").run_check()
    isa = extension.module.isa()
    print(f"fastrnn check: {'passed' if right else 'FAILED, see WRONG above'} ({isa})")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
