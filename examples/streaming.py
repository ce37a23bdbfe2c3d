# SPDX-License-Identifier: BSD-3-Clause
"""Streaming: audio comes frame by frame, the state is carried from chunk to chunk, and the bits are those of the whole.

A model learns to hear chirps (tones that rise) in noise, where steady tones are there to mislead: one frame does not
tell the two apart, what came before does. The audio is made on the spot, its features are the energies of 20 bands
in a window of 32 ms, every 10 ms. After a short training the program listens to a stream as a microphone would hand it
over, chunk by chunk; shows what it marked; says how long a chunk took from samples to answer; and compares the outputs
of the recurrent layers, bit by bit, with those of one call over the whole stream.

    python examples/streaming.py                     # ten seconds
    python examples/streaming.py --cell lstm --layers 2 --chunk 5

Shapes in the comments: T frames, B recordings, F bands, H hidden units.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

import fastrnn

CELLS = {"lstm": fastrnn.LSTM, "gru": fastrnn.GRU, "rnn": fastrnn.RNN}
RATE = 8000  # samples per second
HOP = 80  # samples per frame: 10 ms
WINDOW = 256  # samples that a frame looks back on: 32 ms
BANDS = 20  # F
FRAMES_PER_SECOND = RATE // HOP

State = Tensor | tuple[Tensor, Tensor] | None  # [L, B, H], a pair (h, c) of them for the LSTM, or the beginning


def make_audio(seconds: float, recordings: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise with a chirp or a steady tone in every second: samples [B, RATE * seconds], is-chirp [B, T]."""
    frames = round(seconds * FRAMES_PER_SECOND)
    audio = torch.randn(recordings, frames * HOP, generator=generator)
    label = torch.zeros(recordings, frames)
    for row in range(recordings):
        for second in range(int(seconds)):
            rising, start, length, low, high = torch.rand(5, generator=generator).tolist()
            length = 0.3 + 0.3 * length  # seconds
            first = round((second + start * (1 - length)) * FRAMES_PER_SECOND)
            count = round(length * FRAMES_PER_SECOND)
            at = torch.arange(count * HOP) / RATE
            low, high = 500 + 1000 * low, 2000 + 1500 * high  # Hz
            is_chirp = rising < 0.5
            frequency = low + (high - low) * at / length if is_chirp else torch.full_like(at, (low + high) / 2)
            tone = torch.sin(2 * math.pi * torch.cumsum(frequency, 0) / RATE)
            audio[row, first * HOP : (first + count) * HOP] += 1.5 * tone
            label[row, first : first + count] = is_chirp
    return audio, label


