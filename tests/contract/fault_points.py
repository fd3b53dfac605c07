"""Every call that gradscope makes, as a point at which it can be made to fail.

To be imported before gradscope, whose modules are then compiled with one change: ``f(x)`` becomes
``__fault__(17, f)(x)``. That notes which points a run comes by, and raises at one of them. An
import inside of a function, which opens a file, is a point too.
"""

from __future__ import annotations

import ast
import builtins
import collections
import contextlib
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import json
import sys
import threading
import time
import types
import weakref
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.compiler import is_dynamo_compiling

PACKAGE = Path(importlib.util.find_spec("gradscope").origin).parent  # type: ignore[union-attr, arg-type]


@dataclass(frozen=True)
class Point:
    """One call in gradscope's source."""

    number: int
    file: str
    function: str
    line: int
    callee: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.function}: {self.callee}"

    @property
    def digest(self) -> int:
        """A number that stays when other lines of the file change."""
        return zlib.crc32(f"{self.file} {self.function} {self.callee}".encode())


class BrokenDiskError(OSError):
    def __init__(self) -> None:
        super().__init__(28, "broken on purpose")


class BrokenMemoryError(MemoryError):
    def __init__(self) -> None:
        super().__init__("broken on purpose")


class BrokenError(RuntimeError):
    def __init__(self) -> None:
        super().__init__("broken on purpose")


ERRORS: tuple[type[Exception], ...] = (BrokenError, BrokenDiskError, BrokenMemoryError)

POINTS: list[Point] = []


class _Faults:
    """Which points are come by, and which one fails."""

    def __init__(self) -> None:
        self.is_on = False
        self.reached: dict[int, int] = {}
        self.kinds: dict[int, str] = {}
        self.failing = -1
        self.first = 0
        self.last = 0
        self.error: type[BaseException] = BrokenError
        self.n_calls = 0
        self.n_raised = 0

    def at(self, number: int, callee: Any) -> Any:
        if self.is_on:
            if self.failing < 0:
                self.note(number, callee)
            elif number == self.failing and not _cannot_fail(callee):
                self.n_calls += 1
                if self.first < self.n_calls <= self.last:
                    self.n_raised += 1
                    raise self.error
        return callee

    def note(self, number: int, callee: Any) -> None:
        if not _cannot_fail(callee):
            self.reached[number] = self.reached.get(number, 0) + 1
            self.kinds.setdefault(number, _kind(callee))


FAULTS = _Faults()


@contextlib.contextmanager
def noting() -> Iterator[dict[int, int]]:
    """Note how often each point is come by."""
    FAULTS.failing, FAULTS.reached = -1, {}
    FAULTS.is_on = True
    try:
        yield FAULTS.reached
    finally:
        FAULTS.is_on = False


def fail_at(number: int, error: type[BaseException], first: int, last: int) -> None:
    """Let a point raise from its n-th call on, ``first`` calls being spared, to its ``last``."""
    FAULTS.failing, FAULTS.error, FAULTS.first, FAULTS.last = number, error, first, last
    FAULTS.n_calls = FAULTS.n_raised = 0
    FAULTS.is_on = True


def end_of_faults() -> int:
    """Let nothing fail any more; returns how often something did."""
    FAULTS.is_on = False
    FAULTS.failing = -1
    return FAULTS.n_raised


# What Python does within itself: nothing but a lack of a few bytes could make it fail.
_SAFE: frozenset[Any] = frozenset(
    {
        len,
        isinstance,
        issubclass,
        getattr,
        setattr,
        hasattr,
        vars,
        callable,
        id,
        hash,
        type,
        super,
        object,
        range,
        enumerate,
        zip,
        map,
        filter,
        reversed,
        iter,
        slice,
        abs,
        round,
        divmod,
        ord,
        chr,
        classmethod,
        staticmethod,
        property,
        frozenset,
        dict,
        set,
        list,
        tuple,
        int,
        float,
        bool,
        str,
        repr,
        bytes,
        min,
        max,
        sum,
        any,
        all,
        sorted,
        next,
        format,
        time.perf_counter,
        time.monotonic,
        threading.get_ident,
        threading.local,
        threading.RLock,
        threading.Lock,
        weakref.ref,
        sys._getframe,
        collections.deque,
        collections.ChainMap,
        collections.Counter,
        collections.defaultdict,
        contextlib.suppress,
        functools.partial,
    }
)
_CONTAINERS = (
    list,
    dict,
    set,
    frozenset,
    tuple,
    str,
    bytes,
    bytearray,
    int,
    float,
    collections.deque,
    collections.ChainMap,
    types.MappingProxyType,
    type({}.keys()),
    type({}.values()),
    type({}.items()),
)


# The edge at which errors of ours stop: calling it, and nothing in it, is taken to succeed.
_EDGE = frozenset({"emit", "emit_with_line", "failed", "_takers", "_guarded"})


