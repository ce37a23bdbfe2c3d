# SPDX-License-Identifier: BSD-3-Clause
"""fastrnn: LSTM, GRU and RNN layers for PyTorch, a whole sequence in one kernel; drop-in for torch.nn's modules."""

from . import functional, reference
from .cells import GRUCell, LSTMCell, RNNCell
from .compiling import fullgraph
from .conversion import Conversion, convert, patch, revert
from .explanation import explain
from .modules import GRU, LSTM, RNN
from .prepacking import prepacked
from .tiers import cuda_tier

__version__ = "0.1.0"

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Conversion",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "__version__",
    "convert",
    "cuda_tier",
    "explain",
    "fullgraph",
    "functional",
    "patch",
    "prepacked",
    "reference",
    "revert",
]
