"""What every command line does alike: options from a dataclass, errors in one sentence, a status.

A command is a function that takes a small frozen dataclass; each field carries its help, and the
dataclass is saved into what the command makes.

    >>> @dataclass(frozen=True)
    ... class Settings:
    ...     bundle: Path = option("the bundle's folder")
    ...     parts: tuple[str, ...] = option("comma-separated", ())
    >>> def main(arguments=None):
    ...     settings = parsed(Settings, "python -m export.compile", "Build plans.", arguments)
    ...     return ended(lambda: print(compile(settings)))
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, field, fields
from pathlib import Path
from typing import Any, Final, TypeVar

from dermaflux.errors import Cancelled, DermaFluxError

STOPPED: Final = 130
"""Exit status of a command that was interrupted, as shells have it."""

Settings = TypeVar("Settings")


def option(text: str, default: Any = MISSING) -> Any:
    """A field of a command's settings with its help; without a default it is asked for."""
    return field(default=default, metadata={"help": text})


def names(text: str) -> tuple[str, ...]:
    """`"fp32, int8,fp32"` -> `("fp32", "int8")`."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def parsed(
    kind: type[Settings], command: str, description: str, arguments: Sequence[str] | None
) -> Settings:
    """The settings of a command line: fields without a default by position, others as options.

    Fields are `str`, `int`, `float`, `Path` (also `| None`), `bool` (a flag) or a tuple of names.
    """
    parser = argparse.ArgumentParser(prog=command, description=description)
    kinds: dict[str, Callable[[str], Any]] = {
        "str": str,
        "int": int,
        "float": float,
        "Path": Path,
        "tuple[str, ...]": names,
    }
    for one in fields(kind):  # type: ignore[arg-type]
        text = one.metadata["help"]
        typed = str(one.type).removesuffix(" | None")
        if typed == "bool":
            parser.add_argument(f"--{one.name}", action="store_true", help=text)
        elif one.default is MISSING:
            parser.add_argument(one.name, type=kinds[typed], help=text)
        else:
            parser.add_argument(f"--{one.name}", type=kinds[typed], default=one.default, help=text)
    return kind(**vars(parser.parse_args(arguments)))


def ended(work: Callable[[], int | None], stopped: str = "stopped") -> int:
    """Run a command's work; its exit status. An error meant for the user is one sentence on stderr.

    The status is what `work` gives (None is 0), the error's own `exit_status`, or 130 where it was
    interrupted, of which `stopped` tells.
    """
    try:
        return work() or 0
    except Cancelled as error:
        print(error, file=sys.stderr)
        return STOPPED
    except DermaFluxError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        return DermaFluxError.exit_status
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return STOPPED