def _cannot_fail(callee: Any) -> bool:
    if callee is None:  # an import
        return False
    kind = type(callee)
    if kind is types.MethodType and callee.__name__ in _EDGE:
        return True
    if callee is is_dynamo_compiling:  # a constant
        return True
    if kind is weakref.ref or kind is weakref.WeakMethod:
        return True
    if kind is type and issubclass(callee, BaseException):
        return True
    if isinstance(callee, types.BuiltinFunctionType | types.FunctionType | type):
        try:
            if callee in _SAFE:
                return True
        except TypeError:
            pass
        owner = getattr(callee, "__self__", None)
        if type(owner) in _CONTAINERS:
            return True
        if isinstance(owner, types.ModuleType) and owner.__name__ in ("math", "time", "itertools"):
            return True
    return kind is types.MethodType and type(callee.__self__) in _CONTAINERS


def _kind(callee: Any) -> str:
    """Into what a call leads."""
    if callee is None:
        return "import"
    owner = getattr(callee, "__self__", None)
    for each in (callee, owner, type(owner), type(callee)):
        name = each.__name__ if isinstance(each, types.ModuleType) else None
        name = name or getattr(each, "__module__", None) or ""
        top = name.partition(".")[0]
        if top in ("torch", "numpy", "pandas", "pyarrow", "safetensors", "gradscope"):
            return top
        if top in ("os", "posix", "io", "_io", "pathlib", "shutil", "tempfile", "json", "atexit"):
            return "files"
        if top in ("threading", "_thread"):
            return "threads"
    return "files" if callee in (open, print) else "python"


# -- compiling ------------------------------------------------------------------------------


class _Rewriter(ast.NodeTransformer):
    def __init__(self, file: str) -> None:
        self._file = file
        self._inside: list[str] = []

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        self._inside.append(node.name)
        # Decorators, defaults and annotations are worked out when the function is made.
        node.body = [each for part in node.body for each in _listed(self.visit(part))]
        self._inside.pop()
        if self._inside:
            node.decorator_list = [self.visit(each) for each in node.decorator_list]
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> Any:
        self._inside.append(node.name)
        node.body = [
            each
            for part in node.body
            for each in (_listed(self.visit(part)) if _is_function(part) else [part])
        ]
        self._inside.pop()
        return node

    def visit_Module(self, node: ast.Module) -> Any:
        node.body = [
            self.visit(part) if _is_function(part) or isinstance(part, ast.ClassDef) else part
            for part in node.body
        ]
        return node

    def visit_Call(self, node: ast.Call) -> Any:
        number = self._point(node, ast.unparse(node.func))
        self.generic_visit(node)
        node.func = _reported(node, number, node.func)
        return node

    def visit_Import(self, node: ast.Import) -> Any:
        return self._import(node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> Any:
        return self._import(node)

    def _import(self, node: ast.Import | ast.ImportFrom) -> Any:
        number = self._point(node, ast.unparse(node))
        report = ast.Expr(_reported(node, number, ast.Constant(None)))
        return [ast.copy_location(report, node), node]

    def _point(self, node: ast.expr | ast.stmt, callee: str) -> int:
        function = ".".join(self._inside)
        POINTS.append(Point(len(POINTS), self._file, function, node.lineno, callee[:60]))
        return len(POINTS) - 1


def _is_function(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef)


def _listed(found: Any) -> list[Any]:
    return found if isinstance(found, list) else [found]


def _reported(node: Any, number: int, callee: ast.expr) -> ast.expr:
    function = ast.Name("__fault__", ast.Load())
    call = ast.Call(function, [ast.Constant(number), callee], [])
    for each in (function, call, *call.args[:1]):
        ast.copy_location(each, node)
    return ast.fix_missing_locations(ast.copy_location(call, node))  # type: ignore[no-any-return]


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> types.CodeType:
        path = self.get_filename(fullname)
        tree = ast.parse(self.get_data(path), path)
        file = Path(path).relative_to(PACKAGE).as_posix()
        if not file.startswith("demo/"):
            tree = _Rewriter(file).visit(tree)
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "gradscope" and not name.startswith("gradscope."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def told(report: dict[str, Any], path: Path | None) -> bool:
    """Print how many faults a program has made, write its report; returns whether any broke it."""
    print(report["n_faults"], "faults,", len(report["broken"]), "broken")
    if path is not None:
        path.write_text(json.dumps(report, indent=1))
    return bool(report["broken"])


def install() -> None:
    """Compile gradscope with its points; to be called before anything of it is imported."""
    assert "gradscope" not in sys.modules, "gradscope was imported before"
    builtins.__fault__ = FAULTS.at  # type: ignore[attr-defined]
    sys.meta_path.insert(0, _Finder())
