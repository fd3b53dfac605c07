"""Watch a training loop, then ask what the optimizer did to one weight.

python examples/explain_a_step.py
"""

import torch
from torch import nn

import gradscope

torch.manual_seed(0)
x = torch.linspace(-3, 3, 64).reshape(-1, 1)
y = torch.sin(x)
model = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

with gradscope.watch(model, optimizer, keep="2.*", keep_steps=[50]) as scope:
    for _ in range(100):
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

print(scope.explain("0.weight", (3, 0)), end="\n\n")  # the last recorded step
print(scope.explain("2.weight", (0, 7), step=50).verdict, end="\n\n")
for name, array in scope.tensors("2.weight", 50).items():
    print(f"{name:18} {array.shape!s:8} norm {(array**2).sum() ** 0.5:.6f}")
print()
print(scope.overhead.to_string(float_format="%.3f"))
