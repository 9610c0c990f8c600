"""The process around the command line: streams, signals, and errors that become exit codes."""

import atexit
import contextlib
import errno
import io
import os
import signal
import sys
from types import FrameType
from typing import Any, NoReturn

from cakd_cli import app
from cakd_cli.errors import (
    CakdError,
    ExitCode,
    HardwareError,
    InputError,
    InterruptedRunError,
    RecipeError,
    first_line,
    place_in_own_code,
)


def main() -> NoReturn:
    """Run the command line; every failure becomes one message and its exit code."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - until the process ends
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a word may be bytes that are no text: in JSON this is an escape too
            stream.reconfigure(errors="backslashreplace")
    _on_signals(signal.SIG_DFL, _interrupt)
    json_mode = "--json" in sys.argv
    try:
        code = _run(json_mode)
        sys.stdout.flush()
    except BrokenPipeError:
        code = int(ExitCode.BROKEN_PIPE)
    except OSError as error:
        # The result itself cannot be written: say so where that is still possible.
        code = _report(_translate(error), json_mode=False)
    finally:
        _forget_unwritten_output()
    _on_signals(_interrupt, signal.SIG_DFL)
    # All is said and done: an impatient Ctrl-C must not interrupt what libraries do at the end.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    sys.exit(code)


_interrupted_by: list[str] = []


def _on_signals(before: Any, after: Any) -> None:
    """Give the signals that end a process a new handler; one that is ignored, as nohup does, stays so."""
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == before:
            signal.signal(number, after)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """End as Ctrl-C does; training has a handler of its own, which saves first."""
    _interrupted_by.append(f" by {signal.Signals(number).name}")
    raise KeyboardInterrupt


def _interrupted() -> InterruptedRunError:
    return InterruptedRunError(f"interrupted{''.join(_interrupted_by[:1])}")


def _run(json_mode: bool) -> int:
    try:
        app.app()
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):
            raise stop.__context__ from None
        code = stop.code if isinstance(stop.code, int) else int(ExitCode.INTERNAL)
        if code == ExitCode.INTERRUPTED:
            return _report(_interrupted(), json_mode)
        if json_mode and code == ExitCode.USAGE:
            sys.stdout.write('{"error": {"code": "usage", "message": "see stderr", "hint": "cakd --help"}}\n')
        return code
    except CakdError as error:
        return _report(error, json_mode)
    except KeyboardInterrupt:
        return _report(_interrupted(), json_mode)
    except BrokenPipeError:
        raise
    except Exception as error:
        if os.environ.get("CAKD_DEBUG"):
            raise
        return _report(_translate(error), json_mode)
    return int(ExitCode.OK)


def _forget_unwritten_output() -> None:
    """Keep Python from trying, and complaining, once more at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _report(error: CakdError, json_mode: bool) -> int:
    from cakd_cli.console import show_error

    if os.environ.get("CAKD_DEBUG"):
        raise error
    show_error(error, json_mode=json_mode)
    return int(error.exit_code)


_ROOM = "make room, then run the same command again; a training run with --resume"
_HINTS = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EMFILE: "more files may be open with: ulimit -n 1024; or fewer are needed with data.workers=0",
}
_FEWER = "fewer images at a time: --batch-size, or engine.evaluation_batch_size"


def _translate(error: Exception) -> CakdError:
    if isinstance(error, OSError):
        place = f": {error.filename}" if error.filename else ""
        return InputError(f"{error.strerror or error}{place}", hint=_HINTS.get(error.errno or 0))
    if isinstance(error, UnicodeError):
        return InputError(f"a name or path is not text in this terminal's encoding: {error}")
    if isinstance(error, RuntimeError) and "home directory" in str(error):
        return InputError("a path begins with ~ and a name that is no user's")
    if type(error).__name__ == "OutOfMemoryError":  # torch's; asking for the class would import it
        return HardwareError(f"the device's memory is full: {first_line(error)}", hint=_FEWER)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "allocate memory" in str(error)):
        return HardwareError(f"this machine's memory is full: {first_line(error)}", hint=_FEWER)
    if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
        return HardwareError(
            f"a process that decodes images died: {first_line(error)}",
            hint="if memory was short: data.workers=1; a training run goes on with --resume",
        )
    if isinstance(error, ValueError) and "null byte" in str(error):
        return InputError("a path holds a NUL character, which no file's name has")
    if place := place_in_own_code(error):
        return RecipeError(
            f"{place}: {type(error).__name__}: {first_line(error)}", hint="CAKD_DEBUG=1 shows the whole traceback"
        )
    return CakdError(
        f"a bug in cakd: {type(error).__name__}: {error}", hint="run again with CAKD_DEBUG=1 and report the traceback"
    )
