"""What a watched step costs more by how many tensors there are, and by how large they are.

    python tests/benchmarks/scaling.py [--most 10000] [--append docs/benchmarks.md]

Watched and unwatched steps take turns in one process, in which the watch is paused. CPU time,
median over the turns; steps that are recorded in full are left out by asking for none.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

N_TURNS = 7


def cost_of(n_tensors: int, numel: int) -> tuple[float, float]:
    """Return milliseconds of an unwatched step, and what watching adds."""
    import torch
    from torch import nn

    import gradscope

    model = nn.ParameterList([nn.Parameter(torch.randn(numel)) for _ in range(n_tensors)])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, foreach=True)
    n_steps = max(2, min(20, 20_000 // n_tensors))

    def train() -> float:
        start = time.process_time()
        for _ in range(n_steps):
            optimizer.zero_grad(set_to_none=True)
            torch.stack([parameter.sum() for parameter in model]).sum().backward()
            optimizer.step()
        return 1e3 * (time.process_time() - start) / n_steps

    bare, more = [], []
    with gradscope.watch(model, optimizer, every=10**9) as scope:
        train()
        for _ in range(N_TURNS):
            scope.pause()
            bare.append(train())
            scope.resume()
            train()
            more.append(train() - bare[-1])
    return statistics.median(bare), statistics.median(more)


def section(rows: list[tuple[int, int, float, float]]) -> str:
    """Return what is measured as a section of the page."""
    lines = [
        "",
        "## By number and size of the tensors",
        "",
        "SGD on tensors alone, in one process, watched and unwatched by turns; CPU time of a step,",
        f"median of {N_TURNS} turns.",
        "",
        "| tensors | numbers in each | ms unwatched | ms more | µs more a tensor |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {n:,} | {numel:,} | {bare:.2f} | {more:.3f} | {1e3 * more / n:.2f} |"
        for n, numel, bare, more in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--most", type=int, default=100_000, help="tensors at most")
    parser.add_argument("--append", type=Path, metavar="FILE", help="add it to a page of Markdown")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(" tensors  numbers each  ms unwatched  ms more  µs a tensor")
    cases = [(n, 64) for n in (10, 100, 1_000, 10_000, 100_000)]
    rows = []
    for n_tensors, numel in [*cases, (100, 1_024), (100, 16_384), (100, 262_144)]:
        if n_tensors <= arguments.most:
            bare, more = cost_of(n_tensors, numel)
            rows.append((n_tensors, numel, bare, more))
            each = 1e3 * more / n_tensors
            print(f"{n_tensors:8,} {numel:13,} {bare:13.2f} {more:8.3f} {each:12.2f}", flush=True)
    if arguments.append:
        with arguments.append.open("a", encoding="utf-8") as page:
            page.write(section(rows))


if __name__ == "__main__":
    main()
