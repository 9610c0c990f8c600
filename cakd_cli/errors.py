"""What can go wrong, and the exit code that says so.

CakdError                      1   a bug in cakd when raised as itself
 |- UsageError                 2   a word on the command line
 |- RecipeError                3   a recipe, a name in it, or two settings that do not fit
 |- InputError                 4   a file, data set or checkpoint that is missing or damaged
 |- DivergedError              5   training met a value that is not finite
 |- CheckFailedError           6   eval --min-top1 or the comparison after an export
 |- HardwareError              7   no such device
 |   '- DeviceFullError        7   its memory is full
 |- StoppedError              75   stopped on request after a saved checkpoint: run again with --resume
 '- InterruptedRunError      130   interrupted without a checkpoint
"""

from collections.abc import Mapping
from enum import IntEnum
from typing import Any


class ExitCode(IntEnum):
    """What the process returns to the shell."""

    OK = 0
    INTERNAL = 1
    USAGE = 2
    RECIPE = 3
    INPUT = 4
    DIVERGED = 5
    CHECK_FAILED = 6
    HARDWARE = 7
    STOPPED = 75
    INTERRUPTED = 130
    BROKEN_PIPE = 141


class CakdError(Exception):
    """One sentence for the user, and what to do next.

    Args:
        message: What went wrong, where, and what was given. Lower case, no full stop.
        hint: What to do; a command where one helps.
        document: What the command found before it failed; JSON output holds it beside the error.
    """

    exit_code = ExitCode.INTERNAL
    code = "internal"

    def __init__(self, message: str, *, hint: str | None = None, document: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.document = document or {}


class UsageError(CakdError):
    """A word on the command line that cannot be understood."""

    exit_code = ExitCode.USAGE
    code = "usage"


class RecipeError(CakdError):
    """A recipe that cannot be run as it is written."""

    exit_code = ExitCode.RECIPE
    code = "recipe"


class InputError(CakdError):
    """A file, data set or checkpoint that is missing or damaged."""

    exit_code = ExitCode.INPUT
    code = "input"


class DivergedError(CakdError):
    """A loss or gradient that is not finite."""

    exit_code = ExitCode.DIVERGED
    code = "diverged"


class CheckFailedError(CakdError):
    """A result below the bar that the user set."""

    exit_code = ExitCode.CHECK_FAILED
    code = "check-failed"


class HardwareError(CakdError):
    """A device that is not there, or too small."""

    exit_code = ExitCode.HARDWARE
    code = "hardware"


class DeviceFullError(HardwareError):
    """A step that the device has no room for.

    Attributes:
        parts: Into how many a batch may be cut instead; none if it cannot be cut further.
    """

    def __init__(self, message: str, *, hint: str | None = None, parts: int | None = None) -> None:
        super().__init__(message, hint=hint)
        self.parts = parts


class StoppedError(CakdError):
    """A signal asked the run to stop; its checkpoint is saved."""

    exit_code = ExitCode.STOPPED
    code = "stopped"


class InterruptedRunError(CakdError):
    """A signal ended the command where nothing could be saved."""

    exit_code = ExitCode.INTERRUPTED
    code = "interrupted"


def nearest(word: str, known: list[str]) -> str:
    """Turn a wrong word into the end of a sentence that names near ones, or all of a short list."""
    from difflib import get_close_matches

    by_letters = {name.casefold(): name for name in known}
    near = get_close_matches(word.casefold(), by_letters, n=3, cutoff=0.6)
    if near:
        return "did you mean " + " or ".join(by_letters[name] for name in near) + "?"
    if len(known) <= 30:
        return "choose from " + ", ".join(known)
    return f"there are {len(known)} names"


# How the modules are named that are made of a person's own Python files.
OWN_CODE = "cakd_own_code_"


def place_in_own_code(error: BaseException) -> str:
    """Say where in a person's own Python file an error arose, as FILE:LINE; empty where none was at work."""
    from traceback import walk_tb

    places = [
        f"{frame.f_code.co_filename}:{line}"
        for frame, line in walk_tb(error.__traceback__)
        if str(frame.f_globals.get("__name__")).startswith(OWN_CODE)
    ]
    return places[-1] if places else ""


def first_line(error: BaseException) -> str:
    """Say what another library's error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
