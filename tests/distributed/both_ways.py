"""Runs every loop without a watch and with one, in one process: ``python both_ways.py FOLDER``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import loops
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import gradscope


def plain(model: torch.nn.Module) -> list[torch.Tensor]:
    return [
        (value.to_local() if hasattr(value, "to_local") else value).clone()
        for value in model.state_dict().values()
    ]


def traces() -> list[Any]:
    from torch.optim import optimizer as base

    return [
        torch.autograd._engine_run_backward,
        torch.nn.Module.__call__,
        torch.optim.Optimizer.__init__,
        DistributedDataParallel.forward,
        dict(base._global_optimizer_pre_hooks),
        dict(base._global_optimizer_post_hooks),
    ]


def found_live(rank: int) -> bool:
    """Whether every rank learns while it trains that they are apart, and only where they are."""
    codes = {}
    for name in ("other_seeds", "past_the_wrapper", "wrapped", "independent", "columns"):
        scopes = []

        def watch(model: Any, optimizer: Any, scopes: Any = scopes) -> Any:
            scopes.append(gradscope.watch(model, optimizer, sync_every=3, on_error="raise"))
            return scopes[-1]

        loops.LOOPS[name](rank, watch)
        codes[name] = [(f.code, f.step_first, f.count) for f in scopes[0].findings]
    return codes == {
        "other_seeds": [("GS801", 0, 4)],
        "past_the_wrapper": [("GS801", 3, 3)],
        "wrapped": [],
        "independent": [],
        "columns": [],
    }


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    loops.begin(rank, os.environ["MASTER_PORT"])
    before, result = traces(), {}
    for name, loop in loops.LOOPS.items():
        twin = plain(loop(rank, loops.unwatched))
        torch.manual_seed(3)

        def watch(model: Any, optimizer: Any, name: str = name) -> Any:
            return gradscope.watch(model, optimizer, save=folder / name, every=3, on_error="raise")

        found = plain(loop(rank, watch))
        same = all(torch.equal(a, b) for a, b in zip(twin, found, strict=True))
        result[name] = same and len(twin) == len(found)
    result["found live"] = found_live(rank)
    result["no traces"] = traces() == before
    (folder / f"rank{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
