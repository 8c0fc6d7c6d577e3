"""Definitions lifted from a module's text by `ast` and executed alone, with nothing else of the module.

Lifted code sees three things: other lifted definitions, the globals that it is given, and the modules of an import
table. The table replaces `__import__` for the lifted code alone, so that no entry of `sys.modules` is a stub: code
outside, and a package that is really installed, are not affected.
"""

from __future__ import annotations

import ast
import builtins
import dis
import hashlib
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from distbench.callers.packages import PackageText
from distbench.callers.text import CallerText
from distbench.errors import Unsupported
from distbench.utils.text import one_line

_REGISTERS = "register_"
_MODULE = "distbench.callers.lifted"


class Stub:
    """A module or class of the package that lifted code imports or names: exactly the given attributes."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


class Unreached:
    """A name that lifted code mentions on branches that a case does not take; any use is refused."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse the call."""
        self._refuse()

    def __getattr__(self, attribute: str) -> NoReturn:
        """Refuse the access."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        message = f"{self._name}: the lifted code takes a branch that distbench does not provide"
        raise Unsupported(message)


class Lift:
    """Lifts definitions of one package, and records their text.

    `modules` are the import table: the modules that lifted bodies import, by dotted name. Imports of the package itself
    that are not in the table are refused when the definitions are lifted, and so are globals that nothing defines.
    """

    def __init__(self, package: PackageText, modules: Mapping[str, Any]) -> None:
        self._package = package
        self._modules = modules
        self._texts: list[tuple[str, str]] = []
        self._builtins = vars(builtins) | {"__import__": self._import}

    @property
    def files(self) -> list[str]:
        """Files of the lifted definitions, in order."""
        return list(dict.fromkeys(path for path, _ in self._texts))

    @property
    def sha256(self) -> str:
        """SHA-256 over file names and lifted text, as 64 hex digits."""
        digest = hashlib.sha256()
        for part in (part for text in self._texts for part in text):
            digest.update(len(part.encode()).to_bytes(8, "big") + part.encode())
        return digest.hexdigest()

    @property
    def origin(self) -> CallerText:
        """The package, and what has been lifted of it."""
        package = self._package
        return CallerText(
            package=package.name,
            version=package.version,
            origin=package.origin,
            files=tuple(self.files),
            sha256=self.sha256,
        )

    def lift(self, path: str, names: Sequence[str], given: Mapping[str, Any]) -> dict[str, Any]:
        """Execute the definitions `names` of the file `path` with the globals `given`; return their namespace.

        A name is a class, a function or an assigned variable of the module, or `Class.member` for a class of which only
        the named assignments are wanted. Decorators and calls that register the definition elsewhere are dropped.

        Raises:
            Unsupported: the file lacks a name, or a definition needs a global or a module that is not given.

        """
        text = _with_newlines(self._package.read(path))
        nodes = _nodes(self._package, path, text, names)
        for node in nodes:
            self._texts.append((path, _text_of(node, text.split("\n"))))
            _strip(node)
        module = types.ModuleType(f"{_MODULE}.{path.removesuffix('.py').replace('/', '.')}")
        namespace = module.__dict__
        namespace |= {**given, "__builtins__": self._builtins}
        future = ast.ImportFrom("__future__", [ast.alias("annotations")], 0)
        tree = ast.fix_missing_locations(ast.Module([future, *nodes], []))
        code = compile(tree, f"{self._package.name}:{path}", "exec", dont_inherit=True)
        self._check_imports(path, nodes)
        self._check_globals(path, code, namespace)
        sys.modules[module.__name__] = module  # dataclasses look the module of a class up
        try:
            exec(code, namespace)  # noqa: S102 - the definitions that were asked for, and nothing else of the module
        except Exception as error:
            message = f"{self._package.label}: {path}: its definitions cannot be executed: {_reason(error)}"
            raise Unsupported(message) from error
        finally:
            del sys.modules[module.__name__]  # it holds all that the code was given: the experts' weights, a transport
        return namespace

    def _check_imports(self, path: str, nodes: Sequence[ast.stmt]) -> None:
        """Refuse imports of the package that the table does not answer."""
        for module, name in _imports(nodes):
            answer = self._modules.get(module)
            missing = answer is None or (name and not hasattr(answer, name))
            if missing and (answer is not None or module.partition(".")[0] == self._package.name):
                what = f"{name} from {module}" if name else module
                message = f"{self._package.label}: {path} imports {what}, which distbench does not provide"
                raise Unsupported(message)

    def _check_globals(self, path: str, code: types.CodeType, namespace: Mapping[str, Any]) -> None:
        known = {*namespace, *vars(builtins), *_stored(code)}
        missing = sorted(set(_globals(code)) - known)
        if missing:
            message = f"{self._package.label}: {path} uses {', '.join(missing)}, which distbench does not provide"
            raise Unsupported(message)

    def _import(
        self,
        name: str,
        globals: Mapping[str, object] | None = None,  # noqa: A002 - the arguments of __import__
        locals: Mapping[str, object] | None = None,  # noqa: A002
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> Any:
        if name in self._modules and (fromlist or "." not in name):
            return self._modules[name]
        root = name.partition(".")[0]
        if not level and any(known.partition(".")[0] == root for known in self._modules):
            message = f"{self._package.label}: the lifted code imports {name}, which distbench does not provide"
            raise Unsupported(message)  # else a stand-in of `root` would be mixed with an installed one
        return builtins.__import__(name, globals, locals, fromlist or (), level)


def check_definitions(package: PackageText, definitions: Mapping[str, Sequence[str]]) -> None:
    """Check that a release has the definitions that would be lifted, names by file, without executing any.

    Raises:
        Unsupported: names the first that is missing, its file and the release.

    """
    for path, names in definitions.items():
        _nodes(package, path, package.read(path), names)


def _nodes(package: PackageText, path: str, text: str, names: Sequence[str]) -> list[ast.stmt]:
    """The definitions `names` of a file; of a class of which only members are wanted, with these alone."""
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        message = f"{package.label}: {path} cannot be parsed ({one_line(error)})"
        raise Unsupported(message) from error
    members: dict[str, set[str]] = {}
    for name in names:
        owner, _, member = name.partition(".")
        members.setdefault(owner, set()).update({member} - {""})
    found = [node for node in body if not members.keys().isdisjoint(_defined(node))]
    for node in found:
        if isinstance(node, ast.ClassDef) and members[node.name]:
            node.body = [part for part in node.body if not members[node.name].isdisjoint(_defined(part))]
    known = {name for node in found for name in _names_of(node)}
    for name in names:
        if name not in known:
            message = (
                f"{package.label}: {path} does not define {name}; use a release whose MoRI path distbench knows "
                "(docs/callers.md)"
            )
            raise Unsupported(message)
    return found


def _text_of(node: ast.stmt, lines: Sequence[str]) -> str:
    """Source lines of a definition, decorators included; of a class, its header and the members that are kept."""
    decorators = getattr(node, "decorator_list", [])
    first = min(one.lineno for one in (node, *decorators)) - 1
    if not isinstance(node, ast.ClassDef):
        return "".join(f"{line}\n" for line in lines[first : node.end_lineno])
    ends = [node.lineno, *(part.end_lineno or 0 for part in (*node.bases, *(one.value for one in node.keywords)))]
    header = "".join(f"{line}\n" for line in lines[first : max(ends)])
    return "".join([header, *(_text_of(part, lines) for part in node.body)])


def _with_newlines(text: str) -> str:
    """Text whose lines are those that `ast` counts: other characters at which text is split end none of them."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _strip(node: ast.stmt) -> None:
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        node.decorator_list = [one for one in node.decorator_list if _REGISTERS not in ast.unparse(one)]


