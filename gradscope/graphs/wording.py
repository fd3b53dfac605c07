"""What the parts of a graph are called: operations, modules, repetitions, shapes."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from gradscope.graphs.diagram import Box
    from gradscope.graphs.fold import Block, Folded
    from gradscope.graphs.unreached import Unreached
    from gradscope.run.captured_graph import CapturedGraph, Shape

_TIMES: Final = " \N{MULTIPLICATION SIGN} "
_MOST_SHAPES: Final = 2
_MOST_NAMES: Final = 6
_MOST_OPERATIONS: Final = 3
_MOST_PARAMETERS: Final = 2
_BUILT_IN: Final = re.compile(r"(?P<op>.+)Backward\d+")
_WORD_START: Final = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z0-9])(?=[A-Z][a-z])")


@dataclass(frozen=True, slots=True)
class Caption:
    """What stands in a box, or above a frame.

    Attributes:
        title: the lines that say what it is.
        kind: what stands behind the title, less prominently.
        small: further lines.
        breaks_at: after which character a long title may be broken.
    """

    title: tuple[str, ...]
    small: tuple[str, ...] = ()
    kind: str = ""
    breaks_at: str = "."


def operation_name(op: str) -> str:
    """What an operation is called in a picture, from the name of its autograd node.

    Built-in operations get the name they have in torch (``"NllLossBackward0"`` → ``"nll_loss"``),
    a custom Function keeps its class's (``"MyClipBackward"`` → ``"MyClip"``), anything else stays.
    """
    built_in = _BUILT_IN.fullmatch(op)
    if built_in is None:
        return op.removesuffix("Backward") or op
    name = _WORD_START.sub("_", built_in["op"]).lower()
    return "t (transpose)" if name == "t" else name


def shape_text(shape: Shape) -> str:
    """A shape as it is written in a picture: its extents with crosses between, or ``"scalar"``."""
    return _TIMES.join(map(str, shape)) if shape else "scalar"


def shapes_text(shapes: tuple[Shape, ...], n_tensors: int) -> str:
    """What flows along an edge: ``"4 × 8"``, ``"3 tensors 4 × 8"``."""
    if not shapes:
        return ""
    shown = ", ".join(shape_text(shape) for shape in shapes[:_MOST_SHAPES])
    if len(shapes) > _MOST_SHAPES:
        shown += " …"
    return shown if n_tensors == 1 else f"{n_tensors} tensors: {shown}"


def counted(n: int, one: str, many: str | None = None) -> str:
    """A number with its noun: ``"1 operation"``, ``"1,240 operations"``."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def bytes_text(n_bytes: float) -> str:
    """A size in the unit in which it has one to four digits."""
    for unit in ("B", "KiB", "MiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.3g} {unit}" if unit != "B" else f"{n_bytes:.0f} B"
        n_bytes /= 1024
    return f"{n_bytes:.3g} GiB"


def call_name(captured: CapturedGraph, call: int, around: str = "") -> str:
    """What a module is called inside of another one; the outermost by its class."""
    path = captured.calls.path(call)
    if not path:
        return captured.calls.kind(call)
    if path.startswith("<"):
        return path.replace("<", "").replace(">", "")
    return path[len(around) + 1 :] if around and path.startswith(around + ".") else path


def name_in_copies(folded: Folded, module: Block, offset: int, around: str = "") -> str:
    """The name of a module and, if it is another one, that of its counterpart further on.

    Args:
        folded: the tree of blocks.
        module: the block of the module in the first copy.
        offset: how many places further on the counterpart ends.
        around: the path of the frame.
    """
    captured = folded.captured
    parent = captured.calls.parent
    call = int(captured.call[folded.execution.node[module.start + module.period - 1 + offset]])
    while int(parent[call]) != int(parent[module.call]):
        call = int(parent[call])
    first, last = (call_name(captured, each, around) for each in (module.call, call))
    return first if first == last else f"{first} … {last}"


def block_title(folded: Folded, block: Block, around: str = "") -> str:
    """The name of a block, with the number of copies; ``around`` is the path of its frame."""
    captured, node = folded.captured, folded.execution.node
    times = f" ×{block.count:,}" if block.count > 1 else ""
    to_last_copy = block.stop - block.start - block.period
    if block.kind == "module":
        return name_in_copies(folded, block, to_last_copy, around) + times
    if block.kind == "operation":
        return operation_name(captured.op_of(node[block.start])) + times
    if block.kind == "chain":
        ops = node[block.start : block.start + block.period].tolist()
        return " → ".join(operation_name(captured.op_of(op)) for op in ops) + times
    if block.kind == "sequence":
        modules = (part for part in folded.parts(block) if part.kind == "module")
        names = (name_in_copies(folded, part, to_last_copy, around) for part in modules)
        telling = next((name for name in names if "…" in name), "")
        return (telling + times).strip()
    return counted(block.n_operations, "operation") + times


def block_kind(folded: Folded, block: Block) -> str:
    """The class of a module; what else a block is, in words."""
    captured = folded.captured
    if block.kind == "module":
        kind = captured.calls.kind(block.call)
        return "" if call_name(captured, block.call) == kind else kind
    if block.kind in ("sequence", "stretch"):
        nodes = folded.nodes(block)[: block.period].tolist()
        common = Counter(operation_name(captured.op_of(node)) for node in nodes)
        listed = [name for name, _ in common.most_common(_MOST_OPERATIONS)]
        return ", ".join(listed) + (" …" if len(common) > _MOST_OPERATIONS else "")
    return ""


def box_caption(folded: Folded, box: Box, around: str = "", like: str = "") -> Caption:
    """What stands in a box.

    Args:
        folded: the tree of blocks.
        box: the box.
        around: the path of the module in whose frame it lies.
        like: the path of a module that is shown and has the same inside.
    """
    captured = folded.captured
    if box.missing is not None:
        return missing_caption(box.missing, around)
    if box.leaf >= 0:
        names = captured.params[box.leaf]
        if len(names) == 1 and around and names[0].startswith(around + "."):
            names = (names[0][len(around) + 1 :],)
        return leaf_caption(names, captured.param_shape[box.leaf])
    if box.block is None:
        return Caption((counted(len(box.leaves), "parameter or leaf", "parameters and leaves"),))
    block = box.block
    small = []
    if block.can_open and box.leaves:
        inside = around
        if block.kind == "module":
            inside = captured.calls.path(block.call)
        each = " each" if block.count > 1 else ""
        small.append(_parameters(captured, box.leaves, inside) + each)
    if like:
        small.append(f"inside like {like}")
    return Caption(
        (block_title(folded, block, around),),
        tuple(small),
        block_kind(folded, block),
        " " if block.kind in ("chain", "module") else "_",
    )


def leaf_caption(names: tuple[str, ...], shape: Shape) -> Caption:
    """What stands in the box of a parameter, or of another leaf without names."""
    if not names:
        return Caption(("leaf tensor",), (shape_text(shape),))
    title = [names[0], *(f"= {name}" for name in names[1:_MOST_NAMES])]
    if len(names) > _MOST_NAMES:
        title.append(f"… {len(names)} names")
    return Caption(tuple(title), (shape_text(shape),))


def missing_caption(missing: Unreached, around: str = "") -> Caption:
    """What stands in the box of something that does not lead to the loss."""
    path = missing.path
    if around and path.startswith(around + "."):
        path = path[len(around) + 1 :]
    why = {
        "cut off": f"cut off: {counted(missing.n_operations, 'operation')} made for nothing",
        "no grad": "ran without gradients",
        "not called": "never called",
        "frozen": "frozen",
        "unused": "not used",
    }[missing.why]
    small = [missing.what] if missing.what not in ("", "parameter") else []
    if missing.what != "parameter" and missing.params:
        small.append(counted(len(missing.params), "parameter"))
    return Caption((path,), (*small, why))


def _parameters(captured: CapturedGraph, leaves: list[int], around: str) -> str:
    names = [captured.params[leaf] for leaf in leaves]
    if len(leaves) > _MOST_PARAMETERS or not all(names):
        return (
            counted(len(leaves), "parameter")
            if all(names)
            else counted(len(leaves), "leaf", "leaves")
        )
    shown = []
    for leaf, (name, *others) in zip(leaves, names, strict=True):
        inner = name[len(around) + 1 :] if around and name.startswith(around + ".") else name
        tied = "".join(f" = {other}" for other in others)
        shown.append(f"{inner}{tied} {shape_text(captured.param_shape[leaf])}")
    return ", ".join(shown)
