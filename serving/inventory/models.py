"""The models of a bundle as a bill of materials: what they are, learnt from, are for, and reach.

    >>> document = models(Bundle.open("bundles/mini"))
    >>> [one["type"] for one in document["components"]]
    ['data', 'data', 'data', 'machine-learning-model', 'machine-learning-model', ...]

Two models lie in a bundle, a generator and a classifier, each with a model card; every ingredient
that the provenance names is a component with its licence, and every file one with its sha256.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, Final

from dermaflux.bundle import MANIFEST, Bundle, sha256
from dermaflux.doctor import files_of
from dermaflux.licence import Ingredient
from dermaflux.policy import stated
from dermaflux.rules import CLASSIFIER, GENERATOR
from serving.inventory.bom import finished, hashed, licences

USERS: Final = ("researchers in dermatology and machine learning, in-house",)
LIMITS: Final = {
    GENERATOR: (
        "what it draws is synthetic, shows no person, and is no data to study skin by",
        "it obeys attributes as far as the figures of its training say, and no further",
    ),
    CLASSIFIER: (
        "its answer is no diagnosis; inside its abstention band it gives none",
        "it is calibrated on the data named here; other cameras and skin colours were not seen "
        "unless those data have them",
    ),
}
_USE: Final = {
    GENERATOR: "draws synthetic pictures of skin lesions from attributes, for research",
    CLASSIFIER: "rates photographs of skin lesions as benign or malignant, for research",
}
_WORDS: Final = {
    "data": "data that a model learnt from",
    "weights": "weights that a model began with",
    "captions": "a model that wrote captions which another learnt from",
}
_TASK: Final = {GENERATOR: "text-to-image", CLASSIFIER: "image-classification"}
_ETHICS: Final = (
    {
        "name": "a synthetic picture is taken for a photograph",
        "mitigationStrategy": "each is marked as synthetic in its metadata",
    },
    {
        "name": "it is used on patients",
        "mitigationStrategy": "the page, the model card and every picture say: research use",
    },
)


def models(bundle: Bundle, time: str = "") -> dict[str, Any]:
    """The bill of a bundle; `time`, if any, is ISO 8601 in UTC."""
    everything = stated(bundle.provenance, bundle.licences)
    top = {
        "type": "application",
        "bom-ref": f"bundle:{bundle.id}",
        "name": f"{bundle.name} (bundle of DermaFlux)",
        "version": bundle.id,
        "description": f"made by {bundle.made_by}, {bundle.created}",
        "hashes": hashed(sha256(bundle.path / MANIFEST)),
    }
    components: list[dict[str, Any]] = []
    ingredients: dict[str, dict[str, Any]] = {}
    depends: dict[str, list[str]] = {f"bundle:{bundle.id}": []}
    for part in (GENERATOR, *([CLASSIFIER] if bundle.classifier else [])):
        made_of = [one.ingredient for one in everything if one.component == part]
        # The first weights are the model itself.
        own = next((one for one in made_of if one.kind == "weights"), None)
        made_of = [one for one in made_of if one is not own]
        model = _model(bundle, part, own.licence if own else "", made_of)
        components.append(model)
        ingredients |= {_reference(one): _ingredient(one) for one in made_of}
        depends[model["bom-ref"]] = [_reference(one) for one in made_of]
        depends[f"bundle:{bundle.id}"].append(model["bom-ref"])
    return finished(top, [*components, *ingredients.values()], depends, time)


def _model(
    bundle: Bundle, part: str, licence: str, made_of: Sequence[Ingredient]
) -> dict[str, Any]:
    files = [
        {
            "type": "file",
            "bom-ref": f"file:{bundle.id}/{data.path}",
            "name": data.path,
            "hashes": hashed(data.sha256),
        }
        for data in sorted(files_of(bundle), key=lambda data: data.path)
        if data.path.startswith(f"{CLASSIFIER}/") == (part == CLASSIFIER)
    ]
    return {
        "type": "machine-learning-model",
        "bom-ref": f"model:{bundle.id}/{part}",
        "name": f"{bundle.name} {part}",
        "version": bundle.id,
        "description": _USE[part],
        "licenses": _licences(licence),
        "components": files,
        "modelCard": _card(bundle, part, made_of),
    }


def _card(bundle: Bundle, part: str, made_of: Sequence[Ingredient]) -> dict[str, Any]:
    datasets = [{"ref": _reference(one)} for one in made_of if one.kind == "data"]
    parameters: dict[str, Any] = {
        "approach": {"type": "supervised"},
        "task": _TASK[part],
        "datasets": sorted(datasets, key=lambda one: one["ref"]),
    }
    if part == GENERATOR:
        limits = bundle.limits
        parameters |= {
            "architectureFamily": "rectified-flow transformer",
            "modelArchitecture": "Flux",
            "inputs": [{"format": f"text, {bundle.model.text_length} tokens"}],
            "outputs": [{"format": f"RGB, {limits.min_size} to {limits.max_size} pixels a side"}],
        }
    else:
        assert bundle.classifier is not None, "asked for where there is one"
        _, height, width = bundle.classifier.input_size
        parameters |= {
            "architectureFamily": "image classifier",
            "inputs": [{"format": f"RGB, {height} x {width} pixels"}],
            "outputs": [{"format": f"probability of {', '.join(bundle.classifier.classes)}"}],
        }
    return {
        "modelParameters": parameters,
        "quantitativeAnalysis": {"performanceMetrics": list(_figures(bundle, part))},
        "considerations": {
            "users": list(USERS),
            "useCases": [_USE[part]],
            "technicalLimitations": list(LIMITS[part]),
            "ethicalConsiderations": [dict(one) for one in _ETHICS],
        },
    }


def _figures(bundle: Bundle, part: str) -> Iterable[dict[str, str]]:
    """What the export measured; how well a model does its task is told by its training's report."""
    if part == GENERATOR:
        for precision, engines in sorted(bundle.parity.images.items()):
            for engine, found in sorted(engines.items()):
                where = f"{precision} on {engine}, {found.prompts} pictures, against eager torch"
                yield _figure("PSNR, median, dB", found.psnr_median_db, where)
                yield _figure("PSNR, worst, dB", found.psnr_worst_db, where)
        return
    spec = bundle.classifier
    assert spec is not None, "asked for where there is one"
    yield _figure("threshold", spec.threshold, "probability of malignant from which on it is told")
    yield _figure("abstention, from", spec.abstain[0], "probability of malignant")
    yield _figure("abstention, to", spec.abstain[1], "probability of malignant")
    for precision, measured in sorted(bundle.parity.classifier.items()):
        where = f"{precision}, {measured.images} pictures"
        worst = measured.max_probability_change
        yield _figure("largest change of a probability", worst, f"{where}, against eager torch")
        if measured.auc is not None:
            yield _figure("area under the ROC curve", measured.auc, where)


