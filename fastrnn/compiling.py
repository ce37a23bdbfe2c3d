# SPDX-License-Identifier: BSD-3-Clause
"""fullgraph(): lets torch.compile trace through fastrnn's modules; for users."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def fullgraph() -> Iterator[None]:
    """Inside the block torch.compile takes fastrnn's modules into its graph instead of breaking it at each of them.

    Dynamo refuses every subclass of torch.nn.LSTM, GRU and RNN unless torch._dynamo.config.allow_rnn is set, which
    this does, and undoes at the end. A function is compiled when it is called, not when torch.compile is, so the calls
    belong into the block:

        model = torch.compile(model, fullgraph=True)
        with fastrnn.fullgraph():
            y = model(x)

    Later calls that need no compilation may stand outside. The functional form and the cells need no block.
    """
    import torch._dynamo  # takes a second to import, so not before it is needed

    with torch._dynamo.config.patch(allow_rnn=True):
        yield
