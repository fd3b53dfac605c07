"""Whatever happens to the files of a run: a clear word, no crash, nothing written elsewhere."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded_loops import recorded
from torch import nn

import gradscope
from gradscope.errors import GradscopeError, RunDirectoryError
from gradscope.rules import RULES
from gradscope.run.directory.layout import read_json, write_json
from gradscope.run.schema import TABLES

HOSTILE = [
    "</script><script>alert(1)</script>",
    "../../../etc/passwd",
    "/absolute",
    "a\0b",
    "👩‍🔬 emoji",
    "x" * 10_000,
    "line\nbreak\r\t",
    "\ud800 half a pair",
    "'; drop table grads; --",
    "nan",
]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("healthy") / "run"
    recorded(path, 12, keep="0.weight", every=3)
    return path


def everything_of(path: Path) -> gradscope.Run:
    """Open a run and ask it everything; only gradscope's own errors may come."""
    run = gradscope.open(path)
    assert run.tables.keys()
    repr(run), run.latest, run.overhead, run.notes
    for name in run.tables:
        asked(lambda name=name: run.table(name))
        asked(lambda name=name: run.dataset(name).count_rows())
    for step in (-1, 0, 3):
        for param, index in (("0.weight", (0, 0)), ("2.bias", 1), ("0.weight", None)):
            asked(lambda p=param, i=index, s=step: repr(run.explain(p, i, s)))
        asked(lambda s=step: run.tensors("0.weight", s))
    asked(lambda: run.graph().to_json())
    asked(lambda: repr(run.graph()))
    return run


def asked(question: Any) -> Any:
    try:
        return question()
    except GradscopeError:
        return None


def files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


def copies(healthy: Path, tmp_path: Path, n: int) -> Iterator[tuple[Path, Path, random.Random]]:
    """Copies of a run, and one file of each to be damaged; every kind of file takes its turn."""
    kinds: dict[tuple[str, str], Path] = {}
    for file in files_of(healthy):
        kinds.setdefault((file.parent.name, file.suffix), file)
    chance = random.Random(n)
    for number in range(n):
        for file in kinds.values():
            copy = tmp_path / f"{number}"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(healthy, copy)
            yield copy, copy / file.relative_to(healthy), chance


def test_a_healthy_run_answers_everything(healthy: Path) -> None:
    run = everything_of(healthy)
    assert run.notes == ()
    assert run.findings.unchecked == {}


def opened(path: Path) -> gradscope.Run | None:
    try:
        return everything_of(path)
    except RunDirectoryError:  # the directory as a whole; its files only get a note
        return None


def test_torn_files_are_named_and_skipped(healthy: Path, tmp_path: Path) -> None:
    for copy, file, chance in copies(healthy, tmp_path, 1):
        content = file.read_bytes()
        file.write_bytes(content[: chance.randrange(len(content))])
        run = opened(copy)
        if run is None:
            assert file.name == "run.json"
        else:
            assert any(file.name in note for note in run.notes), (file, run.notes)
            if file.parent.name != "steps":
                assert len(run.steps) == 12


@pytest.mark.parametrize("name", [*TABLES, "parameters.json"])
def test_rules_about_what_cannot_be_read_are_not_applied(
    healthy: Path, tmp_path: Path, name: str
) -> None:
    codes = {finding.code for finding in gradscope.open(healthy).findings}
    copy = tmp_path / "run"
    shutil.copytree(healthy, copy)
    files = [copy / name] if name.endswith("json") else files_of(copy / name)
    for file in files:
        file.write_bytes(file.read_bytes()[:-20])
    run = gradscope.open(copy)
    assert {finding.code for finding in run.findings} <= codes
    if name in ("params", "models"):  # made of parameters.json
        assert run.findings.unchecked == {}
        return
    unread = run.findings.unchecked
    about = {rule.code for rule in RULES if name in rule.tables or name.endswith("json")}
    assert unread.keys() == about
    assert all("can be read" in why for why in unread.values())


