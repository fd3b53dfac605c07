from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys

import numpy as np
import pytest

from gradscope.run.captured_graph import CapturedGraph


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
        output_shape=(((),), ((3,),), ((3,),)),
        output_dtype=(("float32",),) * 3,
        roots=np.array([0], dtype=np.int32),
    )


def test_says_how_much_it_holds() -> None:
    captured = square_of_a_weight()
    assert (len(captured), captured.n_edges, captured.n_params) == (3, 3, 1)
    assert repr(captured) == "<CapturedGraph: 3 nodes, 3 edges, 1 parameters, 1 roots>"


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
