"""An order in which every arrow leads forwards."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence


def topological_order(
    n: int, arrows: Iterable[tuple[int, int]], priority: Sequence[int]
) -> list[int]:
    """Return the numbers below ``n`` so that none comes after one that an arrow leads to from it.

    Args:
        n: how many there are.
        arrows: (from, to), without a circle; what lies on one is left out.
        priority: of each, what decides where the arrows leave a choice; the least comes first.
    """
    targets: list[list[int]] = [[] for _ in range(n)]
    unmet = [0] * n
    for source, target in arrows:
        targets[source].append(target)
        unmet[target] += 1
    ready = [(priority[number], number) for number in range(n) if not unmet[number]]
    heapq.heapify(ready)
    order = []
    while ready:
        _, number = heapq.heappop(ready)
        order.append(number)
        for target in targets[number]:
            unmet[target] -= 1
            if not unmet[target]:
                heapq.heappush(ready, (priority[target], target))
    return order
