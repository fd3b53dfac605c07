from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys

import numpy as np
import pytest

from gradscope.run.captured_graph import CapturedGraph, Outputs


def square_of_a_weight() -> CapturedGraph:
    """Loss = sum(w * w), written down by hand."""
    return CapturedGraph(
        ops=("SumBackward0", "MulBackward0", "AccumulateGrad"),
        op=np.array([0, 1, 2], dtype=np.int32),
        sequence_nr=np.array([1, 0, -1], dtype=np.int64),
        source=np.array([1, 2, 2], dtype=np.int32),
        target=np.array([0, 1, 1], dtype=np.int32),
        source_output=np.zeros(3, dtype=np.int32),
        param=np.array([-1, -1, 0], dtype=np.int32),
        params=(("w",),),
        param_shape=((3,),),
        outputs=(Outputs(((),), ("float32",)), Outputs(((3,),), ("float32",))),
        output=np.array([0, 1, 1], dtype=np.int32),
        roots=np.array([0], dtype=np.int32),
    )


def test_says_how_much_it_holds() -> None:
    captured = square_of_a_weight()
    assert (len(captured), captured.n_edges, captured.n_params) == (3, 3, 1)
    assert repr(captured) == "<CapturedGraph: 3 nodes, 3 edges, 1 parameters, 1 roots>"


def test_what_was_not_seen_is_not_there() -> None:
    captured = square_of_a_weight()
    assert captured.call.tolist() == captured.line.tolist() == [-1, -1, -1]
    assert len(captured.calls) == len(captured.saved) == len(captured.registered) == 0
    assert captured.op_of(1) == "MulBackward0"
    assert captured.outputs_of(0).shapes == ((),)


def test_a_leaf_without_a_name_is_no_parameter() -> None:
    assert dataclasses.replace(square_of_a_weight(), params=((),)).n_params == 0


def test_cannot_be_changed_and_survives_pickling() -> None:
    captured = square_of_a_weight()
    with pytest.raises(dataclasses.FrozenInstanceError):
        captured.ops = ()  # type: ignore[misc]
    again = pickle.loads(pickle.dumps(captured))
    assert again.params == captured.params
    np.testing.assert_array_equal(again.target, captured.target)


def test_neither_it_nor_the_picture_needs_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import gradscope.run.captured_graph, gradscope.graphs.autograd_graph\n"
        "late = {'pandas', 'graphviz', 'pygraphviz'} & set(sys.modules)\n"
        "assert not late, late\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
