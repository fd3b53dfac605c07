"""How far the edges of a graph reach, which is what makes a picture of it slow to lay out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from gradscope.run.captured_graph import CapturedGraph


def ranks(captured: CapturedGraph) -> npt.NDArray[np.int64]:
    """The row of each node in a picture, counted upwards from the bottom.

    Returns:
        int64[n]: the number of edges on the longest way from the node down to a node that nothing
        else uses, such as a root.
    """
    source, target = captured.source.tolist(), captured.target.tolist()
    used: list[list[int]] = [[] for _ in range(len(captured))]
    unmet = [0] * len(captured)
    for producer, consumer in zip(source, target, strict=True):
        used[consumer].append(producer)
        unmet[producer] += 1
    rank = [0] * len(captured)
    ready = [node for node, consumers in enumerate(unmet) if not consumers]
    for consumer in ready:  # grows while it is walked
        for producer in used[consumer]:
            rank[producer] = max(rank[producer], rank[consumer] + 1)
            unmet[producer] -= 1
            if not unmet[producer]:
                ready.append(producer)
    return np.array(rank, dtype=np.int64)


def crossed_rows(captured: CapturedGraph) -> int:
    """The number of rows that edges pass through on their way, summed over all edges.

    Graphviz puts an invisible box into each of them; a weight that is used again at every time step
    makes many more of these than there are visible boxes.
    """
    rank = ranks(captured)
    return int((rank[captured.source] - rank[captured.target] - 1).sum())
