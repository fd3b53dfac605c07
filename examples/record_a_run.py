"""Record a run while it trains, and open it afterwards, as another program would.

python examples/record_a_run.py [FOLDER]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pandas as pd
import torch
from torch import nn

import gradscope


def train(folder: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x = torch.randn(64, 4)
    y = x.sum(1, keepdim=True)
    with gradscope.watch(model, optimizer, save=folder):
        for _ in range(50):
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            optimizer.step()


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else f"{temporary}/run")
        train(folder)

        run = gradscope.open(folder)  # torch is not needed for this
        print(run)
        print(run.explain("2.weight", (0, 3)))

        # Any engine reads the tables.
        grads = pd.read_parquet(folder / "grads")
        print(grads.groupby("param", observed=True)["norm"].agg(["first", "last"]))


if __name__ == "__main__":
    main()
