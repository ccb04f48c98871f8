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
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, field, fields
from pathlib import Path
from typing import Any, Final, TypeVar

from dermaflux.errors import Cancelled, DermaFluxError

STOPPED: Final = 130
"""Exit status of a command that was interrupted, as shells have it."""

Settings = TypeVar("Settings")


def option(
    text: str, default: Any = MISSING, *, position: bool | None = None, alone: Any = None
) -> Any:
    """A field of a command's settings with its help; without a default it is asked for.

    `position` says whether it is given by position, not by name: what has no default is, if nothing
    is said. `alone` is the value of a name that is given without one.
    """
    return field(default=default, metadata={"help": text, "position": position, "alone": alone})


def names(text: str) -> tuple[str, ...]:
    """`"fp32, int8,fp32"` -> `("fp32", "int8")`."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def parsed(
    kind: type[Settings], command: str, description: str, arguments: Sequence[str] | None
) -> Settings:
    """The settings of a command line: fields without a default by position, others as options.

    A field `dry_run` is the option `--dry-run`. Fields are `str`, `int`, `float`, `Path` (also
    `| None`), `bool` (a flag) or a tuple of names.
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
        needed = one.default is MISSING
        name = f"--{one.name.replace('_', '-')}"
        if typed == "bool":
            parser.add_argument(name, action="store_true", help=text)
        elif one.metadata["position"] or (needed and one.metadata["position"] is None):
            more: dict[str, Any] = {} if needed else {"nargs": "?", "default": one.default}
            parser.add_argument(one.name, type=kinds[typed], help=text, **more)
        else:
            more = {"required": True} if needed else {"default": one.default}
            if one.metadata["alone"] is not None:
                more |= {"nargs": "?", "const": one.metadata["alone"]}
            parser.add_argument(name, type=kinds[typed], help=text, **more)
    return kind(**vars(parser.parse_args(arguments)))


def at_least(settings: object, least: Mapping[str, float]) -> None:
    """Nothing where each named field that is given is finite and not below its bound.

    Raises:
        DermaFluxError: with the option, its value and the bound.
    """
    for name, bound in least.items():
        value = getattr(settings, name)
        if value is not None and not bound <= value < math.inf:
            given = f"--{name.replace('_', '-')}"
            raise DermaFluxError(f"{given} {value} is out of range; use {bound:g} or more")


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
