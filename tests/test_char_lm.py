# SPDX-License-Identifier: BSD-3-Clause
"""examples/char_lm.py in tiny runs: both samplings, every cell, the three ways to write, and what it refuses."""

import importlib.util
import itertools
import json
import math

import pytest
import torch
from load_example import load_example

TINY = ["--chars", "12000", "--layers", "1", "--hidden", "24", "--embedding", "8", "--steps", "16", "--batch", "8"]
TINY += ["--epochs", "2", "--length", "12", "--beam", "3"]


char_lm = load_example("char_lm")


@pytest.fixture(params=["lstm", "gru", "rnn"])
def writer(request, monkeypatch):
    """A model with two layers and large random weights: what it writes is no text, but depends on all that it has read.

    The three ways to write return tokens [N] instead of text, which would lose what cannot be printed.
    """
    monkeypatch.setattr(char_lm, "decode", lambda tokens: tokens)
    options = char_lm.parse_options([*TINY, "--layers", "2", "--cell", request.param])
    model, _ = char_lm.build(char_lm.fastrnn, options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    return model.eval()


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("sampling", ["random", "consecutive"])
def test_run_learns_and_both_libraries_agree(cell, sampling, tmp_path, capsys):
    picture = tmp_path / "new" / "curves.png"
    assert char_lm.main([*TINY, "--cell", cell, "--sampling", sampling, "--picture", str(picture)]) == 0
    figures = json.loads(picture.with_suffix(".json").read_text())
    stock, ours = figures["curves"]["torch.nn"], figures["curves"]["fastrnn"]
    assert len(stock["loss"]) == len(ours["loss"]) > 150
    assert figures["difference_first_10"] <= 2e-5  # nats, of a loss of about 4: some tens of float32's epsilon
    for curve in (stock, ours):
        assert curve["train_perplexity"][1] < 0.75 * curve["train_perplexity"][0]
        assert curve["held_out_perplexity"][1] < curve["held_out_perplexity"][0] < char_lm.ALPHABET / 2
        assert len(curve["seconds"]) == 2
    assert len(figures["samples"]) == 3
    printed = capsys.readouterr().out
    assert "largest difference of the losses" in printed
    assert "seconds per epoch" in printed
    if importlib.util.find_spec("matplotlib"):
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_run_with_sgd_and_short_defaults_learns(tmp_path, capsys):
    options = [*TINY, "--short", "--optimizer", "sgd", "--picture", str(tmp_path / "curves.svg")]
    assert char_lm.main(options) == 0
    curve = json.loads((tmp_path / "curves.json").read_text())["curves"]["fastrnn"]
    assert curve["held_out_perplexity"][1] < curve["held_out_perplexity"][0]


def test_run_without_matplotlib_and_tqdm_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(char_lm, "find_spec", lambda name: None)
    assert char_lm.main([*TINY, "--epochs", "1", "--picture", str(tmp_path / "curves.png")]) == 0
    assert "no picture" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["curves.json"]


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_build_gives_the_same_weights_in_both_libraries(cell):
    options = char_lm.parse_options([*TINY, "--cell", cell])
    stock, ours = (char_lm.build(library, options)[0].state_dict() for library in char_lm.LIBRARIES.values())
    assert list(stock) == list(ours)
    assert all(torch.equal(stock[name], ours[name]) for name in stock)


@pytest.mark.parametrize("sampling", ["random", "consecutive"])
def test_batches_targets_are_the_next_characters(sampling):
    text = torch.arange(1000)
    batches = char_lm.SAMPLINGS[sampling](text, 4, 8, torch.Generator().manual_seed(1))
    assert len(batches) >= 1000 // (4 * 8) - 1
    for inputs, targets in batches:
        assert inputs.shape == targets.shape == (8, 4)
        assert torch.equal(targets, inputs + 1)
        assert torch.equal(inputs[1:], inputs[:-1] + 1)
    seen = torch.cat([inputs.flatten() for inputs, _ in batches])
    assert len(seen.unique()) == len(seen)


def test_consecutive_batches_continue_each_other():
    batches = char_lm.consecutive_batches(torch.arange(1000), 4, 8, torch.Generator().manual_seed(1))
    for (before, _), (after, _) in itertools.pairwise(batches):
        assert torch.equal(after[0], before[-1] + 1)


def test_train_epoch_carries_the_state_without_its_history():
    options = char_lm.parse_options(
        [*TINY, "--lr", "1e-30"]
    )  # the weights stand still, so the losses can be recomputed
    tokens = char_lm.encode(char_lm.library_text(2000))
    batches = char_lm.consecutive_batches(tokens, 8, 16, torch.Generator().manual_seed(1))[:3]
    model, optimizer = char_lm.build(char_lm.fastrnn, options)
    carried = char_lm.train_epoch(model, optimizer, batches, carry=True, clip=1.0)
    fresh = char_lm.train_epoch(model, optimizer, batches, carry=False, clip=1.0)
    whole = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    expected = char_lm.batch_loss(model, whole, None)[0].item()
    assert sum(carried) / 3 == pytest.approx(expected, abs=1e-6)
    assert fresh[0] == carried[0]
    assert fresh[1:] != carried[1:]


def test_perplexity_of_a_uniform_guess_is_the_size_of_the_alphabet():
    assert char_lm.perplexity([math.log(128)] * 3) == pytest.approx(128)


def test_encode_decode_return_the_text():
    text = "def f(x):\n    return x  # 1\n"
    assert char_lm.decode(char_lm.encode(text)) == text
    assert char_lm.decode(char_lm.encode("naïve\x07")) == "na?ve?"
    assert char_lm.decode(char_lm.encode("\tx")) == "    x"


def test_library_text_is_a_prefix_and_always_the_same():
    assert char_lm.library_text(5000) == char_lm.library_text(9000)[:5000]
    with pytest.raises(ValueError, match="--chars"):
        char_lm.library_text(10**9)


def test_beam_search_of_width_1_is_greedy(writer):
    found, score = char_lm.write_by_beam_search(writer, "def ", 60, 1)
    assert torch.equal(found, char_lm.write_greedily(writer, "def ", 60))
    assert len(found.unique()) > 3
    assert score < 0


def test_beam_search_score_is_the_log_probability_of_its_text(writer):
    """Reading the text in one piece gives the same score only if each beam inherited the right state."""
    found, score = char_lm.write_by_beam_search(writer, "import ", 20, 5)
    _, greedy_score = char_lm.write_by_beam_search(writer, "import ", 20, 1)
    assert score > greedy_score
    tokens = torch.cat([char_lm.encode("import "), found])
    with torch.no_grad():
        log_p = writer(tokens[:-1].unsqueeze(1))[0].squeeze(1).log_softmax(-1)
    assert log_p.gather(1, tokens[1:].unsqueeze(1))[6:].sum().item() == pytest.approx(score, abs=1e-3)


def test_beam_search_with_all_beams_finds_the_best_pair(writer):
    found, score = char_lm.write_by_beam_search(writer, "x", 2, char_lm.ALPHABET)
    with torch.no_grad():
        first, state = char_lm.read(writer, char_lm.encode("x").unsqueeze(1))
        states = char_lm.map_state(lambda half: half.expand(-1, char_lm.ALPHABET, -1).contiguous(), state)
        second, _ = char_lm.read(writer, torch.arange(char_lm.ALPHABET).unsqueeze(0), states)
    pairs = first.T + second
    assert score == pytest.approx(pairs.max().item(), abs=1e-4)
    assert found.tolist() == list(divmod(int(pairs.argmax()), char_lm.ALPHABET))


def test_temperature_near_zero_is_greedy_and_the_seed_decides_above(writer):
    cold = char_lm.write_by_temperature(writer, "def ", 40, 1e-6, 0)
    assert torch.equal(cold, char_lm.write_greedily(writer, "def ", 40))
    once, again, other = (char_lm.write_by_temperature(writer, "def ", 40, 1.0, seed) for seed in (3, 3, 4))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--bidirectional", "has already read the character"),
        ("--cell transformer", "invalid choice"),
        ("--hidden 0", "--hidden must be above zero"),
        ("--lr nan", "--lr must be above zero"),
        ("--temperature 0", "--temperature must be above zero"),
        ("--epochs few", "invalid int value"),
        ("--chars 500", "--chars must be"),
        ("--beam 129", "--beam"),
        ("--seed -1", "--seed"),
        ("--prompt=", "--prompt must not be empty"),
        ("--picture curves.json", "--picture"),
    ],
)
def test_bad_options_are_refused_with_a_reason(options, reason, capsys):
    with pytest.raises(SystemExit) as stop:
        char_lm.main(options.split())
    assert stop.value.code == 2
    assert reason in " ".join(capsys.readouterr().err.split())


def test_diverging_run_ends_with_a_sentence(tmp_path, capsys):
    options = [*TINY, "--optimizer", "sgd", "--lr", "1e38", "--clip", "1e30", "--picture", str(tmp_path / "curves.png")]
    assert char_lm.main(options) == 1
    assert "smaller --lr" in capsys.readouterr().err
