"""Small training loops of every kind."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from residual import Residual
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_ as clip_norm_imported_by_name
from torch.nn.utils import clip_grad_value_ as clip_value_imported_by_name
from torch.optim import SGD, Adam, AdamW, Optimizer, lr_scheduler
from twins import Training, seed_everything


def prepared_step(make: Callable[[], Training]) -> Training:
    """A training after its first step: what torch adds to its own objects by then is there."""
    seed_everything()
    training = make()
    training.step(0)
    return training


# -- models ---------------------------------------------------------------------------------


def perceptron(width: int = 12, *, dropout: float = 0.0) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, width),
        nn.LayerNorm(width),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(width, 3),
    )


class Encoder(nn.Module):
    """A TransformerEncoder, as torch builds it."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=padding).mean(dim=1))


# -- data -----------------------------------------------------------------------------------


def batch(n: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Random data that draws from all three generators."""
    x = torch.randn(n, 6) + float(np.random.uniform(-0.1, 0.1))
    return x, torch.tensor([random.randrange(3) for _ in range(n)])


def sequences(n: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(n, 5, 16)
    padding = torch.zeros(n, 5, dtype=torch.bool)
    padding[1:, 3:] = True
    return x, padding, torch.randint(3, (n,))


def evaluate(model: nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        outputs = model(torch.linspace(-1, 1, 24).reshape(4, 6))
    model.train()
    return outputs


# -- loops ----------------------------------------------------------------------------------


def plain(model: nn.Module, optimizer: Optimizer) -> Training:
    def step(number: int) -> list[torch.Tensor]:
        x, y = batch()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return [loss.detach().clone(), evaluate(model)]

    return Training([model], [optimizer], step)


def adamw_foreach() -> Training:
    model = perceptron()
    return plain(model, AdamW(model.parameters(), lr=1e-2, foreach=True))


def adamw_fused() -> Training:
    model = perceptron()
    return plain(model, AdamW(model.parameters(), lr=1e-2, fused=True))


def adamw_plain() -> Training:
    model = perceptron()
    return plain(model, AdamW(model.parameters(), lr=1e-2, foreach=False))


def adamw_amsgrad_maximize_tensor_lr() -> Training:
    model = perceptron()
    lr = torch.tensor(1e-2)
    return plain(model, AdamW(model.parameters(), lr=lr, amsgrad=True, maximize=True))


def sgd_nesterov_foreach() -> Training:
    model = perceptron()
    return plain(
        model,
        SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    )


def dropout() -> Training:
    model = perceptron(dropout=0.5)
    return plain(model, AdamW(model.parameters(), lr=1e-2))


def float64_parameters() -> Training:
    model = perceptron().double()
    optimizer = AdamW(model.parameters(), lr=1e-2)

    def step(number: int) -> list[torch.Tensor]:
        x, y = batch()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x.double()), y)
        loss.backward()
        optimizer.step()
        return [loss.detach().clone()]

    return Training([model], [optimizer], step)


def several_groups_and_a_frozen_layer() -> Training:
    model = perceptron()
    model[1].requires_grad_(False)
    groups = [
        {"params": model[0].parameters(), "lr": 1e-2, "weight_decay": 0.0},
        {"params": model[4].parameters(), "betas": (0.8, 0.9)},
        {"params": model[1].parameters()},
    ]
    return plain(model, AdamW(groups, lr=1e-3))


def zeroed_to_zero_by_the_model() -> Training:
    model = perceptron()
    optimizer = Adam(model.parameters(), lr=1e-2)

    def step(number: int) -> list[torch.Tensor]:
        x, y = batch()
        model.zero_grad(set_to_none=False)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return [loss.detach().clone()]

    return Training([model], [optimizer], step)


def gradients_never_cleared() -> Training:
    model = perceptron()
    optimizer = Adam(model.parameters(), lr=1e-3)

    def step(number: int) -> list[torch.Tensor]:
        x, y = batch()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return [loss.detach().clone()]

    return Training([model], [optimizer], step)


def accumulation() -> Training:
    model = perceptron()
    optimizer = AdamW(model.parameters(), lr=1e-2)

    def step(number: int) -> list[torch.Tensor]:
        optimizer.zero_grad()
        losses = []
        for _ in range(4):
            x, y = batch()
            loss = F.cross_entropy(model(x), y) / 4
            loss.backward()
            losses.append(loss.detach().clone())
        optimizer.step()
        return losses

    return Training([model], [optimizer], step)


def a_loss_cut_from_the_model() -> Training:
    model = perceptron()
    optimizer = AdamW(model.parameters(), lr=1e-2)

    def step(number: int) -> list[torch.Tensor]:
        x, y = batch()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x).detach().requires_grad_(), y)
        loss.backward()
        optimizer.step()
        return [loss.detach().clone()]

    return Training([model], [optimizer], step)


def clip_norm() -> Training:
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=0.5)

    def step(number: int) -> list[torch.Tensor]:
        x, y = batch()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        return [loss.detach().clone(), norm.clone()]

    return Training([model], [optimizer], step)


def clip_value() -> Training:
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=0.5)

    def step(number: int) -> list[torch.Tensor]:
        x, y = batch()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        nn.utils.clip_grad_value_(model.parameters(), 0.01)
        optimizer.step()
        return [loss.detach().clone()]

    return Training([model], [optimizer], step)


def clips_imported_by_name() -> Training:
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=0.5)

    def step(number: int) -> list[torch.Tensor]:
        x, y = batch()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        norm = clip_norm_imported_by_name(model.parameters(), 0.1, foreach=False)
        clip_value_imported_by_name(model.parameters(), 0.01, foreach=True)
        optimizer.step()
        return [loss.detach().clone(), norm.clone()]

    return Training([model], [optimizer], step)


def schedulers() -> Training:
    model = perceptron()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    warmup = lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=5)
    cosine = lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    both = lr_scheduler.SequentialLR(optimizer, [warmup, cosine], milestones=[5])

    def step(number: int) -> list[torch.Tensor]:
        x, y = batch()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        both.step()
        return [loss.detach().clone(), torch.tensor(both.get_last_lr())]

    return Training([model], [optimizer], step, [both])


def scheduler_of_the_plateau_and_of_momentum() -> Training:
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    cycle = lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=60)
    plateau = lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)

    def step(number: int) -> list[torch.Tensor]:
        x, y = batch()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        cycle.step()
        plateau.step(loss.item())
        return [loss.detach().clone()]

    return Training([model], [optimizer], step, [cycle, plateau])


def lbfgs_closure() -> Training:
    model = perceptron()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3, history_size=4)

    def step(number: int) -> list[torch.Tensor]:
        x, y = batch()
        losses = []

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            losses.append(loss.detach().clone())
            return loss

        losses.append(optimizer.step(closure).detach().clone())
        return losses

    return Training([model], [optimizer], step)


def adamw_closure() -> Training:
    model = perceptron(dropout=0.1)
    optimizer = AdamW(model.parameters(), lr=1e-2)

    def step(number: int) -> list[torch.Tensor]:
        x, y = batch()

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        given = {"closure": closure} if number % 2 else {}
        loss = optimizer.step(**given) if given else optimizer.step(closure)
        return [loss.detach().clone()]

    return Training([model], [optimizer], step)


def checkpoint_reentrant() -> Training:
    model = Residual(use_reentrant=True)
    return plain(model, AdamW(model.parameters(), lr=1e-2))


def checkpoint_non_reentrant() -> Training:
    model = Residual(use_reentrant=False)
    return plain(model, AdamW(model.parameters(), lr=1e-2))


def gan() -> Training:
    generator, critic = nn.Linear(4, 6), perceptron()
    opt_g = Adam(generator.parameters(), lr=1e-2)
    opt_d = Adam(critic.parameters(), lr=1e-2)

    def step(number: int) -> list[torch.Tensor]:
        x, _ = batch()
        opt_d.zero_grad()
        fake = generator(torch.randn(8, 4))
        loss_d = critic(fake.detach()).mean() - critic(x).mean()
        loss_d.backward()
        opt_d.step()
        opt_g.zero_grad()
        loss_g = -critic(fake).mean()
        loss_g.backward()
        opt_g.step()
        return [loss_d.detach().clone(), loss_g.detach().clone()]

    return Training([generator, critic], [opt_g, opt_d], step, expected_steps=2)


def gradient_penalty() -> Training:
    model = perceptron()
    optimizer = Adam(model.parameters(), lr=1e-2)

    def step(number: int) -> list[torch.Tensor]:
        x, _ = batch()
        x.requires_grad_()
        optimizer.zero_grad()
        out = model(x)
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        loss = out.mean() + (slope.norm(dim=1) - 1).square().mean()
        loss.backward()
        optimizer.step()
        return [loss.detach().clone(), slope.detach().clone()]

    return Training([model], [optimizer], step)


def optimizer_in_backward() -> Training:
    model = perceptron()
    optimizers = {p: SGD([p], lr=0.1, momentum=0.9) for p in model.parameters()}

    def update(parameter: torch.Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(update)

    def step(number: int) -> list[torch.Tensor]:
        x, y = batch()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return [loss.detach().clone()]

    return Training([model], list(optimizers.values()), step, expected_steps=len(optimizers))


def autocast() -> Training:
    model = perceptron()
    optimizer = AdamW(model.parameters(), lr=1e-2)

    def step(number: int) -> list[torch.Tensor]:
        x, y = batch()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return [loss.detach().clone()]

    return Training([model], [optimizer], step)


def _scaled(model: nn.Module, optimizer: Optimizer) -> Training:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)

    def step(number: int) -> list[torch.Tensor]:
        x, y = batch()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        if number % 7 in (2, 3):
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        if number % 2:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        return [loss.detach().clone(), torch.tensor(scaler.get_scale())]

    return Training([model], [optimizer], step, [scaler])


def scaler_with_skipped_steps() -> Training:
    model = perceptron()
    return _scaled(model, AdamW(model.parameters(), lr=1e-2))


def scaler_with_fused_adamw() -> Training:
    model = perceptron()
    return _scaled(model, AdamW(model.parameters(), lr=1e-2, fused=True))


def inside_a_device_context() -> Training:
    model = perceptron(dropout=0.1)
    optimizer = AdamW(model.parameters(), lr=1e-2)

    def step(number: int) -> list[torch.Tensor]:
        optimizer.zero_grad()
        with torch.device("cpu"):
            x, y = batch()
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return [loss.detach().clone(), evaluate(model)]

    return Training([model], [optimizer], step)


def inside_two_device_contexts() -> Training:
    model = perceptron(dropout=0.1)
    optimizer = AdamW(model.parameters(), lr=1e-2)

    def step(number: int) -> list[torch.Tensor]:
        with torch.device("meta"):
            nothing = torch.zeros(2)
            with torch.device("cpu"):
                x, y = batch()
                loss = F.cross_entropy(model(x), y)
            nowhere = torch.zeros(2)
        after = torch.zeros(2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        devices = [float(t.is_meta) for t in (nothing, nowhere, after)]
        return [loss.detach().clone(), torch.tensor(devices)]

    return Training([model], [optimizer], step)


def under_a_default_device() -> Training:
    model = perceptron(dropout=0.1)
    optimizer = AdamW(model.parameters(), lr=1e-2)

    def step(number: int) -> list[torch.Tensor]:
        torch.set_default_device("cpu")
        try:
            x, y = batch()
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            return [loss.detach().clone(), evaluate(model)]
        finally:
            torch.set_default_device(None)

    return Training([model], [optimizer], step)


def transformer_evaluated_without_grad() -> Training:
    model = Encoder()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    x_eval, padding_eval, _ = sequences()

    def step(number: int) -> list[torch.Tensor]:
        x, padding, y = sequences()
        model.eval()
        with torch.no_grad():
            before = model(x_eval, padding_eval)
        model.train()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x, padding), y)
        model.eval()
        with torch.inference_mode():  # between forward and backward, while an instrument may look
            between = model.encoder(x_eval, src_key_padding_mask=padding_eval)
        model.train()
        loss.backward()
        optimizer.step()
        return [loss.detach().clone(), before, between.clone()]

    return Training([model], [optimizer], step)


def transformer_as_frozen_teacher() -> Training:
    """The teacher is evaluated with grad enabled; its fast path is taken as nothing needs grad."""
    student, teacher = Encoder(), Encoder()
    teacher.eval().requires_grad_(False)
    optimizer = AdamW(student.parameters(), lr=1e-2)

    def step(number: int) -> list[torch.Tensor]:
        x, padding, _ = sequences()
        wanted = teacher.encoder(x, src_key_padding_mask=padding)
        optimizer.zero_grad()
        loss = F.mse_loss(student.encoder(x, src_key_padding_mask=padding), wanted)
        loss.backward()
        optimizer.step()
        return [loss.detach().clone(), wanted.clone()]

    return Training([student, teacher], [optimizer], step)


def transformer_frozen_for_its_evaluation() -> Training:
    model = Encoder()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    x_eval, padding_eval, _ = sequences()

    def step(number: int) -> list[torch.Tensor]:
        model.eval().requires_grad_(False)
        held_out = model(x_eval, padding_eval)
        model.train().requires_grad_(True)
        x, padding, y = sequences()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x, padding), y)
        loss.backward()
        optimizer.step()
        return [loss.detach().clone(), held_out.clone()]

    return Training([model], [optimizer], step)


def attention_evaluated_without_grad() -> Training:
    """MultiheadAttention has a fast path of its own, also inside a model that is no Transformer."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
            self.head = nn.Linear(16, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.attention(x, x, x)[0].mean(dim=1))

    model = Attention()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    x_eval, _, _ = sequences()

    def step(number: int) -> list[torch.Tensor]:
        x, _, y = sequences()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        model.eval()
        with torch.no_grad():
            held_out = model(x_eval)
        model.train()
        loss.backward()
        optimizer.step()
        return [loss.detach().clone(), held_out.clone()]

    return Training([model], [optimizer], step)


TRANSFORMERS: tuple[Callable[[], Training], ...] = (
    transformer_evaluated_without_grad,
    transformer_as_frozen_teacher,
    transformer_frozen_for_its_evaluation,
)

LOOPS: tuple[Callable[[], Training], ...] = (
    adamw_foreach,
    adamw_fused,
    adamw_plain,
    adamw_amsgrad_maximize_tensor_lr,
    sgd_nesterov_foreach,
    dropout,
    float64_parameters,
    several_groups_and_a_frozen_layer,
    zeroed_to_zero_by_the_model,
    gradients_never_cleared,
    accumulation,
    a_loss_cut_from_the_model,
    clip_norm,
    clip_value,
    clips_imported_by_name,
    schedulers,
    scheduler_of_the_plateau_and_of_momentum,
    lbfgs_closure,
    adamw_closure,
    checkpoint_reentrant,
    checkpoint_non_reentrant,
    gan,
    gradient_penalty,
    optimizer_in_backward,
    autocast,
    scaler_with_skipped_steps,
    scaler_with_fused_adamw,
    inside_a_device_context,
    inside_two_device_contexts,
    under_a_default_device,
    attention_evaluated_without_grad,
    *TRANSFORMERS,
)


ALSO_IN_THE_MATRIX: tuple[Callable[[], Training], ...] = (
    adamw_fused,
    adamw_plain,
    accumulation,
    clip_norm,
    clip_value,
    lbfgs_closure,
    adamw_closure,
    checkpoint_reentrant,
    checkpoint_non_reentrant,
    autocast,
    scaler_with_skipped_steps,
    scaler_with_fused_adamw,
)


def every_optimizer_of_torch() -> list[type[Optimizer]]:
    return [
        kind
        for name, kind in sorted(vars(torch.optim).items())
        if isinstance(kind, type) and issubclass(kind, Optimizer) and kind is not Optimizer
    ]


def with_optimizer(kind: type[Optimizer]) -> Training:
    """A loop that any optimizer of torch can run, SparseAdam and Muon included."""
    name = kind.__name__
    if name == "SparseAdam":
        table = nn.Embedding(10, 4, sparse=True)
        optimizer: Any = kind(table.parameters(), lr=1e-2)

        def sparse_step(number: int) -> list[torch.Tensor]:
            # A gradient that is zeroed keeps its memory, which torch resizes.
            optimizer.zero_grad(set_to_none=bool(number % 3))
            loss = table(torch.randint(10, (6,))).square().mean()
            loss.backward()
            optimizer.step()
            return [loss.detach().clone()]

        return Training([table], [optimizer], sparse_step)
    if name == "LBFGS":
        return lbfgs_closure()
    model = perceptron()
    held = [p for p in model.parameters() if name != "Muon" or p.dim() == 2]
    return plain(model, kind(held, lr=1e-2))  # type: ignore[call-arg]
