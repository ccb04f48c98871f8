"""A YAML file -> plain values, strictly: what YAML lets pass by and nobody meant is refused.

Of two equal keys YAML keeps the last, and an alias of an alias of an alias fills the memory; both
are errors here, with their line. Only safe values are made: texts, numbers, lists and mappings.

    >>> read(Path("plan.yaml"))
    {'total': 4375, 'groups': [{'share': 0.5, 'label': 'malignant'}, ...]}
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from dermaflux.errors import DatasetError

MAX_BYTES: Final = 2**17
"""Written by hand, a thousand groups take half of it; reading it takes a second."""
MAX_DEPTH: Final = 16
"""Lists and mappings in each other; a plan needs five."""
MAX_SAID: Final = 200
"""Characters of the library's own sentences, which quote tags and words whole."""
MAX_DIGITS: Final = 300
"""Characters of a whole number: floats end there, and Python does not even print much longer."""
_TOO_LONG: Final = (
    f"it goes on for more than {MAX_DIGITS} characters, and no key takes such a number"
)
_PLAIN: Final = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")


def read(file: Path) -> Any:
    """The value of the file's only document.

    Raises:
        DatasetError: the file cannot be read, is too large, is no UTF-8 or no YAML, has an alias, a
            key twice, a tag, or brackets in brackets without end; with the line. Or PyYAML is not
            installed.
    """
    try:
        # It has no types of its own.
        yaml: Any = importlib.import_module("yaml")
    except ImportError:
        raise DatasetError(
            f"{file} needs PyYAML, which is not installed; pip install PyYAML"
        ) from None
    text = _text(file)
    try:
        _check_events(file, yaml, text)
        loader = yaml.SafeLoader(text)
        try:
            return _value(file, yaml, loader, loader.get_single_node())
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark else ""
        said = str(error.problem or error.context)[:MAX_SAID]
        raise DatasetError(f"{file}{where}: {said}") from error
    except yaml.YAMLError as error:
        said = " ".join(str(error).split())[:MAX_SAID]
        raise DatasetError(f"{file} is not YAML: {said}") from error


def written(value: object) -> str:
    """A value as it stands in a file, YAML or JSON: null, true, [1]; texts in quotes.

    >>> written({"a": [None, True]})
    "{'a': [null, true]}"
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{', '.join(written(one) for one in value)}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{written(k)}: {written(v)}" for k, v in value.items()) + "}"
    return repr(value)


def _text(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise DatasetError(
                f"{file} has more than {MAX_BYTES} bytes; is it the right file? Split a larger one"
            )
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{file}, byte {error.start + 1} is not UTF-8 ({error.reason}); save the file as UTF-8"
        ) from error
    except FileNotFoundError:
        raise DatasetError(f"there is no file {file}") from None
    except OSError as error:
        raise DatasetError(f"{file} cannot be read: {error.strerror or error}") from error


def _check_events(file: Path, yaml: Any, text: str) -> None:
    """Refuse aliases and depth before anything is built of them."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise DatasetError(
                f"{file}, line {line}: aliases (*) are not taken; write it out again"
            )
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise DatasetError(
                    f"{file}, line {line}: lists and mappings lie in each other too deeply; use at "
                    f"most {MAX_DEPTH} levels"
                )
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _value(file: Path, yaml: Any, loader: Any, node: Any) -> Any:
    if node is None:
        return None
    line = node.start_mark.line + 1
    if isinstance(node, yaml.ScalarNode):
        try:
            made = loader.construct_object(node)
        # A date of month 13, a number of 5,000 digits, !!int of a word.
        except (ValueError, OverflowError) as error:
            said = str(error)[:MAX_SAID]
            if len(node.value) > MAX_DIGITS:  # Python's own words are advice to programmers
                said = _TOO_LONG
            raise DatasetError(f"{file}, line {line}: {node.value[:40]!r}: {said}") from error
        # !!bool of a word that is none.
        except KeyError as error:
            said = f"{node.value[:40]!r} is no value of its tag"
            raise DatasetError(f"{file}, line {line}: {said}") from error
        if isinstance(made, int) and len(node.value) > MAX_DIGITS:
            raise DatasetError(f"{file}, line {line}: {node.value[:40]!r}: {_TOO_LONG}")
        return made
    if node.tag not in _PLAIN:
        raise DatasetError(
            f"{file}, line {line}: the tag {node.tag[:MAX_SAID]} is not taken; leave it out"
        )
    if isinstance(node, yaml.SequenceNode):
        return [_value(file, yaml, loader, one) for one in node.value]
    found: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode) or key_node.value == "<<":
            raise DatasetError(f"{file}, line {line}: a key needs to be a word")
        key = _value(file, yaml, loader, key_node)
        if key in found:
            raise DatasetError(
                f"{file}, line {line}: {str(key)[:40]!r} stands there twice; keep one"
            )
        found[key] = _value(file, yaml, loader, value_node)
    return found
