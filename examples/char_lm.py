# SPDX-License-Identifier: BSD-3-Clause
"""A character language model, trained twice from the same seed: with torch.nn and with fastrnn.

The model reads program text one character at a time and predicts the next one: embedding -> LSTM, GRU or RNN -> linear.
The text is the source of Python's own standard library, so nothing is downloaded. Both models see the same batches in
the same order. The program prints both loss curves, how far they ever part, and the seconds per epoch of each, draws
them, and lets the model that fastrnn trained write: greedily, by temperature, and by beam search.

    python examples/char_lm.py --short                               # about a minute on two cores; part of `make bench`
    python examples/char_lm.py --cell gru --sampling consecutive     # the full size, the state carried between batches

Shapes in the comments: T time steps, B sequences, L layers, H hidden units, V characters of the alphabet.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

import fastrnn

LIBRARIES: dict[str, ModuleType] = {"torch.nn": nn, "fastrnn": fastrnn}
ALPHABET = 128  # V: ASCII
PICTURE = Path(__file__).resolve().parent.parent / "bench" / "results" / "char_lm.png"
SHORT = {"chars": 500_000, "layers": 1, "length": 160}
BIDIRECTIONAL = """--bidirectional is not for a language model: the backward direction has already read the character
to be predicted, so training would learn to copy it, with nothing to copy when the model writes"""

State = Tensor | tuple[Tensor, Tensor]  # [L, B, H]; a pair (h, c) of them for the LSTM
Batch = tuple[Tensor, Tensor]  # characters [T, B], and the character that follows each of them [T, B]


def library_text(chars: int) -> str:
    """The first `chars` characters of the standard library's public modules, in alphabetical order.

    Four spaces become one tab: most of them are indentation, which the model then writes in one step per level.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = ""
    for path in sorted(folder.glob("[a-z]*.py")):
        if len(text) >= chars:
            break
        text += path.read_text(encoding="utf-8", errors="replace").replace("    ", "\t")
    if len(text) < chars:
        raise ValueError(f"--chars: {folder} holds {len(text):,} characters of Python, {chars:,} were asked for")
    return text[:chars]


def encode(text: str) -> Tensor:
    """Characters -> their ASCII codes, int64 [len(text)]; any other character becomes a question mark."""
    return torch.frombuffer(bytearray(text, "ascii", "replace"), dtype=torch.uint8).to(torch.int64)


def decode(tokens: Tensor) -> str:
    """Codes [N] -> text, tabs as four spaces again, and a question mark for what cannot be printed."""
    text = "".join(map(chr, tokens.tolist())).replace("\t", "    ")
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def random_batches(text: Tensor, batch: int, steps: int, generator: torch.Generator) -> list[Batch]:
    """Random sampling: the text [N] is cut into windows of `steps` characters, and these are shuffled.

    They have no order, so each starts from a zero state. A random offset moves the cuts from epoch to epoch.
    """
    offset = int(torch.randint(steps, (), generator=generator))
    windows = (len(text) - 1 - offset) // steps
    starts = offset + steps * torch.randperm(windows, generator=generator)
    positions = [
        torch.arange(steps).unsqueeze(1) + group for group in starts.split(batch) if len(group) == batch
    ]  # each [T, B]
    return [(text[at], text[at + 1]) for at in positions]


def consecutive_batches(text: Tensor, batch: int, steps: int, generator: torch.Generator) -> list[Batch]:
    """Consecutive sampling: the text [N] becomes B long streams, and each batch goes on where the last one stopped.

    Sequence b of a batch continues sequence b of the batch before it, so the final state of one is the first state of
    the next. Here, too, the first cut is at a random offset.
    """
    offset = int(torch.randint(steps, (), generator=generator))
    length = (len(text) - 1 - offset) // batch
    inputs, targets = (text[at : at + batch * length].view(batch, length).t() for at in (offset, offset + 1))
    windows = [slice(at, at + steps) for at in range(0, length - steps + 1, steps)]
    return [(inputs[window], targets[window]) for window in windows]


SAMPLINGS = {"random": random_batches, "consecutive": consecutive_batches}


