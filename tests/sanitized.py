# SPDX-License-Identifier: BSD-3-Clause
"""Every cell once, forward and backward, on small sizes: the program that compute-sanitizer watches in test_cuda.py.

python tests/sanitized.py cuda
"""

from __future__ import annotations

import sys

import torch

import fastrnn

SIZES = ((3, 2, 5, 7), (2, 9, 16, 33))  # T, B, I, H
DTYPES = (torch.float32, torch.bfloat16)


def main(device: str) -> None:
    """Prints the number of calls; an error of a kernel is raised."""
    calls = 0
    for kind in ("LSTM", "GRU", "RNN"):
        for dtype in DTYPES:
            for T, B, inputs, units in SIZES:
                layer = getattr(fastrnn, kind)(inputs, units, num_layers=2, bidirectional=True)
                layer = layer.to(device=device, dtype=dtype)
                x = torch.randn(T, B, inputs, device=device, dtype=dtype, requires_grad=True)
                lengths = torch.randint(1, T + 1, (B,))
                for given in (None, lengths):
                    y, _ = layer(x, lengths=given)
                    y.float().square().sum().backward()
                    calls += 1
    if device != "cpu":
        torch.cuda.synchronize()
    print(f"{calls} calls")


if __name__ == "__main__":
    main(sys.argv[1])
