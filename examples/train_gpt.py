"""Train a small GPT under watch, and print what gradscope saw.

python examples/train_gpt.py [--steps 100]
"""

import argparse

import torch

import gradscope
from gradscope.demo.char_gpt import CharGPT
from gradscope.demo.text import CharText

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=100)
n_steps = parser.parse_args().steps

torch.manual_seed(0)
text = CharText()
model = CharGPT(text.vocab_size)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

with gradscope.watch(model, optimizer) as scope:
    for step in range(n_steps):
        xb, yb = text.get_batch("train")
        logits, loss = model(xb, yb)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step:3}  loss {loss.item():.3f}")

print(scope)
