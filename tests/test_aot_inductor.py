# SPDX-License-Identifier: BSD-3-Clause
"""torch._inductor.aoti_compile_and_package: a model that holds fastrnn's modules as a library of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import fastrnn

pytestmark = [
    pytest.mark.usefixtures("compiled"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning", "ignore:.*LeafSpec:FutureWarning"),
]


class Tagger(nn.Module):
    """One layer after another of every kind, both directions of the first: [T, B, 4] -> [T*B, 5] and its h_n [B, 5].
    The shapes that the compiler was told of the layers' outputs stand in the views of them."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = fastrnn.LSTM(4, 3, bidirectional=True)
        self.gru = fastrnn.GRU(6, 5)
        self.rnn = fastrnn.RNN(5, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, h_n = self.rnn(self.gru(self.lstm(x)[0])[0])
        return y.flatten(0, 1), h_n.flatten(0, 1)


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="there is no C++ compiler")
def test_a_library_has_the_bits_of_the_model_at_any_length_and_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch.manual_seed(0)
    model = Tagger().eval()
    dims = {0: Dim("T", min=2, max=512), 1: Dim("B", min=2, max=512)}
    # Its code is a list of calls, for which the optimiser and headers compiled ahead are wasted: 15 s instead of 50.
    quick = {
        "aot_inductor.compile_wrapper_opt_level": "O0",
        "aot_inductor.precompile_headers": False,
        "cpp_cache_precompile_headers": False,
    }
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(5, 3, 4),), dynamic_shapes=(dims,))
        library = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "tagger.pt2"), inductor_configs=quick
        )
        run = torch._inductor.aoti_load_package(library)
        for T, B in ((5, 3), (9, 2)):
            x = torch.randn(T, B, 4)
            for found, expected in zip(run(x), model(x), strict=True):
                assert torch.equal(found, expected)
