"""How long graphs take from the loss to the picture, and what a captured step costs.

python tests/benchmarks/graphs.py
"""

from __future__ import annotations

import gc
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gradscope
from gradscope.instruments.autograd_graph import capture_graph
from gradscope.instruments.call_log import CallLog, paths_of

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from architectures import gpt2

REPETITIONS = 5


def additions(n: int) -> torch.Tensor:
    """A chain of additions."""
    x = torch.randn(2, requires_grad=True)
    y = x
    for _ in range(n):
        y = y + x
    return y.sum()


def recurrence(n: int) -> torch.Tensor:
    """An RNN cell in a plain loop."""
    cell, state = nn.RNNCell(3, 4), None
    for _ in range(n):
        state = cell(torch.randn(2, 3), state)
    return state.sum()  # type: ignore[union-attr]


def irregular(n: int) -> torch.Tensor:
    """Operations drawn by lot, a third of which add an earlier value."""
    draw = random.Random(0)
    values = [torch.randn(2, requires_grad=True)]
    functions = (torch.exp, torch.tanh, torch.sin, torch.cos)
    for _ in range(n):
        if draw.random() < 0.3:
            values.append(values[-1] + draw.choice(values[-50:]))
        else:
            values.append(draw.choice(functions)(values[-1]))
    return torch.stack(values[-20:]).sum()


def from_loss_to_svg(make: Callable[[], tuple[Any, Callable[[], Any]]]) -> tuple[int, float, float]:
    """Return the number of nodes, and seconds to capture and to render, the least of all runs."""
    captures, renders = [], []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(REPETITIONS):
            kept, graph_of = make()
            gc.collect()
            began = time.perf_counter()
            graph = graph_of()
            captured = time.perf_counter()
            graph.render(Path(folder) / "graph.svg")
            renders.append(time.perf_counter() - captured)
            captures.append(captured - began)
            del kept
    return len(graph), min(captures), min(renders)


def plain(loss_of: Callable[[], torch.Tensor]) -> Callable[[], tuple[Any, Callable[[], Any]]]:
    """A graph that is captured after the fact."""

    def make() -> tuple[Any, Callable[[], Any]]:
        loss = loss_of()
        return loss, lambda: gradscope.graph(loss)

    return make


def followed(n_layers: int) -> tuple[Any, Callable[[], Any]]:
    """A GPT whose module calls are followed."""
    model, loss_of = gpt2(n_layers=n_layers, width=16, heads=2, vocab=20, context=8)
    with gradscope.capture(model) as c:
        loss = loss_of()
    return loss, lambda: c.graph(loss)


def cost_per_node() -> float:
    """Microseconds a node, of a graph nobody has walked before, with what its nodes keep."""
    costs = []
    _, loss_of = gpt2()
    for _ in range(40):
        loss = loss_of()
        gc.collect()
        began = time.process_time()
        graph = capture_graph([loss], lambda leaf: (), saved=True)
        costs.append((time.process_time() - began) / len(graph))
    return 1e6 * statistics.median(costs)


def cost_per_module_call() -> float:
    """Microseconds a module call, beyond what it takes by itself, alternating."""
    model = nn.Sequential(*(nn.Identity() for _ in range(1_000)))
    x = torch.randn(4, 4, requires_grad=True)
    log = CallLog(paths_of([("", model)]))
    bare, logged = [], []
    for _ in range(60):
        began = time.process_time()
        model(x)
        bare.append(time.process_time() - began)
        log.start()
        began = time.process_time()
        model(x)
        logged.append(time.process_time() - began)
        log.stop()
        log.forget()
    return 1e6 * (statistics.median(logged) - statistics.median(bare)) / 1_001


def main() -> None:
    """Print everything."""
    torch.set_num_threads(1)
    cases: dict[str, Any] = {
        "20,000 additions": plain(lambda: additions(20_000)),
        "RNN of 5,000 steps": plain(lambda: recurrence(5_000)),
        "GPT of 2,500 layers": lambda: followed(2_500),
        "100,000 irregular operations": plain(lambda: irregular(100_000)),
        "200,000 additions": plain(lambda: additions(200_000)),
        "GPT-2 of 12 layers": lambda: followed(12),
    }
    print(f"{'graph':30} {'nodes':>9} {'capture s':>10} {'svg s':>7} {'both s':>7}")
    for name, make in cases.items():
        n_nodes, capture, render = from_loss_to_svg(make)
        total = capture + render
        print(f"{name:30} {n_nodes:9,} {capture:10.2f} {render:7.2f} {total:7.2f}", flush=True)
    print(f"\nwalking a graph: {cost_per_node():.1f} us a node")
    print(f"following module calls: {cost_per_module_call():.1f} us a call")


if __name__ == "__main__":
    main()
