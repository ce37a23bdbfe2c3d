# SPDX-License-Identifier: BSD-3-Clause
"""The benchmark: `python -m fastrnn bench`, or `make bench` in a checkout. It uses fastrnn's public API only.

shapes.py says what is measured and why, peers.py who is measured, check.py what counts as the right numbers, runner.py
how it is timed, machine.py on what, report.py how it is shown.
"""
