"""Which of the processes that train together this one is. Asks nobody: no collective is made."""

from __future__ import annotations

import multiprocessing
import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Place:
    """A process among those that train together.

    Attributes:
        rank: counted from 0.
        world_size: how many there are; 1 for a process that trains by itself.
    """

    rank: int = 0
    world_size: int = 1


def place_now() -> Place:
    """Return the place of this process as far as it is known by now.

    A process group says it once there is one; before that what ``torchrun``, or whoever else starts
    processes for ``init_method="env://"``, puts into the environment.
    """
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        place = Place(distributed.get_rank(), distributed.get_world_size())
        return place if place.rank >= 0 else Place()
    if multiprocessing.parent_process() is not None:
        return Place()  # what the environment says is said of the process that began this one
    try:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        return Place()
    return Place(rank, size) if 0 <= rank < size else Place()


def is_in_group() -> bool:
    """Whether this process belongs to a process group, so that ranks may be meant to agree."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_known_later() -> bool:
    """Whether a process group may yet make this process one of several.

    A worker process that the program has started begins with nothing in its environment.
    """
    return place_now().world_size == 1 and multiprocessing.parent_process() is not None


def is_first() -> bool:
    """Whether this process is the one that speaks for all."""
    return place_now().rank == 0
