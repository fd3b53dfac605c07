"""GS305: graphs of earlier steps are kept, or walked again and again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gradscope.rules.facts import at, place_of
from gradscope.rules.finding import Finding, Severity
from gradscope.rules.rule import Rule
from gradscope.run.recording import Recording

if TYPE_CHECKING:
    import pandas as pd

_LEAST_KEPT = 20
"""How many graphs must be held at once. Programs keep a handful on purpose: the losses of the last
ten steps, an episode, a replay."""

_EVERY_ONE = 0.9
"""Which share of a stretch of backwards must have left its graph behind."""

_LEAST_LOOKS = 2

_GROWN = 1.3
"""By which factor a graph with older parts must have grown between two looks."""

_SECOND_TIME = "second time"
_INPLACE = "inplace operation"
"""What torch says when a graph is walked again: after its tensors were freed, or after the weights
that it remembers have changed."""


class RetainedGraph(Rule):
    """GS305 retained-graph: graphs of earlier steps stay alive, or are part of the loss.

    ## What it finds

    Either something keeps the graph of every loss, such as a running sum of tensors or a list of
    predictions, so that the number of live graphs grows step by step; or the graph of a loss
    reaches back into earlier steps because a state was carried over without `detach()`.

    ## Why it matters

    In the first case memory grows until there is none left. In the second each backward walks all
    earlier steps, too: it takes longer and longer, or raises "Trying to backward through the graph
    a second time".

    ## How it is found

    gradscope hangs a mark on the graph of every backward, on its root and the few operations behind
    it, and counts, at each later one, how many
    are still there; and at closer looks it counts the nodes of the graph that are older than the
    step. The finding is raised when at least 20 backwards in a row each left their graph behind,
    when the older part grows from look to look, or when backward raises on such a graph.

    ## Example

        running_loss += loss            # a tensor, with all graphs behind it
        output, hidden = rnn(x, hidden) # reaches back to the first step

    ## Fix

        running_loss += loss.item()
        output, hidden = rnn(x, hidden.detach())

    ## When it is wrong

    When graphs are kept on purpose for a long time, to be propagated back together.
    """

    code = "GS305"
    name = "retained-graph"
    severity = Severity.ERROR
    tables = ("backwards", "events", "steps")
    symptom_of = ("GS314", "GS402", "GS502", "GS110", "GS106")

    def check(self, run: Recording) -> list[Finding]:
        """Return at most one finding."""
        backwards = run.frame("backwards")
        backwards = backwards.loc[backwards["function"] == "backward"]
        if backwards.empty:
            return []
        for judge in (self._raised, self._reaches_back, self._kept):
            finding = judge(run, backwards)
            if finding is not None:
                return [finding]
        return []

    def _raised(self, run: Recording, backwards: pd.DataFrame) -> Finding | None:
        last = backwards.iloc[-1]
        events = run.frame("events")
        said = events.loc[events["event"] == "exception", "detail"].tail(1)
        if not last["error"] or said.empty or len(backwards) < 2:
            return None
        text = str(said.iloc[0])
        is_again = _SECOND_TIME in text and last.isna()["repeats"]
        # The graph of the one that raised need not have been walked; that of the one before tells.
        walked = backwards.loc[backwards["n_nodes"].notna() & backwards["n_old_nodes"].notna()]
        nodes, old = (
            (int(walked[name].iloc[-1]) for name in ("n_nodes", "n_old_nodes"))
            if len(walked)
            else (0, 0)
        )
        reaches_back = 0 < old < nodes
        if not is_again and not (reaches_back and _INPLACE in text):
            return None
        file, line = place_of(last)
        part = f": {old} of its {nodes} operations are of earlier steps" if (reaches_back) else ""
        return self.finding(
            message=(
                f"backward(){at(file, line)} raised {last['error']} because the graph of the loss "
                f"reaches back into an earlier iteration{part}"
            ),
            fix=(
                "detach what is carried over from one iteration to the next, such as a hidden "
                "state: hidden = hidden.detach(); and compute anew what is made of parameters"
            ),
            step_first=None if last.isna()["step"] else int(last["step"]),
            step_last=None if last.isna()["step"] else int(last["step"]),
            count=1,
            file=file,
            line=line,
            evidence={"raised": text, "n_old_nodes": old if reaches_back else 0},
        )

    def _reaches_back(self, run: Recording, backwards: pd.DataFrame) -> Finding | None:
        seen = backwards.loc[backwards["n_nodes"].notna() & (backwards["n_old_nodes"] > 0)]
        # Each loss by itself: several backwards of a step have graphs of their own sizes.
        for _, rows in seen.groupby(["file", "line"], dropna=False, sort=False):
            old = rows["n_old_nodes"].to_numpy(dtype=float)
            nodes = rows["n_nodes"].to_numpy(dtype=float)
            if len(rows) < _LEAST_LOOKS or (old >= nodes).any():
                continue
            if not (np.diff(old) > 0).all() or old[-1] < _GROWN * old[0]:
                continue
            file, line = place_of(rows.iloc[0])
            return self.finding(
                message=(
                    f"the graph of the loss given to backward(){at(file, line)} reaches back into "
                    f"earlier steps and grows: from {int(nodes[0])} operations to "
                    f"{int(nodes[-1])}, of which {int(old[-1])} are older than the step"
                ),
                fix=(
                    "detach what is carried over from one iteration to the next, such as a hidden "
                    "state: hidden = hidden.detach()"
                ),
                step_first=_step(rows.iloc[0]),
                step_last=_step(rows.iloc[-1]),
                count=len(rows),
                file=file,
                line=line,
                evidence={"n_nodes": int(nodes[-1]), "n_old_nodes": int(old[-1])},
            )
        return None

    def _kept(self, run: Recording, backwards: pd.DataFrame) -> Finding | None:
        alive = backwards["n_alive"].to_numpy()
        peak = int(np.argmax(alive))
        if alive[peak] < _LEAST_KEPT:
            return None
        # The stretch over which the number grew to its greatest.
        began = int(np.flatnonzero(alive[: peak + 1] <= alive[peak] * 0.1)[-1:].sum())
        grown = int(alive[peak] - alive[began])
        if grown < _EVERY_ONE * (peak - began) or grown < _LEAST_KEPT * 0.8:
            return None
        row = backwards.iloc[peak]
        file, line = place_of(row)
        to_the_end = peak >= len(alive) - 2
        return self.finding(
            severity=Severity.ERROR if to_the_end else Severity.WARNING,
            message=(
                f"the graphs of {int(alive[peak])} earlier losses are still held at backward "
                f"{peak}{at(file, line)}, one more after each step: something keeps the loss "
                "itself, such as running_loss += loss, or the prediction, instead of its value"
            ),
            fix="keep loss.item() and prediction.detach() in sums and lists, not themselves",
            step_first=_step(backwards.iloc[began]),
            step_last=_step(row),
            count=grown,
            file=file,
            line=line,
            evidence={
                "graphs_alive": int(alive[peak]),
                "backwards": len(alive),
                "alive_at_the_end": int(alive[-1]),
            },
        )


def _step(row: pd.Series) -> int | None:
    return None if row.isna()["step"] else int(row["step"])
