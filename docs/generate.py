"""Writes the pages of the documentation that are made from the program itself.

python docs/generate.py           # write them
python docs/generate.py --check   # exit with 1 if one is out of date
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import worked_examples

from gradscope.rules import RULES
from gradscope.run.schema import RANK, STATUSES, TABLES, Kind

DOCS = Path(__file__).parent
NOTE = "<!-- Written by docs/generate.py; change the program, not this page. -->\n"

_TYPES = {
    Kind.COUNT: "integer",
    Kind.OPTIONAL_COUNT: "integer or missing",
    Kind.REAL: "float",
    Kind.SINGLE: "float",
    Kind.FLAG: "bool",
    Kind.TEXT: "text",
    Kind.PARAM: "text",
    Kind.OPTIMIZER: "text",
}


def tables_page() -> str:
    """The page about every table and column."""
    lines = [
        NOTE,
        "# Tables",
        "",
        "Every table is an attribute of the scope and a pandas DataFrame of its own: changing it",
        "changes nothing that was recorded. `scope.tables` gives them all by name. A unit stands",
        "at the end of a column's name (`_ms`).",
        "",
        "In a run that several processes have written, every table begins with the column",
        f"`{RANK.name}`: {RANK.meaning.split(';')[0]}.",
        "",
        f"The statuses of a gradient are {', '.join(f'`{status}`' for status in STATUSES)}.",
        "",
    ]
    for table in TABLES.values():
        lines += [f"## `scope.{table.name}`", "", f"One row per {table.row}.", ""]
        lines += ["| column | type | meaning |", "|---|---|---|"]
        lines += [
            f"| `{column.name}` | {_TYPES[column.kind]} | {column.meaning} |"
            for column in table.columns
        ]
        lines.append("")
    return "\n".join(lines)


def rule_pages() -> dict[Path, str]:
    """One page per rule, and a list of them."""
    pages = {
        DOCS / "rules" / f"{rule.code}.md": f"{NOTE}\n# {rule.documentation()}\n" for rule in RULES
    }
    rows = "\n".join(
        f"| [{rule.code}]({rule.code}.md) | {rule.name} | {rule.severity} |" for rule in RULES
    )
    pages[DOCS / "rules" / "README.md"] = (
        f"{NOTE}\n# Rules\n\n| code | name | severity |\n|---|---|---|\n{rows}\n"
    )
    return pages


def pages() -> dict[Path, str]:
    """Every generated page by its path."""
    one_step = DOCS / "one-step.md"
    return {
        DOCS / "tables.md": tables_page(),
        one_step: worked_examples.filled(one_step.read_text("utf-8")),
        **rule_pages(),
    }


def main() -> int:
    """Write the pages, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    check = parser.parse_args().check
    stale = {
        path: text
        for path, text in pages().items()
        if not path.exists() or not worked_examples.agree(path.read_text("utf-8"), text)
    }
    for path, text in stale.items():
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
        print(("out of date: " if check else "wrote ") + str(path.relative_to(DOCS.parent)))
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
