"""Which comparisons the report tells in sentences, and in which order.

>>> told(results)[0]
'Positive control: 2,117 real pictures in place of 500 changed AUC on the test by +0.021 ...'
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from training.experiment import sentences, tables
from training.experiment.config import ADDED, CLASSIC, ONLY, REAL, UPPER, WEIGHTS
from training.experiment.key import Key
from training.experiment.results import Results


def told(results: Results) -> list[str]:
    """What the figures say: all comparisons of AUC with real pictures alone, on every test.

    The first is of more real pictures with fewer: what the experiment can show at all.
    """
    said: list[str] = []
    models = list(dict.fromkeys(cell.model for cell in results.cells))
    for view in results.views():
        named = "the test" if view.test == "test" else view.test
        on = f"{named}{', histology alone' * view.confirmed}"
        for arm in (ADDED, ONLY, CLASSIC, WEIGHTS, UPPER):
            found: list[Mapping[str, Any]] = []
            each: list[str] = []
            for cell, figures, real in _compared(results, arm, models):
                one = results.difference(figures, real, view, "auc")
                if one is None:
                    continue
                found.append(one)
                what = sentences.doing(cell) + (f" ({cell.model})" if len(models) > 1 else "")
                each.append(sentences.changed(what, real.size, f"AUC on {on}", one))
            if arm == ADDED and found:
                said.append(sentences.summed(found, f"AUC on {on}"))
            if arm == ADDED and found and view == results.views()[0]:
                accuracy = [
                    results.difference(cell, results.real(cell), view, "accuracy")
                    for cell in tables.cells_of(results, arm)
                ]
                known = [one for one in accuracy if one is not None]
                said.append(sentences.summed(known, f"accuracy on {on}"))
            # Beside the first test, the many sentences of others would hide what they say.
            if view == results.views()[0]:
                said += each
    first = [_control(results, model, len(models) > 1) for model in models]
    if not said and not any(first):
        return ["Only one arm was run: there is nothing to compare."]
    return [one or sentences.NO_CONTROL for one in first] + said


def _control(results: Results, model: str, several: bool) -> str | None:
    """What more real pictures change on the first test; None where just one size was run."""
    reals = [one for one in results.cells if one.arm == REAL and one.model == model]
    view = next(iter(results.views()), None)
    if len(reals) < 2 or view is None:
        return None
    few, many = (choose(reals, key=lambda one: one.size) for choose in (min, max))
    found = results.difference(many, few, view, "auc")
    if found is None:
        return None
    named = "the test" if view.test == "test" else view.test
    measure = f"AUC on {named}" + (f" ({model})" if several else "")
    return sentences.control(few.size, many.size, measure, found)


def _compared(results: Results, arm: str, models: Sequence[str]) -> Iterator[tuple[Key, Key, Key]]:
    """An arm's cells, the cells of their figures, and what each is compared with.

    That is real alone of the same size; the upper bound stands beside every size.
    """
    if arm == UPPER:
        for model in models:
            reals = [one for one in results.cells if one.arm == REAL and one.model == model]
            for cell, figures in results.bounds(model).items():
                yield from ((cell, figures, real) for real in reals if real != figures)
        return
    for cell in tables.cells_of(results, arm):
        yield cell, cell, results.real(cell)