def _defined(node: ast.stmt) -> set[str]:
    """Names that a statement of a module or a class defines."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _names_of(node: ast.stmt) -> set[str]:
    if not isinstance(node, ast.ClassDef):
        return _defined(node)
    return {node.name, *(f"{node.name}.{member}" for part in node.body for member in _defined(part))}


def _imports(nodes: Sequence[ast.stmt]) -> Iterator[tuple[str, str]]:
    """Module and name of each import inside the nodes; no name where the module itself is imported."""
    for inner in (inner for node in nodes for inner in ast.walk(node)):
        if isinstance(inner, ast.ImportFrom):
            yield from ((inner.module or "", alias.name) for alias in inner.names)
        elif isinstance(inner, ast.Import):
            yield from ((alias.name, "") for alias in inner.names)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _globals(code: types.CodeType) -> Iterator[str]:
    """Names that code at any depth reads as globals; those of a class's body may be its own."""
    for part in _codes(code):
        stored = _stored(part)
        for one in dis.get_instructions(part):
            if one.opname == "LOAD_GLOBAL" or (one.opname == "LOAD_NAME" and one.argval not in stored):
                yield one.argval


def _stored(code: types.CodeType) -> set[str]:
    stored = {one.argval for one in dis.get_instructions(code) if one.opname in {"STORE_NAME", "STORE_GLOBAL"}}
    return stored | {"__name__", "__annotations__", "__classdict__"}


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error)}"
