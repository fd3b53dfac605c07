"""What ``run`` and ``check`` share: their options, and a program run under watch."""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradscope.cli.output import width_of
from gradscope.cli.program import (
    Ended,
    Program,
    module_program,
    print_exception,
    script_program,
)
from gradscope.config import (
    ProjectConfig,
    as_directory,
    project_config,
    switched_off,
)
from gradscope.errors import GradscopeError, OutputExistsError, UsageError, text_of

if TYPE_CHECKING:
    from gradscope.rules.finding import Findings
    from gradscope.run.recording import Recording


@dataclass(frozen=True, slots=True)
class Watched:
    """A program that has run under watch.

    Attributes:
        ended: how it ended.
        fail_on: the least severity that makes a check fail, as the project has it.
        recording: what was seen; None where watching is switched off.
        findings: what is wrong, after selection; None likewise.
        saved_to: the run directory that it was recorded to; None for none.
    """

    ended: Ended
    fail_on: str = "error"
    recording: Recording | None = None
    findings: Findings | None = None
    saved_to: Path | None = None


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options that say what is run, and what is looked for."""
    parser.add_argument(
        "--findings", metavar="FILE", help="write all findings to FILE, as JSON, whatever happens"
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="overwrite FILE even if it is something else, and the run that is in DIR",
    )
    for name, what in (("select", "look only for these"), ("ignore", "do not look for these")):
        parser.add_argument(
            f"--{name}",
            action="append",
            metavar="RULES",
            help=f"{what}: codes, names or beginnings of codes such as GS2, comma separated",
        )
    parser.add_argument(
        "--show",
        choices=("info", "warning", "error"),
        default="warning",
        help="the least severe findings to show (default: warning)",
    )
    parser.add_argument(
        "--steps",
        type=_positive,
        metavar="N",
        help="stop watching after N steps; the program goes on",
    )
    parser.add_argument(
        "-m",
        dest="module",
        nargs=argparse.REMAINDER,
        help="run a module, as python -m does; everything after it is the module's",
        metavar=("MODULE", "ARGS"),
    )
    parser.add_argument("script", nargs="?", help="the script to run")
    parser.add_argument("args", nargs=argparse.REMAINDER, help="arguments for the script")


def run_watched(arguments: argparse.Namespace) -> Watched:
    """Run the program, print the exception that ended it, write the findings file.

    Raises:
        UsageError: before anything runs, if what was asked for cannot be done.
    """
    program = _program(arguments)
    if switched_off():
        return Watched(_run_alone(program))
    config = _configured(arguments, program)
    if arguments.findings:
        _refuse_to_overwrite(arguments.findings, force=arguments.force)

    from gradscope.cli import ranks
    from gradscope.cli.children import Watching, end_of_child, watch_children
    from gradscope.cli.watching import begin_session
    from gradscope.run.recording import Recording
    from gradscope.session.ending import note_ending

    output = as_directory("--output", getattr(arguments, "output", None))
    place = ranks.place_of_program()
    if output is not None:
        ranks.make_room(output, place, force=arguments.force)
    shared, process = output, os.getpid()
    try:
        if output is None and place.world_size > 1:
            shared = ranks.shared_folder()
            if shared is not None and place.rank == 0:
                ranks.remove_at_exit(shared)
        watching = Watching(
            None if shared is None else str(shared), _plain(config), arguments.steps
        )
        session = begin_session(shared, watching.criteria, watching.n_steps)
        children = watch_children(watching, session)
    except GradscopeError:
        raise
    except Exception as error:
        _tell_failed("watching", error)
        return Watched(_run_alone(program), config.fail_on, Recording())  # seen, but not judged
    try:
        ended = program.run()
        if ended.error is not None:
            guarded(lambda: note_ending(session, ended.error))
    finally:
        was_running = session.running
        guarded(session.stop)
        guarded(children.stop)
    how = "finished" if ended.error is None else type(ended.error).__name__
    if os.getpid() != process:  # a child of the program's own that came back up here
        guarded(lambda: end_of_child(how))
        if ended.error is not None:
            print_exception(ended.error)
        return Watched(ended)
    if ended.error is not None:
        print_exception(ended.error)
        if was_running:
            guarded(lambda: _explain(session.recording, ended.error))
    try:
        children.wait()
    except KeyboardInterrupt as error:
        ended, how = Ended(130, error), "KeyboardInterrupt"
    is_alone = children.written is None and place.rank == 0
    guarded(lambda: session.finish_saving(how, even_if_idle=is_alone))
    if place.rank > 0:  # the first speaks for all
        return Watched(ended)
    found = guarded(lambda: ranks.together(session, children, place, shared, how))
    recording = session.recording if found is None else found
    findings = guarded(lambda: _judge(recording, config))
    saved_to = output if session.is_saved or recording is not session.recording else None
    watched = Watched(ended, config.fail_on, recording, findings, saved_to)
    if arguments.findings and findings is not None:
        guarded(lambda: _write(arguments.findings, watched))
    return watched


def _run_alone(program: Program) -> Ended:
    ended = program.run()
    if ended.error is not None:
        print_exception(ended.error)
    return ended


def leave(watched: Watched, status: int) -> int:
    """Return the exit status, or die of an interrupt as Python itself would."""
    if isinstance(watched.ended.error, KeyboardInterrupt):
        # Python then ends by the signal, so that a shell's loop around it ends too.
        sys.excepthook = lambda *_: None
        raise watched.ended.error
    return status


def _configured(arguments: argparse.Namespace, program: Program) -> ProjectConfig:
    """Return what the project's ``pyproject.toml`` and the command line ask for together.

    Raises:
        UsageError: for a key or a rule that there is not.
    """
    config = project_config(program.folder)
    select, ignore = _listed(arguments.select), _listed(arguments.ignore)
    config = replace(config, select=select or config.select, ignore=(*config.ignore, *ignore))
    selectors = (*config.select, *config.ignore, *config.ignore_params)
    if selectors or config.thresholds:  # else the program comes before pandas
        from gradscope.rules.selection import check_selectors
        from gradscope.rules.thresholds import check_thresholds

        check_selectors(selectors)
        check_thresholds(config.thresholds)
    return config


def _judge(recording: Recording, config: ProjectConfig) -> Findings:
    """Return the findings of a recording that a project wants to see."""
    from gradscope.rules import diagnose
    from gradscope.rules.selection import selected, selected_rules
    from gradscope.rules.thresholds import replaced_thresholds

    # Rules that are not wanted are not applied: what one of them would explain stands by itself.
    rules = selected_rules(config.select, config.ignore)
    with replaced_thresholds(config.thresholds):
        findings = diagnose(recording, rules)
    return selected(
        findings,
        select=config.select,
        ignore=config.ignore,
        ignore_params=config.ignore_params,
    )


def _program(arguments: argparse.Namespace) -> Program:
    if arguments.module:
        return module_program(arguments.module[0], arguments.module[1:])
    if arguments.script is None:
        raise UsageError("name the script to run, or a module with -m")
    return script_program(arguments.script, arguments.args)


def _plain(config: ProjectConfig) -> dict[str, Any]:
    """By what the run is judged, as plain data."""
    return {
        "select": list(config.select),
        "ignore": list(config.ignore),
        "ignore_params": {k: list(v) for k, v in config.ignore_params.items()},
        "thresholds": config.thresholds,
        "own_rules": [],
    }


def _explain(recording: Recording, error: BaseException | None) -> None:
    from gradscope.session.ending import raised_at
    from gradscope.views.exception_explanation import explain_exception

    location = None if error is None else raised_at(error)
    explanation = explain_exception(
        recording,
        type(error).__name__,
        str(error),
        None if location is None else location.file,
        None if location is None else location.line,
    )
    if explanation is not None:
        width = width_of(sys.stderr)
        told = str(explanation) if width is None else explanation.to_text(width)
        print(f"\n{told}\n", file=sys.stderr)


def _refuse_to_overwrite(path: str, *, force: bool) -> None:
    """Say before the training, and not after it, that the file cannot be written."""
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise UsageError(f"--findings {path}: there is no folder {folder}")
    if os.path.isdir(path):
        raise UsageError(f"--findings {path}: is a folder")
    if not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise UsageError(f"--findings {path}: may not be written")
    if os.path.exists(path) and not force and not _is_findings_file(path):
        raise OutputExistsError(
            f"--findings {path}: holds something else than findings; overwrite it with --force, or "
            "name another file"
        )


def _is_findings_file(path: str) -> bool:
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        return not text or "gradscope" in json.loads(text)
    except (OSError, ValueError, TypeError):
        return not os.path.isfile(path)  # /dev/stderr, a named pipe


def document(watched: Watched) -> dict[str, Any]:
    """Return the findings file as plain data."""
    from gradscope.session.ending import in_words
    from gradscope.views.findings_document import findings_document

    if watched.recording is None or watched.findings is None:
        return {}
    error = watched.ended.error
    return findings_document(
        watched.recording,
        watched.findings,
        status=watched.ended.status,
        exception=None if error is None else in_words(error),
    )


def _write(path: str, watched: Watched) -> None:
    from gradscope.run.directory.layout import write_bytes

    text = json.dumps(document(watched), indent=1, ensure_ascii=False) + "\n"
    if os.path.isfile(path) or not os.path.exists(path):
        write_bytes(Path(path).resolve(), text.encode("utf-8", "backslashreplace"))
    else:  # /dev/stderr, a named pipe
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)


def guarded(function: Any) -> Any:
    """Do what comes after the program; a failure of ours does not become the program's."""
    try:
        return function()
    except Exception as error:
        _tell_failed("the verdict", error)
        return None


def _tell_failed(what: str, error: Exception) -> None:
    with suppress(Exception):  # standard error may be closed
        print(f"gradscope: {what} failed ({text_of(error)})", file=sys.stderr)


def _listed(given: list[str] | None) -> tuple[str, ...]:
    return tuple(word.strip() for text in given or () for word in text.split(",") if word.strip())


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a positive number")
    return number
