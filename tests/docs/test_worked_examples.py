"""Pages whose programs are run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "docs"))
import worked_examples

PAGE = """Some words.

```python
x = 2
print(x / 3, "of it")
```

```text
```

```python
print(x)
```

```text
stale
```
"""


def test_what_a_program_prints_is_written_under_it() -> None:
    filled = worked_examples.filled(PAGE)
    assert "```text\n0.6666666666666666 of it\n```" in filled
    assert "```text\n2\n```" in filled
    assert worked_examples.filled(filled) == filled


def test_a_program_that_fails_is_an_error() -> None:
    with pytest.raises(NameError):
        worked_examples.filled("```python\nprint(nothing)\n```\n\n```text\n```\n")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("loss 0.12345 at step 3", "loss 0.12346 at step 3", True),
        ("loss 0.123 at step 3", "loss 0.124 at step 3", False),
        ("loss 0.123 at step 3", "loss 0.123 at step 4", False),
        ("off by 3e-08", "off by 9e-09", True),
        ("off by 3e-08", "off by 3e-02", False),
        ("a difference of 0.45: rounding", "a difference of 0.31: rounding", True),
        ("−0.5", "0.5", False),
        ("fresh 1", "stale 1", False),
        ("one line", "one line\nand another", False),
        ("ends with 3.", "ends with 3.", True),
    ],
)
def test_numbers_may_differ_by_rounding_and_words_not_at_all(
    one: str, other: str, same: bool
) -> None:
    assert worked_examples.agree(one, other) is same
