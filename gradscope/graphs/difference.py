"""What is different between two graphs, to be read and to be counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from gradscope.graphs.labels import with_glyphs

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable

    import pandas as pd

Kind: TypeAlias = Literal["operation", "parameter", "module"]
How: TypeAlias = Literal["appeared", "vanished", "changed"]

_MOST_LINES: Final = 40
_LONGEST_LINE: Final = 110
_SIGNS: Final = {"appeared": "+", "vanished": "-", "changed": "~"}


@dataclass(frozen=True, slots=True)
class Change:
    """One difference, or several of a module that read the same.

    Attributes:
        how: in which way.
        module: path of the module; ``""`` for the model itself, and for the program around it.
        kind: what it is about.
        what: the operation with its output, the parameter, or what the module is.
        n: how many operations, parameters or calls this is true of.
        before, after: what was and is, for what has changed; else empty.
        owner: what the module is called.
        weight: how many operations are concerned.
        likeness: equal for differences that are the same but for the numbers of modules.
    """

    how: How
    module: str
    kind: Kind
    what: str
    n: int
    before: str
    after: str
    owner: str
    weight: int
    likeness: Hashable

    def __str__(self) -> str:
        text = self.what if self.kind == "operation" else f"{self.kind} {self.what}"
        if self.before or self.after:
            text += f"  {self.before or 'nothing'} → {self.after or 'nothing'}"
        return f"{_SIGNS[self.how]} {text}" + (f"  ×{self.n:,}" if self.n > 1 else "")


class GraphDifference:
    """What appeared, vanished or changed from one graph to another; False if nothing did.

    Args:
        changes: the differences.

    Attributes:
        changes: the differences: modules, operations, parameters, each in the order of the forward.
    """

    def __init__(self, changes: Iterable[Change]) -> None:
        self.changes = tuple(changes)

    def __bool__(self) -> bool:
        return bool(self.changes)

    @property
    def appeared(self) -> pd.DataFrame:
        """What only the second graph has: one row per module and thing.

        Columns: ``module`` (path; ``""`` for the model itself and the program around it), ``kind``
        (``operation``, ``parameter`` or ``module``), ``what``, ``n`` (how many of them). Of a
        module that is new as a whole there is one row, and none for what is inside.
        """
        return self.to_pandas("appeared")

    @property
    def vanished(self) -> pd.DataFrame:
        """What only the first graph has; the columns are those of ``appeared``."""
        return self.to_pandas("vanished")

    @property
    def changed(self) -> pd.DataFrame:
        """What both graphs have, but not alike.

        Columns: those of ``appeared``, then ``before`` and ``after``, in words.
        """
        return self.to_pandas("changed")

    def to_pandas(self, how: How | None = None) -> pd.DataFrame:
        """All differences as one table.

        Args:
            how: only ``"appeared"``, ``"vanished"`` or ``"changed"``, and only their columns; by
                default everything, with a first column ``difference`` that says which.
        """
        import pandas as pd

        columns = ["module", "kind", "what", "n", "before", "after"]
        if how is None:
            columns.insert(0, "difference")
        elif how != "changed":
            columns = columns[:4]
        told = [each for each in self.changes if how in (None, each.how)]
        return pd.DataFrame(
            {
                column: pd.Series(
                    [getattr(each, "how" if column == "difference" else column) for each in told],
                    dtype="int64" if column == "n" else object,
                )
                for column in columns
            }
        )

    def __repr__(self) -> str:
        if not self:
            return "no difference between the two graphs"
        how_often = Counter(dict.fromkeys(_SIGNS, 0))
        for each in self.changes:
            how_often[each.how] += each.n
        lines = [", ".join(f"{n:,} {how}" for how, n in how_often.items() if n)]
        groups = _by_modules(self.changes)
        for number, (title, told) in enumerate(groups):
            room = _MOST_LINES - len(lines) - 2
            n_left = sum(len(each) for _, each in groups[number:])
            if len(told) > room or (len(told) == room and number + 1 < len(groups)):
                if room > 2:
                    lines += [title, *told[: room - 1]]
                    n_left -= room - 1
                lines.append(f"… and {n_left:,} more; .to_pandas() has everything")
                break
            lines += [title, *told]
        return "\n".join(
            line if len(line) <= _LONGEST_LINE else f"{line[: _LONGEST_LINE - 1]}…"
            for line in map(with_glyphs, lines)
        )


def _by_modules(changes: Iterable[Change]) -> list[tuple[str, list[str]]]:
    """Return titles and lines: what is the same in several modules once, the biggest first."""
    alike: dict[Hashable, list[Change]] = {}
    for each in changes:
        alike.setdefault((each.likeness, each.n), []).append(each)
    groups: dict[tuple[str, ...], list[list[Change]]] = {}
    for same in alike.values():
        groups.setdefault(tuple(dict.fromkeys(each.owner for each in same)), []).append(same)

    def weight(same: list[Change]) -> int:
        return sum(each.weight for each in same)

    told = []
    for owners, contents in sorted(groups.items(), key=lambda item: -sum(map(weight, item[1]))):
        title = owners[0]
        if len(owners) > 1:
            title = f"×{len(owners):,} modules {owners[0]} … {owners[-1]}"
        told.append(
            (title, [f"  {same[0]}" for same in sorted(contents, key=lambda s: -weight(s))])
        )
    return told
