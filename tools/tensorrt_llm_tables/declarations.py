"""What a class declares, from the syntax tree of its module."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from pdserve.config.llm_tables import Declared, Field
from tensorrt_llm_tables.annotations import choices, shortened
from tensorrt_llm_tables.errors import SourceError

FACTORY = "<factory>"
MAKERS = ("Field", "PydanticField", "field")
PROPERTIES = ("property", "cached_property")
VALIDATORS = ("field_validator", "model_validator", "field_serializer", "model_serializer")
PROTOCOLS = ("__aiter__", "__anext__", "__await__")
"""Methods with underscores that a caller uses all the same, by ``async for`` and ``await``."""
Function = ast.FunctionDef | ast.AsyncFunctionDef


def parse(text: str, file: str) -> ast.Module:
    """Parse a module. Raises SourceError: it is none."""
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise SourceError(f"{file}: {error}") from error


def version(module: ast.Module, file: str) -> str:
    """Return the last constant that ``__version__`` gets. Raises SourceError: there is none."""
    found = [
        node.value.value
        for node in ast.walk(module)
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Constant)
        and any(isinstance(to, ast.Name) and to.id == "__version__" for to in node.targets)
    ]
    if not found:
        raise SourceError(f"{file}: no constant __version__")
    return str(found[-1])


def declared(module: ast.Module, name: str, file: str) -> Declared:
    """Return the declarations of a class and of its bases in the same module.

    Raises:
        SourceError: there is no such class.
    """
    classes = {node.name: node for node in module.body if isinstance(node, ast.ClassDef)}
    if name not in classes:
        raise SourceError(f"{file}: no class {name}; there are: {', '.join(classes) or 'none'}")
    fields: dict[str, Field] = {}
    methods: dict[str, dict[str, Field]] = {}
    properties: dict[str, None] = {}
    for node in _lineage(name, classes, set()):
        fields |= dict(_fields(node))
        for function in node.body:
            if not isinstance(function, Function):
                continue
            marks = [_last(mark) for mark in function.decorator_list]
            if function.name == "__init__":
                properties |= dict.fromkeys(_attributes(function))
            elif any(mark in PROPERTIES for mark in marks):
                properties[function.name] = None
            elif _public(function.name) and not {"setter", *VALIDATORS} & set(marks):
                methods[function.name] = dict(_parameters(function, "staticmethod" in marks))
    return Declared(
        fields=fields,
        methods=methods,
        properties=tuple(one for one in properties if one not in fields),
    )


def _lineage(name: str, classes: dict[str, ast.ClassDef], seen: set[str]) -> Iterator[ast.ClassDef]:
    """Yield a class after its bases; a base that is not in the module is left out."""
    if name in classes and name not in seen:
        seen.add(name)
        for base in reversed(classes[name].bases):
            yield from _lineage(_last(base), classes, seen)
        yield classes[name]


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, Field]]:
    for line in node.body:
        if not isinstance(line, ast.AnnAssign) or not isinstance(line.target, ast.Name):
            continue
        private = isinstance(line.value, ast.Call) and _last(line.value.func) == "PrivateAttr"
        annotation = shortened(line.annotation)
        if not private and not annotation.startswith("ClassVar"):
            yield line.target.id, _field(line.annotation, annotation, line.value)


def _field(annotation: ast.expr, text: str, value: ast.expr | None) -> Field:
    found = tuple(choices(annotation))
    if not isinstance(value, ast.Call) or _last(value.func) not in MAKERS:
        return Field(text, None if value is None else ast.unparse(value), choices=found)
    given = {word.arg: word.value for word in value.keywords if word.arg}
    if value.args:  # pydantic takes the default as its first argument
        given.setdefault("default", value.args[0])
    default = FACTORY if "default_factory" in given else None
    if "default" in given and ast.unparse(given["default"]) != "...":
        default = ast.unparse(given["default"])
    return Field(
        text,
        default,
        init=_constant(given.get("init"), "True") != "False",
        status=_constant(given.get("status")),
        alias=_constant(given.get("alias")),
        choices=found,
    )


def _parameters(function: Function, static: bool) -> Iterator[tuple[str, Field]]:
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(named) - len(arguments.defaults))
    defaults += arguments.defaults
    pairs = list(zip(named, defaults, strict=True))[0 if static else 1 :]
    pairs += zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    for one, default in pairs:
        text = "" if one.annotation is None else shortened(one.annotation)
        yield one.arg, Field(text, None if default is None else ast.unparse(default))


def _attributes(function: Function) -> Iterator[str]:
    """Yield the public attributes that a constructor sets."""
    for node in ast.walk(function):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign):
            targets = [node.target]
        for target in targets:
            of_self = isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self"
            if isinstance(target, ast.Attribute) and of_self and _public(target.attr):
                yield target.attr


def _public(name: str) -> bool:
    return not name.startswith("_") or name in PROTOCOLS


def _last(node: ast.expr) -> str:
    """Return the last part of a name: ``b`` of ``a.b``, ``a.b[c]`` and ``a.b(c)``."""
    if isinstance(node, ast.Call):
        return _last(node.func)
    if isinstance(node, ast.Subscript):
        return _last(node.value)
    return ast.unparse(node).rpartition(".")[2]


def _constant(node: ast.expr | None, otherwise: str = "") -> str:
    return str(node.value) if isinstance(node, ast.Constant) else otherwise
