from __future__ import annotations

import pytest
import torch

from gradscope.demo.text import CharText, load_text


@pytest.fixture(scope="module")
def characters() -> str:
    return load_text()


def test_the_text_is_long_and_always_the_same(characters: str) -> None:
    assert len(characters) > 300_000
    assert characters == load_text()


def test_decoding_undoes_encoding() -> None:
    text = CharText()
    line = "for xb, yb in batches:"
    assert text.decode(text.encode(line)) == line


def test_integers_are_positions_in_the_sorted_vocabulary() -> None:
    text = CharText("banana bread " * 20, block_size=4)
    assert text.vocabulary == " abdenr"
    assert text.vocab_size == 7
    assert text.encode("bad").tolist() == [2, 1, 3]


def test_a_character_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(KeyError, match="z"):
        CharText("banana bread " * 20, block_size=4).encode("z")


@pytest.mark.parametrize("split", ["train", "val"])
def test_batches_are_pieces_of_their_split(characters: str, split: str) -> None:
    text = CharText()
    boundary = int(0.9 * len(characters))
    part = characters[:boundary] if split == "train" else characters[boundary:]
    xb, yb = text.get_batch(split)
    assert xb.shape == yb.shape == (16, 64)
    assert xb.dtype == yb.dtype == torch.int64
    assert torch.equal(xb[:, 1:], yb[:, :-1])
    for x, y in zip(xb, yb, strict=True):
        assert text.decode(x) + text.decode(y[-1:]) in part


def test_the_same_seed_draws_the_same_batches() -> None:
    one, other, different = CharText(seed=3), CharText(seed=3), CharText(seed=4)
    for _ in range(5):
        batch = one.get_batch("train")[0]
        assert torch.equal(batch, other.get_batch("train")[0])
        assert not torch.equal(batch, different.get_batch("train")[0])


def test_batches_ignore_and_leave_alone_the_global_generator() -> None:
    text, other = CharText(), CharText()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    batch = text.get_batch("train")[0]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(batch, other.get_batch("train")[0])


def test_looking_at_validation_does_not_change_what_is_trained_on() -> None:
    looking, plain = CharText(), CharText()
    looking.get_batch("val")
    assert torch.equal(looking.get_batch("train")[0], plain.get_batch("train")[0])


def test_the_last_character_can_be_drawn() -> None:
    text = CharText("ab" * 45 + "abcd" + "ef", block_size=5, batch_size=200, train_fraction=0.9375)
    assert any("f" in text.decode(y) for y in text.get_batch("val")[1])


def test_too_short_a_text_is_refused() -> None:
    with pytest.raises(ValueError, match="val split has 10 characters; one sample takes 65"):
        CharText("x" * 100)
