"""A graph as DataFrames: its nodes, its edges, its modules, and what does not lead to the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gradscope.graphs.unreached import operations_made, unreached

if TYPE_CHECKING:
    import numpy.typing as npt
    import pandas as pd

    from gradscope.graphs.fold import Folded
    from gradscope.run.captured_graph import CapturedGraph, LongIntegers


def nodes_frame(
    folded: Folded, saved_bytes: np.ndarray[tuple[int], np.dtype[np.int64]]
) -> pd.DataFrame:
    """One row per node; the columns are told at ``AutogradGraph.nodes``."""
    import pandas as pd

    captured = folded.captured
    calls = captured.calls
    aliases = [captured.params[leaf] if leaf >= 0 else () for leaf in captured.param.tolist()]
    call = captured.call.tolist()
    outputs = [captured.outputs[output] for output in captured.output.tolist()]
    lines = [captured.lines[line] if line >= 0 else ("", 0) for line in captured.line.tolist()]
    is_root = np.zeros(len(captured), np.bool_)
    is_root[captured.roots] = True

    def texts(values: list[str | None]) -> pd.Series[str]:
        return pd.Series(values, dtype=object)

    return pd.DataFrame(
        {
            "op": texts([captured.ops[op] for op in captured.op.tolist()]),
            "sequence_nr": captured.sequence_nr,
            "module": texts([calls.path(c) if c >= 0 else None for c in call]),
            "module_type": texts([calls.kind(c) if c >= 0 else None for c in call]),
            "call": captured.call,
            "param": texts([names[0] if names else None for names in aliases]),
            "aliases": pd.Series(aliases, dtype=object),
            "output_shape": pd.Series([each.shapes for each in outputs], dtype=object),
            "output_dtype": pd.Series([each.dtypes for each in outputs], dtype=object),
            "saved_bytes": saved_bytes,
            "is_root": is_root,
            "is_crossing": is_crossing(captured),
            "file": texts([file or None for file, _ in lines]),
            "line": pd.Series([line or None for _, line in lines], dtype="Int64"),
        },
        index=pd.RangeIndex(len(captured), name="node"),
    )


def edges_frame(captured: CapturedGraph) -> pd.DataFrame:
    """One row per use of an output; the columns are told at ``AutogradGraph.edges``."""
    import pandas as pd

    shapes = [captured.outputs_of(node).shapes for node in captured.source.tolist()]
    flowing = [
        of[output] if output < len(of) else None
        for of, output in zip(shapes, captured.source_output.tolist(), strict=True)
    ]
    return pd.DataFrame(
        {
            "source": captured.source,
            "target": captured.target,
            "source_output": captured.source_output,
            "shape": pd.Series(flowing, dtype=object),
        }
    )


def modules_frame(folded: Folded, saved_bytes: LongIntegers) -> pd.DataFrame:
    """One row per module call; the columns are told at ``AutogradGraph.modules``."""
    import pandas as pd

    captured, calls = folded.captured, folded.captured.calls
    made, reached = operations_made(captured)
    inside = captured.call >= 0
    kept = np.bincount(
        captured.call[inside], weights=saved_bytes[inside], minlength=len(calls)
    ).astype(np.int64)
    numbers = range(len(calls))
    return pd.DataFrame(
        {
            "module": pd.Series([calls.path(call) for call in numbers], dtype=object),
            "module_type": pd.Series([calls.kind(call) for call in numbers], dtype=object),
            "parent": calls.parent,
            "nodes_made": made,
            "nodes_reached": reached,
            "saved_bytes": calls.with_inner(kept),
            "without_grad": calls.without_grad,
        },
        index=pd.RangeIndex(len(calls), name="call"),
    )


def unreached_frame(captured: CapturedGraph) -> pd.DataFrame:
    """One row per thing that does not lead to the loss; see ``AutogradGraph.unreached``."""
    import pandas as pd

    found = unreached(captured)

    def texts(values: list[str | None]) -> pd.Series[str]:
        return pd.Series(values, dtype=object)

    return pd.DataFrame(
        {
            "path": texts([each.path for each in found]),
            "type": texts([each.what for each in found]),
            "why": texts([each.why for each in found]),
            "nodes_made": pd.Series([each.n_operations for each in found], dtype="int64"),
            "params": pd.Series(
                [tuple(param.names[0] for param in each.params) for each in found], dtype=object
            ),
            "taken_by": pd.Series([each.taken_by for each in found], dtype=object),
        }
    )


def is_crossing(captured: CapturedGraph) -> npt.NDArray[np.bool_]:
    """Return bool[n], which nodes belong to earlier steps; none where that is not known."""
    if captured.began is None:
        return np.zeros(len(captured), np.bool_)
    return (captured.sequence_nr >= 0) & (captured.sequence_nr < captured.began)