class CharacterModel(nn.Module):
    """Embedding -> recurrent layers -> linear.

    Args:
        library: torch.nn or fastrnn, whose recurrent layers to take: all that differs between the two programs.
        cell: "lstm", "gru" or "rnn".
    """

    def __init__(self, library: ModuleType, cell: str, embedding: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(ALPHABET, embedding)
        self.recurrent = getattr(library, cell.upper())(embedding, hidden, num_layers=layers)
        self.output = nn.Linear(hidden, ALPHABET)

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """tokens [T, B], state [L, B, H] or None for zeros -> logits [T, B, V] of the next character, final state."""
        y, state = self.recurrent(self.embedding(tokens), state)
        return self.output(y), state


def build(library: ModuleType, options: argparse.Namespace) -> tuple[CharacterModel, torch.optim.Optimizer]:
    """A new model and its optimizer. The same seed gives the same weights in either library."""
    torch.manual_seed(options.seed)
    model = CharacterModel(library, options.cell, options.embedding, options.hidden, options.layers)
    kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[options.optimizer]
    return model, kind(model.parameters(), lr=options.lr)


def map_state(function: Callable[[Tensor], Tensor], state: State) -> State:
    """`function` of the state, or of both halves of the LSTM's."""
    return (function(state[0]), function(state[1])) if isinstance(state, tuple) else function(state)


def batch_loss(model: CharacterModel, batch: Batch, state: State | None) -> tuple[Tensor, State]:
    """Cross entropy in nats per character, averaged over T and B (a scalar), and the final state."""
    logits, state = model(batch[0], state)
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch[1].flatten()), state


def train_epoch(
    model: CharacterModel, optimizer: torch.optim.Optimizer, batches: Iterable[Batch], *, carry: bool, clip: float
) -> list[float]:
    """One pass over the batches; the loss at every step, before its update.

    Args:
        carry: start each batch from the final state of the one before it (consecutive sampling). The state is detached:
            otherwise the gradient would go back, through all batches before, to the start of the epoch.
        clip: the gradient of all parameters together is scaled down to this norm where it is longer.
    """
    model.train()
    losses, state = [], None
    for batch in batches:
        loss, final = batch_loss(model, batch, state)
        state = map_state(Tensor.detach, final) if carry else None
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise ValueError(f"the loss is {losses[-1]} at step {len(losses)} of an epoch: try a smaller --lr")
    return losses


def perplexity(losses: Sequence[float]) -> float:
    """exp of the mean loss: among how many equally likely characters the model wavers. 1 is certainty."""
    return torch.tensor(losses, dtype=torch.float64).mean().exp().item()


@torch.inference_mode()
def evaluate(model: CharacterModel, text: Tensor, batch: int, steps: int) -> float:
    """Perplexity on a text [N], read in B streams with the state carried, whatever the sampling in training was."""
    model.eval()
    losses, state = [], None
    for part in consecutive_batches(text, batch, steps, torch.Generator().manual_seed(0)):
        loss, state = batch_loss(model, part, state)
        losses.append(loss.item())
    return perplexity(losses)


def watched(batches: list[Batch], label: str) -> Iterable[Batch]:
    """The batches, with a progress bar where tqdm is installed and the output is a terminal."""
    if find_spec("tqdm") is None:
        return batches
    from tqdm import tqdm

    return tqdm(batches, desc=label, unit="batch", leave=False, disable=None)


def train_both(options: argparse.Namespace, train: Tensor, held_out: Tensor) -> tuple[CharacterModel, dict]:
    """Trains both models, epoch by epoch in turns, so that a disturbance of the machine meets both.

    Returns the model of fastrnn; and, of each library, the loss of every step, perplexities and seconds of every epoch.
    """
    pairs = {name: build(library, options) for name, library in LIBRARIES.items()}
    model = pairs["fastrnn"][0]
    print(fastrnn.explain(model.recurrent, model.embedding(train[: options.steps].unsqueeze(1))))
    keys = ("loss", "train_perplexity", "held_out_perplexity", "seconds")
    curves: dict[str, dict[str, list[float]]] = {name: {key: [] for key in keys} for name in pairs}
    print("\n         perplexity (training, held out)       seconds")
    print("epoch      torch.nn         fastrnn       torch.nn   fastrnn")
    for epoch in range(options.epochs):
        generator = torch.Generator().manual_seed(options.seed + epoch)
        batches = SAMPLINGS[options.sampling](train, options.batch, options.steps, generator)
        for name in reversed(pairs) if epoch % 2 else pairs:
            model, optimizer = pairs[name]
            bar = watched(batches, f"epoch {epoch + 1}, {name}")
            start = time.perf_counter()
            losses = train_epoch(model, optimizer, bar, carry=options.sampling == "consecutive", clip=options.clip)
            seconds = time.perf_counter() - start
            row = (losses, [perplexity(losses)], [evaluate(model, held_out, options.batch, options.steps)], [seconds])
            for key, values in zip(keys, row, strict=True):
                curves[name][key] += values
        last = [[curve[key][-1] for key in keys[1:]] for curve in curves.values()]
        quality = "   ".join(f"{inside:6.3f} {outside:6.3f}" for inside, outside, _ in last)
        print(f"{epoch + 1:5}   {quality}   " + "".join(f"{seconds:10.2f}" for *_, seconds in last), flush=True)
    return pairs["fastrnn"][0], curves


