# SPDX-License-Identifier: BSD-3-Clause
"""fastrnn: LSTM, GRU and RNN layers for PyTorch, a whole sequence in one kernel; drop-in for torch.nn's modules."""

from . import functional, reference
from .cells import GRUCell, LSTMCell, RNNCell
from .compiling import fullgraph
from .conversion import Conversion, convert, patch, revert
from .explanation import explain
from .modules import GRU, LSTM, RNN
from .own_builds import build_cell, get_include
from .own_cells import OwnCell, load_cell
from .own_modules import CellModule
from .prepacking import prepacked
from .tiers import cuda_tier

__version__ = "0.1.0"

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "CellModule",
    "Conversion",
    "GRUCell",
    "LSTMCell",
    "OwnCell",
    "RNNCell",
    "__version__",
    "build_cell",
    "convert",
    "cuda_tier",
    "explain",
    "fullgraph",
    "functional",
    "get_include",
    "load_cell",
    "patch",
    "prepacked",
    "reference",
    "revert",
]
