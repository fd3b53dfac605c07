"""One parameter's step in numbers, as the tables have them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from gradscope.formulas.notation import number
from gradscope.views.explanation import for_json

_WIDTH = 100


class ParameterSummary:
    """What one step did to one parameter.

    Args:
        param: the parameter's name.
        step: the attempt.
        rows: the row of each table that is about them, as mappings by column; of ``state`` a list
            of rows. What is NaN or missing is left out.

    Attributes:
        facts: label and fact, line by line.
    """

    param: str
    step: int
    rows: dict[str, Any]
    facts: tuple[tuple[str, str], ...]

    def __init__(self, param: str, step: int, rows: Mapping[str, Any]) -> None:
        self.param = param
        self.step = step
        self.rows = dict(rows)
        self.facts = tuple((label, fact) for label, fact in self._facts() if fact)

    def _facts(self) -> Iterator[tuple[str, str]]:
        table = {name: _Row(row) for name, row in self.rows.items() if isinstance(row, Mapping)}
        params, grads, groups, moments, updates = (
            table.get(name, _Row({}))
            for name in ("params", "grads", "groups", "moments", "updates")
        )
        yield (
            "parameter",
            _joined(params.text("shape"), params.text("dtype"), params.text("device", "on {}")),
        )
        yield (
            "optimizer",
            _joined(
                updates.text("optimizer") or grads.text("optimizer") or params.text("optimizer"),
                groups.text("group", "group {}") or params.text("group", "group {}"),
                *(groups.named(name) for name in ("lr", "beta1", "beta2", "eps", "momentum")),
                groups.named("weight_decay", "weight decay"),
                groups.text("options"),
                moments.named("step_count", "own step count"),
            ),
        )
        yield (
            "gradient",
            _joined(
                grads.text("status"),
                grads.named("norm"),
                grads.named("mean"),
                grads.named("std"),
                grads.named("abs_max", "greatest magnitude"),
            ),
        )
        yield from self._state(moments)
        yield "denominator", moments.spread("denominator")
        yield "effective lr", moments.spread("effective_lr")
        yield "weight", updates.change("weight_norm", "norm ")
        yield (
            "update",
            _joined(
                updates.named("update_norm", "norm"),
                updates.percent("update_ratio", "of the weight's norm"),
            ),
        )
        yield (
            "  of it",
            _joined(
                *(updates.named(f"{part}_norm", part) for part in ("decay", "momentum", "fresh"))
            ),
        )
        yield (
            "direction",
            _joined(
                updates.named("update_gradient_cosine", "cosine of update and −gradient"),
                moments.named("momentum_gradient_cosine", "of momentum and gradient"),
            ),
        )
        yield (
            "elements",
            _joined(
                updates.percent("unchanged_fraction", "left unchanged by rounding"),
                updates.percent("eps_fraction", "with ε the larger part of the denominator"),
            ),
        )
        yield (
            "formula",
            _joined(
                updates.named("residual", "off by", "of the update"),
                updates.named("rounding", "rounding of the weight alone"),
            ),
        )

    def _state(self, moments: _Row) -> Iterator[tuple[str, str]]:
        of_moments = [
            name.removesuffix("_norm_after") for name in moments if name.endswith("_norm_after")
        ]
        for key in of_moments:
            yield key, moments.change(f"{key}_norm", "norm ")
        held: dict[str, dict[str, _Row]] = {}
        for row in self.rows.get("state") or ():
            held.setdefault(str(row["key"]), {})[str(row["when"])] = _Row(row)
        for key, at in held.items():
            if key in of_moments or (key == "step" and moments.real("step_count") is not None):
                continue
            before, after = at.get("before", _Row({})), at.get("after", _Row({}))
            yield (
                key,
                (
                    _changed(before.real("value"), after.real("value"))
                    or _changed(before.real("norm"), after.real("norm"), "norm ")
                ),
            )

    @property
    def title(self) -> str:
        """The parameter and the step."""
        return f"{self.param}, step {self.step}"

    @property
    def hint(self) -> str:
        """How to look at one weight of it."""
        return f"one weight of it: scope.explain({self.param!r}, index)"

    def to_dict(self) -> dict[str, Any]:
        """Return the rows that it was made from, as plain data for JSON.

        Numbers that are not finite are the texts ``nan``, ``inf`` and ``-inf``.
        """
        return {"param": self.param, "step": self.step, **for_json(self.rows)}

    def to_text(self, width: int = _WIDTH) -> str:
        """Return it as text, in lines of at most ``width`` characters, without the hint."""
        labels = max((len(label) for label, _ in self.facts), default=0)
        lines = (
            textwrap.fill(
                fact,
                max(width, labels + 24),
                initial_indent=f"  {label:<{labels}}  ",
                subsequent_indent=" " * (labels + 4),
                break_long_words=False,
                break_on_hyphens=False,
            )
            for label, fact in self.facts
        )
        return "\n".join([self.title, "", *lines])

    def __str__(self) -> str:
        return f"{self.to_text()}\n\n{self.hint}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        cell = "text-align:left;padding:.05em 1.2em .05em 0"
        rows = "".join(
            f"<tr style='background:none'><td style='{cell}'>{escape(label)}</td>"
            f"<td style='{cell}'>{escape(fact)}</td></tr>"
            for label, fact in self.facts
        )
        return (
            "<div style='font-size:90%;line-height:1.5;max-width:70em'>"
            f"<div><b>{escape(self.title)}</b></div>"
            "<table style='border-collapse:collapse;margin:.6em 0;font-size:inherit;"
            f"line-height:1.5'>{rows}</table>"
            f"<div style='opacity:.7'>{escape(self.hint)}</div></div>"
        )


class _Row:
    """A row of a table, of which any value may be missing."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        self._row = row

    def __iter__(self) -> Iterator[str]:
        return iter(self._row)

    def real(self, column: str) -> float | None:
        value = self._row.get(column)
        try:
            real = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):  # None, pandas' NA, no number
            return None
        return None if real != real else real

    def text(self, column: str, form: str = "{}") -> str:
        value = self._row.get(column)
        # NaN and NA are no texts, and no group has one of them for number.
        missing = value is None or str(value) in ("", "<NA>", "nan", "None")
        return "" if missing else form.format(value)

    def named(self, column: str, name: str = "", after: str = "") -> str:
        value = self.real(column)
        return "" if value is None else f"{name or column} {number(value, 4)} {after}".rstrip()

    def percent(self, column: str, of: str) -> str:
        value = self.real(column)
        return "" if value is None else f"{number(100 * value, 3)} % {of}"

    def change(self, column: str, name: str) -> str:
        return _changed(self.real(f"{column}_before"), self.real(f"{column}_after"), name)

    def spread(self, column: str) -> str:
        places = (("min", "least"), ("mean", "mean"), ("max", "greatest"))
        return _joined(*(self.named(f"{column}_{place}", name) for place, name in places))


def _changed(before: float | None, after: float | None, name: str = "") -> str:
    if after is None:
        return ""
    since = "" if before is None else f"{number(before, 4)} → "
    return f"{name}{since}{number(after, 4)}"


def _joined(*parts: str) -> str:
    return " · ".join(part for part in parts if part)