class BandEnergies:
    """The features of a stream: takes any number of whole frames of samples, keeps the tail that the next window needs.

    Log energies of F bands, a quarter of an octave wide, scaled to about [-1, 1].
    """

    def __init__(self, recordings: int) -> None:
        self.tail = torch.zeros(recordings, WINDOW - HOP)
        self.taper = torch.hann_window(WINDOW)
        edges = torch.logspace(math.log10(4), math.log10(WINDOW // 2), BANDS + 1).round()
        line = torch.arange(WINDOW // 2 + 1).unsqueeze(1)
        upper = torch.maximum(edges[1:], edges[:-1] + 1)
        self.bands = ((line >= edges[:-1]) & (line < upper)).float()  # [lines of the spectrum, F]

    def __call__(self, samples: Tensor) -> Tensor:
        """Samples [B, n * HOP] that follow those of the call before; features [n, B, F]."""
        known = torch.cat([self.tail, samples], dim=1)
        self.tail = known[:, -(WINDOW - HOP) :]
        windows = known.unfold(1, WINDOW, HOP) * self.taper
        energy = torch.fft.rfft(windows).abs().square() @ self.bands
        return (0.25 * torch.log(energy + 1e-3) - 1.0).transpose(0, 1)


class Listener(nn.Module):
    """Features [T, B, F] -> the logit of "this is a chirp" for every frame [T, B]; reads forward only."""

    def __init__(self, cell: str, hidden: int, layers: int) -> None:
        super().__init__()
        self.recurrent = CELLS[cell](BANDS, hidden, num_layers=layers)
        self.head = nn.Linear(hidden, 1)

    def forward(self, features: Tensor, state: State = None) -> tuple[Tensor, Tensor, State]:
        """The logits, the outputs of the recurrent layers [T, B, H], and the state for the next chunk."""
        y, state = self.recurrent(features, state)
        return self.head(y).squeeze(2), y, state


def train(model: Listener, options: argparse.Namespace) -> list[float]:
    """Trains on fresh recordings of 4 s, a batch of 16 at every step; the loss of every step."""
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr)
    generator = torch.Generator().manual_seed(options.seed)
    losses = []
    for step in range(options.steps):
        audio, label = make_audio(4, 16, generator)
        logits, _, _ = model(BandEnergies(16)(audio))
        loss = nn.functional.binary_cross_entropy_with_logits(logits, label.T)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 25 == 0 or step + 1 == options.steps:
            right = ((logits > 0) == (label.T > 0.5)).float().mean().item()
            print(f"step {step + 1:4}   loss {losses[-1]:.3f}   frames right {right:.3f}", flush=True)
    return losses


def listen(model: Listener, audio: Tensor, chunk: int) -> Iterator[tuple[Tensor, Tensor, Tensor, float]]:
    """Hands the samples [1, ...] over in chunks of so many frames, and yields for each chunk the features [n, 1, F],
    the logits [n, 1], the recurrent outputs [n, 1, H], and the seconds from samples to logits."""
    energies, state = BandEnergies(1), None
    for samples in audio.split(chunk * HOP, dim=1):
        start = time.perf_counter()
        features = energies(samples)
        logits, y, state = model(features, state)
        yield features, logits, y, time.perf_counter() - start


def timeline(marks: Tensor) -> str:
    """Marks [T] as a line with a character for every 50 ms."""
    return "".join("#" if part.float().mean() >= 0.5 else "." for part in marks.split(FRAMES_PER_SECOND // 20))


def show(model: Listener, options: argparse.Namespace) -> dict[str, float]:
    """Listens to a stream that the training never heard, and prints what came of it; the figures."""
    audio, label = make_audio(options.seconds, 1, torch.Generator().manual_seed(options.seed + 1))
    for _ in zip(range(20), listen(model, audio, options.chunk), strict=False):
        pass  # the first calls of a process fetch code and memory
    features, logits, outputs, seconds = zip(*listen(model, audio, options.chunk), strict=True)
    marks, truth = torch.cat(logits).squeeze(1) > 0, label[0] > 0.5
    _, whole, _ = model(torch.cat(features))
    figures = {
        "frames_right": (marks == truth).float().mean().item(),
        "always_no": (~truth).float().mean().item(),
        "bits_equal": float(torch.equal(torch.cat(outputs), whole)),
        "median": torch.tensor(seconds).median().item(),
        "slowest": torch.tensor(seconds).quantile(0.99).item(),
    }
    print("\n       a character is 50 ms; # is a chirp")
    for first in range(0, len(truth), 5 * FRAMES_PER_SECOND):
        part = slice(first, first + 5 * FRAMES_PER_SECOND)
        print(f"truth  {timeline(truth[part])}\nmodel  {timeline(marks[part])}\n")
    right, base = figures["frames_right"], figures["always_no"]
    print(f"frames right: {right:.3f} (never saying chirp: {base:.3f})")
    equal = "equal to" if figures["bits_equal"] else "DIFFERENT from"
    print(f"bits of the recurrent outputs: {equal} those of one call over all {len(truth)} frames")
    median, slowest = (1e6 * figures[name] for name in ("median", "slowest"))
    span = 1e6 * options.chunk * HOP / RATE
    print(
        f"latency of a chunk of {options.chunk}: median {median:.0f} us, 99 % below {slowest:.0f} us, of {span:.0f} us"
    )
    print(f"latency per frame: {median / options.chunk:.0f} us")
    return figures


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; leaves with a sentence on stderr and status 2 where they make no sense."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--cell", choices=list(CELLS), default="gru")
    add("--hidden", type=int, default=64, help="units per layer")
    add("--layers", type=int, default=1)
    add("--steps", type=int, default=150, help="training steps")
    add("--lr", type=float, default=0.01)
    add("--seconds", type=int, default=20, help="length of the stream that is listened to")
    add("--chunk", type=int, default=1, help="frames that are handed over at a time")
    add("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    for name, value in vars(options).items():
        if type(value) in (int, float) and name != "seed" and not 0 < value < math.inf:
            parser.error(f"--{name} must be above zero, got {value}")
    return options


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Trains, listens, and returns the figures with the first and the last loss."""
    options = parse_options(argv)
    torch.manual_seed(options.seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a frame is too little work for two
    try:
        model = Listener(options.cell, options.hidden, options.layers)
        print(f"{options.cell.upper()} {options.layers} x {options.hidden}, {BANDS} bands, a frame every 10 ms")
        losses = train(model, options)
        with torch.inference_mode():
            figures = show(model.eval(), options)
    finally:
        torch.set_num_threads(threads)
    return {"first_loss": losses[0], "last_loss": losses[-1], **figures}


if __name__ == "__main__":
    main()
    sys.exit(0)