def _figure(kind: str, value: float, where: str) -> dict[str, str]:
    return {"type": kind, "value": f"{value:g}", "slice": where}


def _ingredient(one: Ingredient) -> dict[str, Any]:
    found: dict[str, Any] = {
        "type": "data" if one.kind == "data" else "machine-learning-model",
        "bom-ref": _reference(one),
        "name": one.name,
        "description": _WORDS.get(one.kind, one.kind),
        "licenses": _licences(one.licence),
    }
    if one.attribution:
        found["authors"] = [{"name": one.attribution}]
    if re.fullmatch(r"[0-9a-f]{64}", one.sha256):
        found["hashes"] = hashed(one.sha256)
    if one.kind == "data":
        found["data"] = [{"type": "dataset", "name": one.name}]
    return found


def _reference(one: Ingredient) -> str:
    """The same for what is the same, another for all else."""
    told = json.dumps([one.kind, one.name, one.licence, one.attribution])
    words = re.sub("[^a-z0-9]+", "-", one.name.casefold()).strip("-")[:40]
    return f"ingredient:{words}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"


def _licences(text: str) -> list[dict[str, Any]]:
    """As SPDX has it where SPDX has it, else by name: ours of `LicenseRef-`, and unknown ones."""
    found = Ingredient("", text).licences
    if all(one.known and one.id != "PDM" and not one.id.startswith("LicenseRef") for one in found):
        return licences(" AND ".join(one.id for one in found))
    return [{"license": {"name": one.id}} for one in found]
