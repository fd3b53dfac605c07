"""``make_dot()``: the picture that torchviz draws, of any graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

from gradscope.capturing import Capture, graph
from gradscope.errors import RenderError, UsageError
from gradscope.graphs.detail import MAX_NODES

if TYPE_CHECKING:
    import graphviz

    from gradscope.graphs.detail import Depth
    from gradscope.graphs.likeness import Likeness

Engine = Literal["gradscope", "torchviz"]


def make_dot(
    var: Any,
    params: Any = None,
    show_attrs: bool = False,
    show_saved: bool = False,
    max_attr_chars: int = 50,
    *,
    fold: Likeness | None = None,
    depth: Depth = None,
    max_nodes: int | None = None,
    capture: Capture | None = None,
    engine: Engine = "gradscope",
) -> graphviz.Digraph:
    """Draw the autograd graph behind tensors as ``torchviz.make_dot`` does, whatever its size.

    The same call gives the same picture: grey boxes are operations, blue ones leaves that require
    grad, orange ones saved tensors, green ones what was passed. It works where torchviz does not:
    on deep graphs, after the backward, with lists, dicts and dataclasses, and without running the
    forward of a checkpoint again.

    With any of ``fold``, ``depth``, ``max_nodes`` and ``capture`` it is the picture of
    :meth:`AutogradGraph.to_graphviz` instead: repetitions drawn once, and modules as frames where
    ``capture`` knows them.

    Args:
        var: a tensor, or any nesting of tensors in tuples, lists, dicts and dataclasses.
        params: names of the leaves: a dict, the pairs of ``named_parameters()``, or a module. A
            tensor with several names gets them all.
        show_attrs: whether operations list what they have saved.
        show_saved: whether saved tensors have boxes of their own.
        max_attr_chars: how long a listed value may be.
        fold: what must agree for a repetition to be drawn once: ``"op"``, ``"shape"``, ``"exact"``.
        depth: how many levels of modules are opened.
        max_nodes: how many boxes there may be.
        capture: what :func:`gradscope.capture` saw of the forward.
        engine: ``"torchviz"`` hands over to torchviz itself.

    Raises:
        UsageError: if an argument is none of these, or they do not go together.
        RenderError: if torchviz was asked for and cannot draw it.
    """
    is_folded = capture is not None or any(
        option is not None for option in (fold, depth, max_nodes)
    )
    if engine not in get_args(Engine):
        raise UsageError(f"engine={engine!r}: pass 'gradscope' or 'torchviz'")
    if is_folded and (show_attrs or show_saved or engine == "torchviz"):
        raise UsageError(
            "fold, depth, max_nodes and capture make a picture of their own, without saved "
            "tensors: pass either these, or show_attrs, show_saved and engine"
        )
    if is_folded:
        of = graph(var, params) if capture is None else capture.graph(var)
        return of.to_graphviz(fold=fold, depth=depth, max_nodes=max_nodes or MAX_NODES)
    if engine == "torchviz":
        return _by_torchviz(var, params, show_attrs, show_saved, max_attr_chars)
    from gradscope.graphs.torchviz_style import draw_statements
    from gradscope.instruments.dot_statements import dot_statements

    statements = dot_statements(
        var,
        params,
        show_attrs=show_attrs,
        show_saved=show_saved,
        max_attr_chars=max_attr_chars,
    )
    return draw_statements(statements)


def _by_torchviz(var: Any, params: Any, *options: Any) -> graphviz.Digraph:
    from gradscope.instruments.passed import named_tensors, tensors_in

    try:
        import torchviz
    except ImportError as error:  # it needs distutils, which Python has dropped in 3.12
        raise RenderError(
            f"torchviz cannot be imported ({error}); engine='gradscope' draws the same picture"
        ) from error
    outputs = tensors_in("var", var)
    try:
        picture: graphviz.Digraph = torchviz.make_dot(
            outputs[0] if len(outputs) == 1 else tuple(outputs),
            dict(named_tensors("params", params)),
            *options,
        )
    except RecursionError:
        raise RenderError(
            "the graph is too deep for torchviz, which walks it by recursion; engine='gradscope' "
            "draws the same picture"
        ) from None
    return picture
