"""What a text claims of a lesion: that it is benign, malignant, both, or nothing.

Written for what vision-language models say of moles, which is English of a few fixed turns. A
mention counts as a claim where nothing in its clause turns it round ("no signs of malignancy"
claims the opposite) or leaves it open ("to rule out melanoma", "benign or malignant"). Where a
denial stands further off the mention says nothing: the check is to find captions that contradict
their label, and a false alarm costs more than a miss among half a million.

    >>> claims("It is concerning for malignancy.")
    {'malignant': 'malignancy'}
    >>> claims("A benign mole with no signs of malignancy.")
    {'benign': 'benign'}
"""

from __future__ import annotations

import re
from typing import Final

BENIGN: Final = "benign"
MALIGNANT: Final = "malignant"
_OPPOSITE: Final = {BENIGN: MALIGNANT, MALIGNANT: BENIGN}

_TERMS: Final = {
    # Words for the whole class can be denied; to deny one diagnosis says nothing of the others.
    (MALIGNANT, True): r"malignan(?:t|cy|cies)|cancers?|cancerous",
    (MALIGNANT, False): r"melanomas?|carcinomas?|lentigo maligna",
    (BENIGN, True): r"benign(?:ity)?|harmless",
    (BENIGN, False): (
        r"na?ev(?:us|i)|seborrh?o?eic keratos[ei]s|dermatofibromas?|h(?:a)?emangiomas?|"
        r"lentig(?:o|ines)(?! maligna)"
    ),
}
_TERM: Final = re.compile(
    "|".join(
        rf"(?P<{label}_{'class' if whole else 'kind'}>\b(?:{words})\b)"
        for (label, whole), words in _TERMS.items()
    )
)
_CLAUSE: Final = re.compile(
    r"[.;:!?\n]+|\b(?:but|however|although|though|while|whereas|yet|nevertheless)\b"
)
_BREAK: Final = re.compile(
    r",|\bwhich\b|\bsuggesting\b|\bindicating\b|\bmaking it\b|"
    r"\band (?=(?:is|are|appears?|looks?|seems?|suggests?|indicates?|the|it|this|has|shows?)\b)"
)
_DENIAL: Final = re.compile(
    r"\b(?:no|not|never|without|neither|nor|none|nothing|cannot|absence of|absent|lacks?|lacking|"
    r"free (?:of|from)|unlikely|less (?:likely|concerning|suspicious|suggestive|worrisome)|"
    r"against|rather than|instead of|as opposed to|unlike|"
    r"low(?:er)? (?:suspicion|risk|likelihood|probability|concern)|excludes?|excluded|"
    r"rules? out|ruled out)\b|n't\b|\bnon-?$"
)
_DENIED_AFTER: Final = re.compile(
    r"^\W*(?:\w+ ){0,2}(?:(?:is|are|was|were|seems?|appears?) "
    r"(?:\w+ ){0,2}?(?:not|unlikely|absent|excluded|ruled out|improbable)\b|unlikely\b|"
    r"(?:cannot|can't) be (?:seen|found|observed|identified)\b)"
)
_OPEN: Final = re.compile(
    r"\b(?:criteri[ao]n?|rul(?:e|es|ing) out|to exclude|to confirm|to determine|whether|if|"
    r"distinguish\w*|differentiat\w*|check(?:ed|ing|s)? for|monitor\w* for|screen\w* for|"
    r"test\w* for|look(?:ing)? for|evaluat\w+ for|assess\w* for|versus|vs|pre-?$)"
)
_BOTH: Final = re.compile(
    r"\b(?:non-?)?(?:benign|malignant|cancerous)(?: \w+)? "
    r"(?:or|and|vs\.?|versus|from|to) (?:a |an )?(?:non-?)?(?:benign|malignant|cancerous)\b"
)
_VERB: Final = re.compile(
    r"\b(?:is|are|appears?|looks?|seems?|suggests?|indicates?|depicts?|shows?|makes?|likely|probably)\b"
)
_AUXILIARY: Final = {"would", "may", "might", "could", "can", "often", "typically", "strongly"}


def claims(text: str) -> dict[str, str]:
    """Label -> the word that claims it, its first. Empty where a text says nothing of either."""
    found: dict[str, str] = {}
    plain = _BOTH.sub("lesion", text.lower().replace("\u2019", "'"))
    plain = re.sub(r"\bnon(?=(?:cancerous|malignant)\b)", "non-", plain)
    for clause in _CLAUSE.split(plain):
        for term in _TERM.finditer(clause):
            label, _, kind = str(term.lastgroup).partition("_")
            claim = _claim(clause, term.start(), term.end())
            if claim is False and kind == "class":
                found.setdefault(_OPPOSITE[label], clause[_from(clause, term.start()) : term.end()])
            elif claim:
                found.setdefault(label, term[0])
    return {label: " ".join(words.split()) for label, words in found.items()}


def _from(clause: str, start: int) -> int:
    """Where the part of a clause that a mention stands in begins."""
    return max((one.end() for one in _BREAK.finditer(clause, 0, start)), default=0)


def _claim(clause: str, start: int, end: int) -> bool | None:
    """True where a mention is claimed, False where it is denied, None where it is left open."""
    near = clause[_from(clause, start) : start]
    if _OPEN.search(near):
        return None
    if denials := list(_DENIAL.finditer(near)):
        # "absence of asymmetry suggests" says something new, "does not suggest" does not.
        return None if _own_verb(near[denials[-1].end() :], subject=True) else False
    if _DENIED_AFTER.search(clause[end:]):
        return False
    # "lacks the smooth, even edges seen in benign moles" denies over a comma; a verb of its own,
    # as in "with no irregular border, the mole appears benign", begins anew.
    if _DENIAL.search(clause[:start]) and not _own_verb(near):
        return None
    return True


def _own_verb(words: str, subject: bool = False) -> bool:
    """Whether words have a verb that belongs to no "that" or "which" before it; with `subject`,
    one that has something to belong to."""
    for verb in _VERB.finditer(words):
        before = [word for word in words[: verb.start()].split() if word not in _AUXILIARY]
        if (before or not subject) and before[-1:] not in (["that"], ["which"]):
            return True
    return False
