"""Runs the matrix, prints how many cells there are of each kind, and writes docs/matrix.md.

python tests/matrix               # everything
python tests/matrix --only LSTM   # the loops with this in their title; writes nothing
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS)]


def main() -> int:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="part of a loop's title")
    parser.add_argument("--jobs", type=int, default=1, help="how many processes")
    options = parser.parse_args()
    from cell import Cell, Outcome
    from cells import FEATURES, kind_of
    from loops import run_feature
    from page import PAGE, counts, page

    chosen = [feature for feature in FEATURES if options.only in feature.title]
    outcomes: dict[Cell, Outcome] = {}
    failed = []
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.jobs, maxtasksperchild=6) as pool:
        for feature, (results, seconds) in zip(
            chosen, pool.imap(run_feature, [f.title for f in chosen]), strict=True
        ):
            verdicts = Counter(verdict for _, verdict, _ in results)
            told = ", ".join(f"{n} {verdict}" for verdict, n in verdicts.items())
            print(f"{feature.title:32} {seconds:6.1f} s  {told}", flush=True)
            for kind, verdict, detail in results:
                if verdict == "failed":
                    failed.append(f"{feature.title}: {kind}")
                    print(f"{failed[-1]}\n{detail}", flush=True)
                else:
                    outcomes[Cell(feature, kind_of(kind))] = Outcome(verdict, detail)
    print(counts(outcomes))
    if failed:
        print(f"{len(failed)} cells failed: {', '.join(failed)}")
        return 1
    if not options.only:
        PAGE.write_text(page(outcomes), "utf-8")
        print(f"wrote {PAGE.relative_to(TESTS.parent)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
