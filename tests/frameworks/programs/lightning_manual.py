"""A GAN as a LightningModule with manual optimisation; the argument breaks it."""

import sys

import lightning
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

defect = sys.argv[1]


class Gan(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2)
        )
        self.discriminator = nn.Sequential(
            nn.Linear(2, 16), nn.LeakyReLU(0.2), nn.Dropout(0.1), nn.Linear(16, 1)
        )
        if defect == "frozen-head":
            self.discriminator[3].requires_grad_(False)

    def training_step(self, batch, _):
        (real,) = batch
        opt_g, opt_d = self.optimizers()
        if defect == "eval-left-on":
            self.eval()
        fake = self.generator(torch.randn(len(real), 4))
        opt_d.zero_grad()
        scores = self.discriminator(real), self.discriminator(fake.detach())
        loss_d = F.softplus(-scores[0]).mean() + F.softplus(scores[1]).mean()
        self.manual_backward(loss_d)
        opt_d.step()
        opt_g.zero_grad()
        judged = fake.detach() if defect == "detached-loss" else fake
        self.manual_backward(F.softplus(-self.discriminator(judged)).mean())
        opt_g.step()

    def configure_optimizers(self):
        made = list(self.generator.parameters())
        if defect == "layer-outside-optimizer":
            made = list(self.generator[:2].parameters())
        return (
            torch.optim.Adam(made, lr=1e-3, betas=(0.5, 0.999)),
            torch.optim.Adam(self.discriminator.parameters(), lr=1e-3, betas=(0.5, 0.999)),
        )


torch.manual_seed(0)
angles = torch.rand(256) * 6.283
real = torch.stack([angles.cos(), angles.sin()], 1)
trainer = lightning.Trainer(
    max_epochs=3,
    accelerator="cpu",
    devices=1,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(Gan(), DataLoader(TensorDataset(real), batch_size=32))
