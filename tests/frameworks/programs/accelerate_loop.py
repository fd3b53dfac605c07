"""A loop under accelerate, with accumulation and clipping; the argument breaks it."""

import sys

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

defect = sys.argv[1]

torch.manual_seed(0)
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
model = nn.Sequential(
    nn.Linear(12, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
)
if defect == "frozen-head":
    model[5].requires_grad_(False)
held = [*model[0].parameters(), *model[5].parameters()]
if defect != "layer-outside-optimizer":
    held += model[3].parameters()
optimizer = torch.optim.AdamW(held, lr=1e-2)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 24)
x = torch.randn(384, 12)
loader = DataLoader(TensorDataset(x, x[:, :4].argmax(1)), batch_size=16)
model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
model.train()
for _epoch in range(2):
    if defect == "eval-left-on":
        model.eval()
    for inputs, targets in loader:
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(inputs), targets)
            if defect == "detached-loss":
                loss = loss.detach().requires_grad_()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
