# SPDX-License-Identifier: BSD-3-Clause
"""examples/streaming.py in short runs: it learns, and a stream in chunks has the bits of the whole."""

from __future__ import annotations

import types

import pytest
import torch
from load_example import load_example

SHORT = ["--hidden", "24", "--steps", "30", "--seconds", "3"]


@pytest.fixture(scope="module")
def streaming() -> types.ModuleType:
    return load_example("streaming")


@pytest.mark.parametrize(("cell", "layers", "chunk"), [("gru", 1, 1), ("lstm", 2, 7), ("rnn", 1, 40)])
def test_run_learns_and_prints_latency(streaming, cell, layers, chunk, capsys, compiled):
    options = ["--cell", cell, "--layers", str(layers), "--chunk", str(chunk)]
    figures = streaming.main([*SHORT, *options])
    assert figures["last_loss"] < 0.95 * figures["first_loss"]
    assert figures["bits_equal"] == 1
    assert 0 < figures["median"] <= figures["slowest"]
    printed = capsys.readouterr().out
    assert "latency per frame" in printed
    assert "equal to those of one call over all 300 frames" in printed


@pytest.mark.parametrize("sizes", [[1] * 30, [7, 1, 22], [30]], ids=["frames", "mixed", "whole"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_chunks_have_the_bits_of_the_whole(streaming, cell, sizes, compiled):
    torch.manual_seed(0)
    model = streaming.Listener(cell, 40, 2)
    features = torch.randn(30, 3, streaming.BANDS)
    with torch.inference_mode():
        _, whole, last = model(features)
        state, parts = None, []
        for part in features.split(sizes):
            _, y, state = model(part, state)
            parts.append(y)
    assert torch.equal(torch.cat(parts), whole)
    assert all(map(torch.equal, state, last)) if cell == "lstm" else torch.equal(state, last)


def test_features_do_not_depend_on_chunks(streaming):
    audio, label = streaming.make_audio(1, 2, torch.Generator().manual_seed(0))
    assert audio.shape == (2, streaming.RATE)
    whole = streaming.BandEnergies(2)(audio)
    assert whole.shape == (label.shape[1], 2, streaming.BANDS)
    energies = streaming.BandEnergies(2)
    parts = [energies(samples) for samples in audio.split(3 * streaming.HOP, dim=1)]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_every_line_of_the_spectrum_is_in_one_band(streaming):
    bands = streaming.BandEnergies(1).bands
    assert (bands.sum(0) >= 1).all()
    assert (bands[4 : streaming.WINDOW // 2].sum(1) == 1).all()


@pytest.mark.parametrize("options", ["--chunk 0", "--lr nan", "--cell transformer"])
def test_bad_options_are_refused(streaming, options, capsys):
    with pytest.raises(SystemExit) as stop:
        streaming.main(options.split())
    assert stop.value.code == 2
    assert options.split()[0] in capsys.readouterr().err
