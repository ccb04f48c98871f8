"""What a site asks of licences: a `Policy`, read strictly from a YAML file or taken by its name.

A policy is one of the uses that `dermaflux.licence` tells apart (`private`, `research`,
`commercial`), or a YAML file, whose keys may all be left out:

    use: commercial                    # what every licence has to allow; default: research
    eu: true                           # we live, or have our business, in the European Union
    accept: [LicenseRef-Llama-3.2]     # we have other terms with the owner: `use` bars it not
    allow: [Apache-2.0, CC0-1.0]       # nothing else than these
    deny: [CC-BY-SA-4.0]               # never these, whatever else is said
    kinds:                             # the same three for one kind: weights, data, captions, or
      classifier: {deny: [CC-BY-NC-4.0]}       # all that one component is made of

    >>> Policy.of("commercial").use
    'commercial'
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from dermaflux.licence import USES, LicenceError, acceptable, find

GENERATOR: Final = "generator"
CLASSIFIER: Final = "classifier"
KINDS: Final = ("weights", "data", "captions", GENERATOR, CLASSIFIER)
"""What a rule of a policy may be about; an ingredient has a kind and belongs to a component."""
MAX_BYTES: Final = 65_536
"""Of a policy's file, which people write by hand."""
_LISTS: Final = ("accept", "allow", "deny")


@dataclass(frozen=True)
class Rule:
    """Ids of licences, as `dermaflux.licence.find` has them. `allow` is None where all may be."""

    accept: frozenset[str] = frozenset()
    allow: frozenset[str] | None = None
    deny: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Policy:
    """What a site asks of licences, of all ingredients and of single kinds of them."""

    name: str
    use: str = "research"
    eu: bool = False
    rule: Rule = Rule()
    kinds: Mapping[str, Rule] = field(default_factory=dict)

    @classmethod
    def of(cls, text: str) -> Policy:
        """The policy of a use's name, else of a YAML file of that name.

        Raises:
            LicenceError: neither, or the file has something else than a policy.
        """
        return cls(text, use=text) if text in USES else _read(Path(text))

    def rules(self, kind: str, component: str) -> list[Rule]:
        """The rules that an ingredient of this kind and component has to meet."""
        return [self.rule, *(self.kinds[own] for own in (kind, component) if own in self.kinds)]


def _read(file: Path) -> Policy:
    content = _yaml(file)
    if not isinstance(content, dict):
        raise LicenceError(f"{file} is no policy; it needs keys such as use, allow and deny")
    kinds = content.pop("kinds", None) or {}
    use, eu = content.pop("use", "research"), content.pop("eu", False)
    if use not in USES:
        raise LicenceError(f"{file}: use is {use!r}; it needs {', '.join(USES)}")
    if not isinstance(eu, bool):
        raise LicenceError(f"{file}: eu is {eu!r}; it needs true or false")
    if not isinstance(kinds, dict) or any(kind not in KINDS for kind in kinds):
        raise LicenceError(f"{file}: kinds needs {', '.join(KINDS)}, each with its lists")
    rules = {kind: _rule(file, f"kinds.{kind}", rule) for kind, rule in kinds.items()}
    return Policy(str(file), use, eu, _rule(file, "", content), rules)


def _rule(file: Path, where: str, content: Any) -> Rule:
    if not isinstance(content, dict):
        raise LicenceError(f"{file}: {where} needs lists, of {', '.join(_LISTS)}")
    found: dict[str, frozenset[str]] = {}
    for key, names in content.items():
        if key not in _LISTS:
            known = (*(() if where else ("use", "eu", "kinds")), *_LISTS)
            raise LicenceError(f"{file}: {where or 'it'} has {key!r}; it takes {', '.join(known)}")
        if not isinstance(names, list) or not all(isinstance(n, str) and n.strip() for n in names):
            raise LicenceError(f"{file}: {key} needs a list of licences, such as [Apache-2.0]")
        # `other` and `none` would let pass whatever nobody stated; that has a word of its own.
        read = acceptable if key == "accept" else find
        try:
            found[key] = frozenset(read(name).id for name in names)
        except LicenceError as error:
            raise LicenceError(f"{file}: {key}: {error}") from None
    return Rule(
        accept=found.get("accept", frozenset()),
        allow=found.get("allow"),
        deny=found.get("deny", frozenset()),
    )


def _yaml(file: Path) -> Any:
    """The value of a YAML file; a key twice is refused, for YAML would forget the first."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise LicenceError(
            f"{file} is no policy: {error.strerror}; use {', '.join(USES)}, or name a file"
        ) from None
    try:
        yaml: Any = importlib.import_module("yaml")  # it has no types of its own
    except ImportError:
        raise LicenceError(f"{file} needs PyYAML; pip install PyYAML") from None
    if len(data) > MAX_BYTES:
        raise LicenceError(f"{file} has more than {MAX_BYTES:,} bytes, which no policy has")
    try:
        text = data.decode()
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise LicenceError(f"{file} has an alias (*); write the list out")
        node = yaml.compose(text, yaml.SafeLoader)
        waiting = [node] if node is not None else []
        while waiting:
            one = waiting.pop()
            if isinstance(one, yaml.MappingNode):
                keys = [key.value for key, _ in one.value]
                twice = next((key for key in keys if keys.count(key) > 1), None)
                if twice is not None:
                    raise LicenceError(f"{file} has {twice!r} twice; keep one")
                waiting += [value for _, value in one.value]
        return yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise LicenceError(f"{file} is not YAML: {' '.join(str(error).split())[:300]}") from None
