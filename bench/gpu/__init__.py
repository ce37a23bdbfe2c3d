# SPDX-License-Identifier: BSD-3-Clause
"""The benchmark on a GPU: `python -m bench.gpu` in a checkout, or `make gpu-bench`; docs/gpu-benchmarks.md is its page.

shapes.py says what is measured and in which order, contenders.py who takes part, backend.py how a device is timed and a
call captured, cudnn.py which of cuDNN's algorithms PyTorch takes, floor.py what the card would allow, runner.py puts a
row together, report.py and picture.py show it. It needs no extension: without fastrnn's kernels for CUDA it measures
torch.nn alone. With `--device cpu` the same code runs on small sizes on the CPU, which measures nothing and tests it.
"""
