"""A network of your own: a function in a Python file, which is executed because a person named it.

A run records the file's absolute path and its sha256. What only a run names, which may be a stranger's, is not
executed unless the person says ``--trust``; a file that has changed since it was recorded is not executed at all.
"""

import contextlib
import hashlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from cakd_cli.errors import OWN_CODE, CakdError, InputError, RecipeError, first_line, nearest, place_in_own_code
from cakd_cli.models.base import ModelSpec
from cakd_cli.options import mistakes

_WHOLE = "CAKD_DEBUG=1 shows the whole traceback"
_SIZES = ("in_channels", "num_classes")


class _Permission:
    """What this process may execute: the files that a person named to it; with ``any_file`` whatever a run names."""

    def __init__(self) -> None:
        self.any_file = False
        self.named: set[str] = set()


_permission = _Permission()


def begin(*, trust: bool) -> None:
    """Begin a command: no file may be executed until one is named.

    Args:
        trust: Whether the person lets it execute any file that a run names.
    """
    _permission.any_file = trust
    _permission.named.clear()


class OwnCodeSpec(ModelSpec):
    """A network of your own: a function that makes it, in a Python file."""

    # As a list of models shows it.
    shorthand = "file:function"

    type: Literal["python"] = "python"
    file: str = Field(min_length=1, description="Python file, which is executed")
    function: str = Field(
        min_length=1, description="gives the network; called with in_channels and num_classes, as far as it takes them"
    )
    pretrained: bool = Field(False, description="whether the function gives trained weights")
    sha256: str | None = Field(None, description="of the file; none = as it is now, which a run then records")

    @model_validator(mode="before")
    @classmethod
    def _record(cls, given: Any) -> Any:
        """Say which file it is, wherever and whenever the recipe is read again."""
        if not isinstance(given, dict) or not isinstance(given.get("file"), str) or not given["file"]:
            return given
        try:
            path = os.path.abspath(os.path.expanduser(given["file"]))
            if given.get("sha256") is None:
                if not os.path.isfile(path):
                    raise mistakes([(("file",), f"no such Python file: {given['file']}")], given)
                given = {**given, "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest()}
        except OSError as error:
            wrong = f"cannot read {given['file']}: {error.strerror}"
            raise mistakes([(("file",), wrong)], given) from error
        return {**given, "file": path}

    @property
    def label(self) -> str:
        return f"python:{os.path.basename(self.file)}:{self.function}"

    @property
    def architecture(self) -> str:
        # Not where the file lies.
        return json.dumps([self.type, self.function, self.sha256])

    @property
    def origin(self) -> str:
        if self.pretrained and self.weights is None:
            return f"the weights that {self.function} gives it"
        return super().origin

    def allow(self) -> None:
        """Note that a person named the file, so that it may be executed, by whatever function of it."""
        _permission.named.add(self.file)

    def build(self, *, in_channels: int, num_classes: int) -> nn.Module:
        """Execute the file and call its function; the network decides itself how it begins.

        Raises:
            InputError: If the file is gone, or not what was recorded.
            RecipeError: If only a run names it, it fails, or the function does not give a network.
        """
        code = self._code()
        with self._explained():
            module = _executed(code, self.file, f"{OWN_CODE}{self.sha256}")
        function = self._find(module)
        arguments = self._arguments(function, {"in_channels": in_channels, "num_classes": num_classes})
        with self._explained():
            model = function(**arguments)
        if not isinstance(model, nn.Module):
            raise RecipeError(
                f"{self.label} gives {type(model).__name__}, not a network",
                hint="it must return a torch.nn.Module that maps (batch, channels, height, width) to (batch, classes)",
            )
        return model

    def _code(self) -> bytes:
        """Read what is to be executed, once it may be."""
        if not (_permission.any_file or self.file in _permission.named):
            raise RecipeError(
                f"{self.label} is Python code that a run names, and it is not executed unasked: {self.file}",
                hint="read that file, then give --trust; a command without this flag takes the network as "
                f"python:{self.file}:{self.function} with the weights of the run",
            )
        try:
            code = Path(self.file).read_bytes()
        except OSError as error:
            raise InputError(
                f"cannot read {self.file}, which makes the network: {error.strerror}",
                hint="put it back where it was when the network was trained",
            ) from error
        if hashlib.sha256(code).hexdigest() != self.sha256:
            raise InputError(
                f"{self.file} has changed since the run began that names it",
                hint="put back what it was, or name it anew: "
                f"python:{self.file}:{self.function} with the weights of the run",
            )
        return code

    def _find(self, module: ModuleType) -> Callable[..., Any]:
        found: Callable[..., Any] | None = getattr(module, self.function, None)
        if callable(found):
            return found
        own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        if found is None:
            raise RecipeError(
                f"{self.file} has no function '{self.function}'",
                hint=nearest(self.function, own) if own else "it defines no function",
            )
        raise RecipeError(f"{self.file}: {self.function} is {type(found).__name__}, not a function")

    def _arguments(self, function: Callable[..., Any], sizes: dict[str, int]) -> dict[str, int]:
        """Choose what the function takes of the sizes."""
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError) as error:
            raise RecipeError(
                f"{self.label}: {first_line(error)}", hint=f"write a function of {_names(_SIZES)}"
            ) from error
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            taken = [*sizes]
        else:
            by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
            taken = [parameter.name for parameter in parameters if parameter.kind in by_name]
        variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        needed = [p.name for p in parameters if p.default is p.empty and p.kind not in variable]
        unknown = [name for name in needed if name not in sizes or name not in taken]
        if unknown:
            raise RecipeError(
                f"{self.label} needs {_names(unknown)}, and cakd gives {_names(_SIZES)} by name",
                hint=f"give {'it a default' if len(unknown) == 1 else 'them defaults'}, or name another function",
            )
        return {name: value for name, value in sizes.items() if name in taken}

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Run somebody's code: it finds its neighbours, prints beside the results, and fails in one sentence."""
        folder = os.path.dirname(self.file)
        sys.path.insert(0, folder)
        try:
            with contextlib.redirect_stdout(sys.stderr):
                yield
        except (CakdError, torch.OutOfMemoryError):
            raise
        except SyntaxError as error:
            place = f"{error.filename or self.file}" + (f":{error.lineno}" if error.lineno else "")
            raise RecipeError(f"{place}: {error.msg}", hint=_WHOLE) from error
        except (Exception, SystemExit) as error:
            place = place_in_own_code(error) or self.file
            raise RecipeError(f"{place}: {type(error).__name__}: {first_line(error)}", hint=_WHOLE) from error
        finally:
            sys.path.remove(folder)


def _executed(code: bytes, file: str, name: str) -> ModuleType:
    module = ModuleType(name)
    module.__file__ = file
    # Where dataclasses and pickle look for what the file defines.
    sys.modules[name] = module
    exec(compile(code, file, "exec"), vars(module))
    return module


def _names(names: Sequence[str]) -> str:
    return " and ".join(names)
