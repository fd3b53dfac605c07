"""Runs the matrix, prints how many cells there are of each kind, and writes docs/matrix.md.

python tests/matrix                    # everything
python tests/matrix --only LSTM        # the loops with this in their title; writes no page
python tests/matrix --results FOLDER   # goes on from the loops whose results lie there
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS)]


def results_of(titles: list[str], jobs: int, folder: Path | None) -> Iterator[list[list[str]]]:
    """Give the results of each loop, in order; those that lie in the folder are not run again."""
    from loops import run_feature

    def kept(title: str) -> Path | None:
        return None if folder is None else folder / f"{title}.json"

    to_run = [t for t in titles if (path := kept(t)) is None or not path.exists()]
    # A process of its own for every few loops: what was compiled takes memory.
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=6) as pool:
        fresh = pool.imap(run_feature, to_run)
        for title in titles:
            path = kept(title)
            if title not in to_run and path is not None:
                yield json.loads(path.read_text("utf-8"))
                continue
            results = next(fresh)
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(results), "utf-8")
            yield results


def main() -> int:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="part of a loop's title")
    parser.add_argument("--jobs", type=int, default=1, help="how many processes")
    parser.add_argument("--results", type=Path, help="a folder to keep results in")
    options = parser.parse_args()
    from cell import Cell, Outcome
    from cells import FEATURES, kind_of
    from page import PAGE, counts, page

    chosen = [feature for feature in FEATURES if options.only in feature.title]
    outcomes: dict[Cell, Outcome] = {}
    failed = []
    titles = [feature.title for feature in chosen]
    for feature, results in zip(
        chosen, results_of(titles, options.jobs, options.results), strict=True
    ):
        verdicts = Counter(verdict for _, verdict, _ in results)
        told = ", ".join(f"{n} {verdict}" for verdict, n in verdicts.items())
        print(f"{feature.title:32} {told}", flush=True)
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
