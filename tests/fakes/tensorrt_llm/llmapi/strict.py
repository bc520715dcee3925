"""Configurations that refuse unknown fields, like the library's pydantic models."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec
from typing_extensions import dataclass_transform

_MISSING: Any = inspect.Parameter.empty


class ValidationError(ValueError):
    """A name or a value that the configuration does not have."""


@dataclass_transform(kw_only_default=True)
class StrictBaseModel:
    """A base class; the annotations of a subclass are its fields, in order."""

    _fields: ClassVar[dict[str, Any]] = {}
    model_fields: ClassVar[dict[str, Any]] = {}
    __signature__: ClassVar[inspect.Signature]

    def __init_subclass__(cls) -> None:
        hints = typing.get_type_hints(cls, include_extras=True)
        names = [name for name in hints if not name.startswith("_") and name != "model_fields"]
        cls._fields = cls.model_fields = {name: hints[name] for name in names}
        cls.__signature__ = inspect.Signature(
            [
                inspect.Parameter(
                    name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=getattr(cls, name, _MISSING),
                    annotation=hint,
                )
                for name, hint in cls._fields.items()
            ]
        )

    def __init__(self, **values: Any) -> None:
        unknown = sorted(values.keys() - self._fields.keys())
        if unknown:
            raise ValidationError(
                f"{type(self).__name__} has no {', '.join(unknown)}; "
                f"allowed are {', '.join(self._fields)}"
            )
        for name, hint in self._fields.items():
            value = values.get(name, getattr(type(self), name, _MISSING))
            if value is _MISSING:
                raise ValidationError(f"{type(self).__name__} needs {name}")
            setattr(self, name, self._checked(name, value, hint))

    def _checked(self, name: str, value: Any, hint: Any) -> Any:
        kinds = typing.get_args(hint) or (hint,)
        nested = [kind for kind in kinds if _strict(kind)]
        if nested:
            if isinstance(value, Mapping):
                return nested[0](**value)
            if value is None or isinstance(value, nested[0]):
                return value
        elif hint is Any:
            return value
        else:
            try:
                return msgspec.convert(value, hint)
            except msgspec.ValidationError as error:
                raise ValidationError(f"{type(self).__name__}.{name}: {error}") from error
        raise ValidationError(f"{type(self).__name__}.{name}: {value!r} is no {nested[0].__name__}")

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={getattr(self, name)!r}" for name in self._fields)
        return f"{type(self).__name__}({values})"


def _strict(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, StrictBaseModel)
