"""The documentation agrees with the program."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import gradscope
from gradscope.cli import VERBS

ROOT = Path(__file__).resolve().parents[2]


def test_the_generated_pages_are_up_to_date() -> None:
    result = subprocess.run(
        [sys.executable, "docs/generate.py", "--check"],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_link_inside_the_repository_leads_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text("utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_verb_and_option_is_documented() -> None:
    page = (ROOT / "docs" / "command-line.md").read_text("utf-8")
    verbs = argparse.ArgumentParser().add_subparsers()
    for verb in VERBS:
        verb.add_parser(verbs)
    for name, parser in verbs.choices.items():
        assert f"gradscope {name}" in page
        for action in parser._actions:
            for option in action.option_strings:
                if option.startswith("--") and option != "--help" and name != "demo":
                    assert option in page or option == "--output", f"{name} {option}"


def test_every_warning_slug_is_documented() -> None:
    documented = (ROOT / "docs" / "warnings.md").read_text("utf-8")
    sources = "".join(path.read_text("utf-8") for path in ROOT.glob("gradscope/**/*.py"))
    slugs = set(re.findall(r'"([a-z]+(?:-[a-z]+)*-failed)"', sources))
    assert slugs
    for slug in slugs:
        assert f"`{slug}`" in documented


def test_the_public_names_are_these() -> None:
    assert sorted(gradscope.__all__) == [
        "AutogradGraph",
        "Capture",
        "Finding",
        "Findings",
        "FindingsError",
        "GradscopeError",
        "GradscopeWarning",
        "Rule",
        "Run",
        "RunDifference",
        "Scope",
        "Severity",
        "__version__",
        "capture",
        "check_setup",
        "diff",
        "graph",
        "make_dot",
        "watch",
    ]
    for name in dir(gradscope):
        assert getattr(gradscope, name) is not None


def test_the_table_of_the_readme_names_only_what_a_scope_has() -> None:
    from gradscope.scope import Scope

    readme = (ROOT / "README.md").read_text("utf-8")
    table = readme.partition("## Use it")[2].partition("##")[0]
    named = set(re.findall(r"`(?:scope)?\.(\w+)", table)) - {"to_pandas", "render", "html"}
    assert named
    assert named <= set(dir(Scope)) | set(dir(gradscope.AutogradGraph))


def test_the_page_about_graphs_names_only_what_a_graph_has() -> None:
    page = (ROOT / "docs" / "graphs.md").read_text("utf-8")
    named = set(re.findall(r"`graph\.(\w+)", page)) - {"html"}
    assert {"nodes", "unreached", "diff", "to_html"} <= named
    assert named <= set(dir(gradscope.AutogradGraph))


def test_the_page_about_graphs_shows_every_architecture() -> None:
    page = (ROOT / "docs" / "graphs.md").read_text("utf-8")
    source = (ROOT / "docs" / "pictures.py").read_text("utf-8")
    examples = (ROOT / "examples" / "architectures.py").read_text("utf-8")
    listed = re.search(r"ARCHITECTURES[^=]*= {(.*?)^}", examples, re.DOTALL | re.MULTILINE)
    assert listed is not None
    for name in re.findall(r'"(\w+)":', listed[1]):
        assert f"images/graphs/{name}.svg" in page
        assert f'"{name}":' in source
