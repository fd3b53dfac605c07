"""Train a small transformer on Python's own documentation, in plain PyTorch.

python examples/plain_loop.py [--steps 100]
"""

import argparse
from pydoc_data.topics import topics

import torch
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=100)
n_steps = parser.parse_args().steps

text = "\n\n".join(topics[key] for key in sorted(topics))
vocabulary = sorted(set(text))
index = {character: i for i, character in enumerate(vocabulary)}
characters = torch.tensor([index[character] for character in text])


def get_batch(batch_size=16, block_size=64):
    starts = torch.randint(len(characters) - block_size, (batch_size, 1))
    samples = characters[starts + torch.arange(block_size + 1)]
    return samples[:, :-1], samples[:, 1:]


class CharTransformer(nn.Module):
    def __init__(self, vocab_size, block_size=64, width=128):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(block_size, width)
        block = nn.TransformerEncoderLayer(
            width, nhead=4, dim_feedforward=4 * width, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, num_layers=4, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab_size)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(block_size))

    def forward(self, idx, targets):
        x = self.tokens(idx) + self.positions.weight
        logits = self.head(self.norm(self.blocks(x, mask=self.mask, is_causal=True)))
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


torch.manual_seed(0)
model = CharTransformer(len(vocabulary))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

for step in range(n_steps):
    xb, yb = get_batch()
    logits, loss = model(xb, yb)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    if step % 10 == 0:
        print(f"step {step:3}  loss {loss.item():.3f}")
