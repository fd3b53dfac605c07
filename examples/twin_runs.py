"""A training whose twin differs in one thing: record two, and see where they part.

gradscope run -o runs/a examples/twin_runs.py
gradscope run -o runs/b examples/twin_runs.py --forget 40
gradscope diff runs/a runs/b
"""

from __future__ import annotations

import argparse

import torch

from gradscope.demo.char_gpt import CharGPT
from gradscope.demo.text import CharText


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--forget", type=int, help="the step at which zero_grad is forgotten")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    text = CharText(seed=0)
    model = CharGPT(text.vocab_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
    for step in range(options.steps):
        xb, yb = text.get_batch("train")
        _, loss = model(xb, yb)
        if step != options.forget:
            optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