def read(model: CharacterModel, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
    """Reads tokens [T, B] from `state`; log probabilities of the next character [B, V], and the final state."""
    logits, state = model(tokens, state)
    return logits[-1].log_softmax(-1), state


def stream(model: CharacterModel, prompt: str, length: int, choose: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    """Reads the prompt at once; then `length` times, `choose` makes a token [1] of log p [1, V], and that is read."""
    log_p, state = read(model, encode(prompt).unsqueeze(1))
    for _ in range(length):
        token = choose(log_p)
        yield token
        log_p, state = read(model, token.unsqueeze(0), state)


@torch.inference_mode()
def write_greedily(model: CharacterModel, prompt: str, length: int) -> str:
    """The most likely character, every time."""
    return decode(torch.cat(list(stream(model, prompt, length, lambda log_p: log_p.argmax(-1)))))


@torch.inference_mode()
def write_by_temperature(model: CharacterModel, prompt: str, length: int, temperature: float, seed: int) -> str:
    """A character drawn from p ** (1 / temperature), rescaled: below 1 safer than the model, above 1 bolder."""
    generator = torch.Generator().manual_seed(seed)

    def draw(log_p: Tensor) -> Tensor:
        return torch.multinomial((log_p / temperature).softmax(-1), 1, generator=generator).squeeze(1)

    return decode(torch.cat(list(stream(model, prompt, length, draw))))


@torch.inference_mode()
def write_by_beam_search(model: CharacterModel, prompt: str, length: int, width: int) -> tuple[str, float]:
    """The likeliest text that a search with `width` beams finds, and its log probability. Width 1 is greedy.

    The beams are the batch. Each step takes the `width` best of all continuations of all beams; a continuation inherits
    the state of its beam, so some beams have several heirs and others none.
    """
    log_p, state = read(model, encode(prompt).unsqueeze(1))  # [1, V]: all beams begin as one
    score = torch.zeros(1, dtype=torch.float64)  # a sum of hundreds of terms, which float32 would round into ties
    history = torch.empty(1, 0, dtype=torch.int64)  # [beams, characters so far]
    for _ in range(length):
        score, best = (score.unsqueeze(1) + log_p).flatten().topk(width)
        parent, token = best // ALPHABET, best % ALPHABET
        history = torch.cat([history[parent], token.unsqueeze(1)], dim=1)
        inherited = map_state(lambda half, parent=parent: half[:, parent], state)
        log_p, state = read(model, token.unsqueeze(0), inherited)
    return decode(history[0]), score[0].item()


def write_samples(model: CharacterModel, options: argparse.Namespace) -> dict[str, str]:
    """What the model writes after the prompt, in each of the three ways."""
    start = (model.eval(), options.prompt, options.length)
    texts = {"greedy": write_greedily(*start)}
    texts[f"temperature {options.temperature:g}"] = write_by_temperature(*start, options.temperature, options.seed)
    found, score = write_by_beam_search(*start, options.beam)
    texts[f"beam search, {options.beam} wide, log p {score:.1f}"] = found
    return {name: options.prompt + text for name, text in texts.items()}


def compare(curves: dict) -> dict[str, float]:
    """Prints both loss curves at ten steps; how far they part, in the first ten steps and ever, and the median seconds.

    The two libraries round differently in the last bit, and training amplifies that from step to step, as it does
    between two machines. The first steps show whether both compute the same thing, the later ones how that grows.
    """
    stock, ours = curves["torch.nn"], curves["fastrnn"]
    apart = [abs(a - b) for a, b in zip(stock["loss"], ours["loss"], strict=True)]
    print("\n         loss (nats per character)\n step   torch.nn    fastrnn    difference")
    for step in sorted({round(k * (len(apart) - 1) / 9) for k in range(10)}):
        print(f"{step + 1:5}{stock['loss'][step]:11.5f}{ours['loss'][step]:11.5f}{apart[step]:14.1e}")
    early, largest = max(apart[:10]), max(apart)
    slow, fast = statistics.median(stock["seconds"]), statistics.median(ours["seconds"])
    print(f"\nlargest difference of the losses: {early:.1e} in the first 10 steps, {largest:.1e} in all {len(apart)}")
    print(f"seconds per epoch (median): torch.nn {slow:.2f}, fastrnn {fast:.2f}, ratio {slow / fast:.2f}")
    return {"difference_first_10": early, "difference": largest, "seconds_torch": slow, "seconds_fastrnn": fast}


def draw_curves(curves: dict, title: str, path: Path) -> None:
    """Draws the losses of both libraries, and their difference, into a picture file. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5), width_ratios=[3, 2], layout="constrained")
    styles = [("tab:orange", 5, "o"), ("tab:blue", 1, "x")]  # the thin line runs inside the thick one
    for (name, curve), (color, width, marker) in zip(curves.items(), styles, strict=True):
        label = f"{name}: {statistics.median(curve['seconds']):.2f} s per epoch"
        left.plot(range(1, len(curve["loss"]) + 1), curve["loss"], color=color, linewidth=width, label=label)
        held_out = [math.log(value) for value in curve["held_out_perplexity"]]
        ends = [len(curve["loss"]) * (epoch + 1) / len(held_out) for epoch in range(len(held_out))]
        left.plot(ends, held_out, marker, color=color, markersize=5 + width, zorder=3, label=f"{name}, held-out text")
    left.set(title=title, xlabel="step", ylabel="loss (nats per character)")
    left.legend()
    apart = [abs(a - b) for a, b in zip(curves["torch.nn"]["loss"], curves["fastrnn"]["loss"], strict=True)]
    right.plot(range(1, len(apart) + 1), apart, color="tab:gray", linewidth=1)
    right.set(title="difference of the losses", xlabel="step", yscale="log" if max(apart) > 0 else "linear")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; leaves with a sentence on stderr and status 2 where they make no sense."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--short", action="store_true", help=f"a small run: {SHORT}, unless given")
    add("--cell", choices=["lstm", "gru", "rnn"], default="lstm")
    add("--sampling", choices=list(SAMPLINGS), default="random", help="consecutive carries the state")
    add("--layers", type=int, default=2)
    add("--hidden", type=int, default=256, help="units per layer")
    add("--embedding", type=int, default=64, help="numbers per character")
    add("--bidirectional", action="store_true", help="refused, with the reason")
    add("--chars", type=int, default=1_000_000, help="size of the text, of which a tenth is held out")
    add("--steps", type=int, default=64, help="characters per window")
    add("--batch", type=int, default=32, help="windows per batch")
    add("--epochs", type=int, default=5)
    add("--optimizer", choices=["adam", "sgd"], default="adam")
    add("--lr", type=float, help="learning rate; by default 0.003 for adam, 1 for sgd")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=torch.get_num_threads())
    add("--prompt", default="def ", help="what the samples begin with")
    add("--length", type=int, default=300, help="characters per sample")
    add("--temperature", type=float, default=0.7)
    add("--beam", type=int, default=8, help="width of the beam search")
    add("--picture", type=Path, default=PICTURE, help="where the curves go (.png, .svg, .pdf), and as .json next to it")
    if parser.parse_known_args(argv)[0].short:
        parser.set_defaults(**SHORT)
    options = parser.parse_args(argv)
    smallest = 10 * (options.batch + 1) * options.steps + 10
    sizes = [(name, value) for name, value in vars(options).items() if type(value) in (int, float) and name != "seed"]
    rules = [
        (not options.bidirectional, BIDIRECTIONAL),
        *((0 < value < math.inf, f"--{name} must be above zero, got {value}") for name, value in sizes),
        (0 <= options.seed < 2**32, f"--seed must be in [0, 2**32), got {options.seed}"),
        (options.chars >= smallest, f"--chars must be {smallest} or more: a tenth must fill one batch x steps"),
        (options.beam <= ALPHABET, f"--beam: there are only {ALPHABET} characters to go on with, got {options.beam}"),
        (options.prompt, "--prompt must not be empty: the model goes on from what it has read"),
        (options.picture.suffix in {".png", ".svg", ".pdf"}, f"--picture: .png, .svg or .pdf, got {options.picture}"),
    ]
    for holds, message in rules:
        if not holds:
            parser.error(message)
    options.lr = options.lr or {"adam": 0.003, "sgd": 1.0}[options.optimizer]
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the comparison; 0, or 1 after a sentence on stderr."""
    options = parse_options(argv)
    torch.set_num_threads(options.threads)
    size = f"{options.cell.upper()} {options.layers} x {options.hidden}"
    title = f"{size}, {options.sampling} sampling, threads: {options.threads}"
    try:
        options.picture.parent.mkdir(parents=True, exist_ok=True)  # fails before the training, not after it
        tokens = encode(library_text(options.chars))
        train, held_out = tokens.tensor_split([len(tokens) - len(tokens) // 10])
        print(f"{title}\nstandard library: {len(train):,} characters to train on, {len(held_out):,} held out")
        model, curves = train_both(options, train, held_out)
        figures = {"title": title, "options": vars(options), **compare(curves), "curves": curves}
        figures["samples"] = write_samples(model, options)
        for name, text in figures["samples"].items():
            print(f"\n--- {name} ---\n{text.rstrip()}")
        options.picture.with_suffix(".json").write_text(json.dumps(figures, indent=1, default=str))
        if find_spec("matplotlib") is None:
            print("\nno picture: it needs matplotlib (pip install matplotlib)")
        else:
            draw_curves(curves, title, options.picture)
            print(f"\npicture: {options.picture}")
    except (OSError, ValueError) as error:
        print(f"char_lm: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
