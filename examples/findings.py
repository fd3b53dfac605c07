"""Findings while the loop runs, after it, and before it.

python examples/findings.py
"""

from __future__ import annotations

import torch
from torch import nn

import gradscope


class FrozenHead(gradscope.Rule):
    """MY001 frozen-head: in this project the head is to be trained."""

    code, name = "MY001", "frozen-head"
    severity = gradscope.Severity.ERROR

    def check(self, run):
        for param in run.parameters:
            if param.name.startswith("head.") and not param.requires_grad:
                yield self.finding(f"{param.name} is frozen", "unfreeze it", params=(param.name,))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 20) -> None:
    x, y = torch.randn(32, 4), torch.randn(32, 1)
    for _ in range(steps):
        loss = (model(x) - y).square().mean()
        loss.backward()  # nothing clears .grad
        optimizer.step()


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("body", nn.Linear(4, 8))
    model.add_module("head", nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.body.parameters(), lr=1e-3)

    print("before training:\n")
    print(gradscope.check_setup(model, optimizer, model(torch.randn(2, 4)).mean()))

    model.head.requires_grad_(False)
    print("\nstopped while it runs:\n")
    try:
        with gradscope.watch(model, optimizer, on_finding="raise", rules=[FrozenHead]) as scope:
            train(model, optimizer)
    except gradscope.FindingsError as error:
        print(error)

    print("\nafter it:\n")
    print(scope.findings.to_pandas()[["code", "name", "severity", "message"]].to_string())


if __name__ == "__main__":
    main()
