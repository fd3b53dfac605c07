"""How a training is watched while it is timed: not at all, by gradscope, or by something else.

A setting is a function of a model and its optimizer that gives a context manager. What that gives
on entering is called after every step; gradscope's settings give their scope as well.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

AfterStep = Callable[[int], None]


def _nothing(step: int) -> None:
    """What most have to do after a step."""


@contextlib.contextmanager
def bare(model: Any, optimizer: Any) -> Iterator[AfterStep]:
    yield _nothing


def _gradscope(**options: Any) -> Callable[[Any, Any], Any]:
    @contextlib.contextmanager
    def watched(model: Any, optimizer: Any) -> Iterator[tuple[AfterStep, Any]]:
        import gradscope

        with gradscope.watch(model, optimizer, **options) as scope:
            yield _nothing, scope

    return watched


@contextlib.contextmanager
def with_directory(model: Any, optimizer: Any) -> Iterator[tuple[AfterStep, Any]]:
    with (
        tempfile.TemporaryDirectory() as folder,
        _gradscope(save=Path(folder) / "run")(model, optimizer) as watching,
    ):
        yield watching


@contextlib.contextmanager
def detect_anomaly(model: Any, optimizer: Any) -> Iterator[AfterStep]:
    import torch

    with torch.autograd.detect_anomaly(check_nan=True):
        yield _nothing


@contextlib.contextmanager
def tensorboard(model: Any, optimizer: Any) -> Iterator[AfterStep]:
    """The loop of the tutorials: a histogram of every weight and gradient at every step."""
    from torch.utils.tensorboard import SummaryWriter

    with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:

        def after_step(step: int) -> None:
            for name, parameter in model.named_parameters():
                writer.add_histogram(name, parameter, step)
                writer.add_histogram(f"{name}.grad", parameter.grad, step)

        yield after_step


@contextlib.contextmanager
def wandb(model: Any, optimizer: Any) -> Iterator[AfterStep]:
    """``wandb.watch`` of the gradients at every step, offline."""
    import wandb as client

    with tempfile.TemporaryDirectory() as folder:
        os.environ["WANDB_SILENT"] = "true"
        run = client.init(mode="offline", dir=folder, project="benchmark")
        client.watch(model, log="gradients", log_freq=1)

        def after_step(step: int) -> None:
            run.log({"step": step})

        yield after_step
        run.finish()


@contextlib.contextmanager
def msprobe(model: Any, optimizer: Any) -> Iterator[AfterStep]:
    """msProbe's monitor of gradients, moments and parameters at every step."""
    from msprobe.core.monitor_v2.trainer import TrainerMonitorV2

    wanted = ("weight_grad", "optimizer", "param")
    with tempfile.TemporaryDirectory() as folder:
        config, out = Path(folder) / "config.json", Path(folder) / "out"
        out.mkdir()
        config.write_text(
            json.dumps(
                {
                    "framework": "pytorch",
                    "output_dir": str(out),
                    "step_interval": 1,
                    "patch_optimizer_step": False,
                    "monitors": {
                        name: {"enabled": True, "ops": ["min", "max", "mean", "norm", "nans"]}
                        for name in wanted
                    },
                }
            )
        )
        monitor = TrainerMonitorV2(str(config), fr="pytorch")
        monitor.start(model=model, optimizer=optimizer)

        def after_step(step: int) -> None:
            monitor.step()

        yield after_step
        monitor.stop()


SETTINGS: dict[str, Callable[[Any, Any], Any]] = {
    "bare": bare,
    "watched": _gradscope(),
    "every=1": _gradscope(every=1),
    "graph": _gradscope(graph="every"),
    "save": with_directory,
}

PEERS: dict[str, Callable[[Any, Any], Any]] = {
    "detect_anomaly": detect_anomaly,
    "wandb.watch": wandb,
    "tensorboard": tensorboard,
    "msprobe": msprobe,
}

PACKAGES = {"wandb.watch": "wandb", "tensorboard": "tensorboard", "msprobe": "mindstudio-probe"}
"""What each of the others needs; each is installed into a folder of its own."""

DESCRIPTIONS = {
    "bare": "the loop alone",
    "watched": "`gradscope.watch(model, optimizer)`",
    "every=1": "`every=1`: statistics, state and the update taken apart at every step",
    "graph": '`graph="every"`: the autograd graph of every step',
    "save": "`save=`: to a run directory meanwhile",
    "detect_anomaly": "`torch.autograd.detect_anomaly()`",
    "wandb.watch": "`wandb.watch`, gradients, every step, offline",
    "tensorboard": "TensorBoard, a histogram of every weight and gradient, every step",
    "msprobe": "msProbe, gradients, moments and parameters, every step",
}