def test_steps_that_cannot_be_read_are_not_said_to_be_missing(
    healthy: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(healthy, copy)
    for file in files_of(copy / "steps"):
        file.write_bytes(file.read_bytes()[:100])
    shown = repr(gradscope.open(copy))
    assert "0 of 12 steps that can be read" in shown
    assert "not all of steps can be read" in shown
    assert "steps/part-0000-000000.parquet: cannot be read" in shown
    for wrong in ("no step", "never called", "no defect"):
        assert wrong not in shown
    for file in files_of(copy / "steps"):
        file.unlink()
    shown = repr(gradscope.open(copy))
    assert "its files are gone; 12 steps were recorded" in shown
    assert "no defect" not in shown


def test_flipped_bits_crash_nothing(healthy: Path, tmp_path: Path) -> None:
    for copy, file, chance in copies(healthy, tmp_path, 1):
        content = bytearray(file.read_bytes())
        for _ in range(chance.choice([1, 1, 4, 40])):
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        file.write_bytes(content)
        opened(copy)


def test_flipped_bits_in_data_are_noticed(healthy: Path, tmp_path: Path) -> None:
    """Pages have checksums: a wrong number is not taken for a right one."""
    file = tmp_path / "run" / "grads" / "part-0000-000000.parquet"
    expected = gradscope.open(healthy).grads
    n_noticed = 0
    for place in range(200, 1_000, 40):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(healthy, tmp_path / "run")
        content = bytearray(file.read_bytes())
        content[place] ^= 16
        file.write_bytes(content)
        run = gradscope.open(tmp_path / "run")
        if len(run.grads):
            assert run.grads.equals(expected)
        else:
            n_noticed += any("grads/part" in note for note in run.notes)
    assert n_noticed > 10


def test_missing_files_are_missing_rows(healthy: Path, tmp_path: Path) -> None:
    for copy, file, _ in copies(healthy, tmp_path, 1):
        file.unlink()
        opened(copy)


def test_foreign_files_are_named_and_skipped(healthy: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(healthy, copy)
    (copy / "grads" / "notes.txt").write_text("mine")
    (copy / "grads" / "part-0000-000007.parquet").write_text("no parquet")
    shutil.copy(
        copy / "steps" / "part-0000-000000.parquet", copy / "grads" / "part-0000-000008.parquet"
    )
    (copy / "grads" / ".part-0000-000009.parquet.writing").write_text("half")
    (copy / "grads" / "part-0000-000010.parquet").mkdir()
    (copy / "graphs" / "../graphs/step-4.json").write_text("{}")
    (copy / "unrelated.txt").write_text("mine")
    run = everything_of(copy)
    assert len(run.grads) == 48
    text = "\n".join(run.notes)
    for name in ("notes.txt", "000007", "000008", "000010"):
        assert name in text
    assert "000009" not in text
    assert "not observed: grads/notes.txt" in repr(run)


@pytest.mark.slow
def test_documents_of_anything_crash_nothing(healthy: Path, tmp_path: Path) -> None:
    chance = random.Random(0)
    strange: list[Any] = [None, -1, 1e400, "x", [], {}, [[]], True, 2**70, {"a": None}, "\ud800"]
    copy = tmp_path / "run"
    shutil.copytree(healthy, copy)
    for name in ("run.json", "parameters.json"):
        document = read_json(healthy / name)
        for key in list(document):
            for value in chance.sample([*strange, "gone"], 1):
                changed = dict(document)
                if value == "gone":
                    del changed[key]
                else:
                    changed[key] = value
                write_json(copy / name, changed)
                opened(copy)
        shutil.copy(healthy / name, copy / name)
    for entry_key in read_json(healthy / "parameters.json")["parameters"][0]:
        for value in chance.sample(strange, 1):
            document = read_json(healthy / "parameters.json")
            document["parameters"][0][entry_key] = value
            write_json(copy / "parameters.json", document)
            opened(copy)


class Hostile(nn.Module):
    """Parameters with names that no program should have, and some do."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names
        for name in names:
            self._parameters[name] = nn.Parameter(torch.ones(2))

    def forward(self) -> torch.Tensor:
        return sum(p.square().sum() for p in self.parameters())  # type: ignore[return-value]


def test_hostile_names_are_kept_as_they_are(tmp_path: Path) -> None:
    before = set(tmp_path.parent.rglob("*"))
    model = Hostile(HOSTILE)
    optimizer = torch.optim.AdamW(model.parameters())
    with gradscope.watch(model, optimizer, save=tmp_path / "run", keep="*") as scope:
        for _ in range(4):
            optimizer.zero_grad()
            model().backward()
            optimizer.step()
    run = gradscope.open(tmp_path / "run")
    assert run.notes == ()
    assert list(run.params["param"]) == list(scope.params["param"])
    for name in [*HOSTILE[:7], "\\ud800 half a pair", *HOSTILE[8:]]:
        assert (run.grads["param"] == name).sum() == 4
        assert repr(run.explain(name, 0)) == repr(scope.explain(name, 0))
        assert run.tensors(name)["gradient"].shape == (2,)
        assert len(run.table("grads", where=[("param", "==", name)])) == 4
    assert "<script>" not in run._repr_html_()
    outside = set(tmp_path.parent.rglob("*")) - before
    assert all(path.is_relative_to(tmp_path / "run") for path in outside)
    names = {path.name for path in (tmp_path / "run").rglob("*")}
    assert all(len(name) < 60 and name.isascii() for name in names)


def test_a_run_of_an_earlier_version_lacks_columns(healthy: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    copy = tmp_path / "run"
    shutil.copytree(healthy, copy)
    for part in (copy / "steps").glob("*.parquet"):
        pq.write_table(pq.read_table(part).drop_columns(["written_between"]), part)
    run = everything_of(copy)
    assert run.steps["written_between"].isna().all()
    assert run.table("steps")["written_between"].isna().all()
    expected = gradscope.open(healthy)
    assert run.steps.drop(columns="written_between").equals(
        expected.steps.drop(columns="written_between")
    )
    assert not [note for note in run.notes if "steps" in note]
    assert [f.code for f in run.findings] == [f.code for f in expected.findings]
