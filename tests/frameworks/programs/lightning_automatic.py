"""A LightningModule with automatic optimisation; the argument breaks it."""

import sys

import lightning
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

defect = sys.argv[1]


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Dropout(0.2))
        self.middle = nn.Linear(32, 32)
        self.head = nn.Linear(32, 4)
        if defect == "frozen-head":
            self.head.requires_grad_(False)

    def forward(self, x):
        return self.head(torch.relu(self.middle(self.body(x))))

    def on_train_epoch_start(self):
        if defect == "eval-left-on":
            self.eval()

    def training_step(self, batch, _):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("loss", loss)
        if defect == "detached-loss":
            loss = loss.detach().requires_grad_()
        return loss

    def validation_step(self, batch, _):
        x, y = batch
        self.log("accuracy", (self(x).argmax(1) == y).float().mean())

    def configure_optimizers(self):
        held = list(self.parameters())
        if defect == "layer-outside-optimizer":
            held = [*self.body.parameters(), *self.head.parameters()]
        optimizer = torch.optim.Adam(held, lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]


torch.manual_seed(0)
x = torch.randn(256, 12)
loader = DataLoader(TensorDataset(x, x[:, :4].argmax(1)), batch_size=32)
trainer = lightning.Trainer(
    max_epochs=3,
    accelerator="cpu",
    devices=1,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(Classifier(), loader, loader)
