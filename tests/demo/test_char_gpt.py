from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gradscope.demo.char_gpt import CharGPT


@pytest.fixture
def model() -> CharGPT:
    torch.manual_seed(0)
    return CharGPT(vocab_size=100).eval()


def random_characters(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(100, shape, generator=torch.Generator().manual_seed(seed))


def test_has_the_parameters_its_sizes_imply(model: CharGPT) -> None:
    width, vocabulary, block_size, n_layers = 128, 100, 64, 4
    attention = 3 * width * (width + 1) + width * (width + 1)
    mlp = 4 * width * (width + 1) + width * (4 * width + 1)
    norm = 2 * width
    expected = (
        vocabulary * width
        + block_size * width
        + n_layers * (attention + mlp + 2 * norm)
        + norm
        + vocabulary * (width + 1)
    )
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    assert len(list(model.parameters())) == 54
    assert 0.75e6 < expected < 0.85e6


def test_a_later_character_changes_no_earlier_logit(model: CharGPT) -> None:
    idx = random_characters(3, 64)
    for position in (1, 20, 63):
        changed = idx.clone()
        changed[:, position] = (changed[:, position] + 1) % 100
        with torch.no_grad():
            before, after = model(idx)[0], model(changed)[0]
        torch.testing.assert_close(after[:, :position], before[:, :position], rtol=0, atol=1e-6)
        assert not torch.allclose(after[:, position], before[:, position], atol=1e-4)


def test_an_earlier_character_reaches_every_later_logit(model: CharGPT) -> None:
    idx = random_characters(2, 64)
    changed = idx.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 100
    with torch.no_grad():
        difference = (model(idx)[0] - model(changed)[0]).abs().amax(dim=(0, 2))
    assert (difference[5:] > 0).all()


def test_attention_is_the_textbook_formula(model: CharGPT) -> None:
    attention = model.blocks[0].attention.double()
    x = torch.randn(2, 7, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weight, bias = attention.qkv.weight.detach().numpy(), attention.qkv.bias.detach().numpy()
    query, key, value = np.split(x.numpy() @ weight.T + bias, 3, axis=-1)
    future = np.triu(np.ones((7, 7), dtype=bool), k=1)
    heads = []
    for head in range(4):
        part = slice(32 * head, 32 * (head + 1))
        score = query[..., part] @ key[..., part].transpose(0, 2, 1) / math.sqrt(32)
        score[:, future] = -np.inf
        attended = np.exp(score - score.max(axis=-1, keepdims=True))
        attended /= attended.sum(axis=-1, keepdims=True)
        heads.append(attended @ value[..., part])
    projection = attention.proj
    expected = (
        np.concatenate(heads, axis=-1) @ projection.weight.detach().numpy().T
        + projection.bias.detach().numpy()
    )
    np.testing.assert_allclose(attention(x).detach().numpy(), expected, rtol=1e-10, atol=1e-12)


def test_a_block_only_adds_to_the_residual_stream(model: CharGPT) -> None:
    block = model.blocks[0]
    for projection in (block.attention.proj, block.mlp.proj):
        torch.nn.init.zeros_(projection.weight)
    x = torch.randn(2, 7, 128, generator=torch.Generator().manual_seed(1))
    assert torch.equal(block(x), x)


def test_loss_is_the_mean_cross_entropy_per_character(model: CharGPT) -> None:
    idx, targets = random_characters(4, 30), random_characters(4, 30, seed=1)
    logits, loss = model(idx, targets)
    scores = logits.detach().double().numpy()
    log_total = np.log(np.exp(scores).sum(axis=-1))
    chosen = np.take_along_axis(scores, targets.numpy()[..., None], axis=-1)[..., 0]
    assert loss.item() == pytest.approx((log_total - chosen).mean(), rel=1e-6)


def test_first_loss_is_that_of_an_even_guess(model: CharGPT) -> None:
    _, loss = model(random_characters(16, 64), random_characters(16, 64, seed=1))
    assert loss.item() == pytest.approx(math.log(100), abs=0.15)


def test_without_targets_there_is_no_loss(model: CharGPT) -> None:
    logits, loss = model(random_characters(2, 10))
    assert logits.shape == (2, 10, 100)
    assert loss is None


def test_every_parameter_gets_a_gradient(model: CharGPT) -> None:
    _, loss = model.train()(random_characters(2, 64), random_characters(2, 64, seed=1))
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_dropout_acts_while_training_only(model: CharGPT) -> None:
    idx = random_characters(2, 64)
    assert torch.equal(model(idx)[0], model(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])


def test_too_long_an_input_is_refused(model: CharGPT) -> None:
    with pytest.raises(ValueError, match="65 characters do not fit into a block of 64"):
        model(random_characters(1, 65))


def test_a_width_the_heads_cannot_share_is_refused() -> None:
    with pytest.raises(ValueError, match="width 130 cannot be divided among 4 heads"):
        CharGPT(100, width=130)
