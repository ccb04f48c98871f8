"""Is this bundle whole, what does this machine run it on, and does the right image come out?

    python -m dermaflux doctor bundles/mini
    python -m dermaflux doctor bundles/mini --golden --json

Findings are `ok`, `note` (worth knowing) or `fail`. Nothing is loaded unless `--golden` asks for
the golden image, so a report on 24 GB takes as long as reading them, for their hashes. `--golden`
also opens the classifier, whose engine may have something to say (`dermaflux.engines.notes`).
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from dermaflux import __version__, memory, tiers
from dermaflux.bundle import GENERATOR_PARTS, Bundle, Data, sha256
from dermaflux.engines import ENGINES, Choice, choose, load, usable_cores
from dermaflux.engines.notes import note_of
from dermaflux.errors import BundleError, DermaFluxError, EngineError
from dermaflux.hardware import Machine, look
from dermaflux.memory import gigabytes

OK: Final = "ok"
NOTE: Final = "note"
FAIL: Final = "fail"

_PACKAGES: Final = (
    *("numpy", "pillow", "tokenizers", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt"),
    *("cuda-bindings", "nvidia-ml-py", "torch", "torchao"),
)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: `ok`, `note` or `fail`, and in words what was found."""

    about: str
    state: str
    words: str


@dataclass(frozen=True)
class Report:
    """All findings, and what they are about, for a program to read."""

    bundle: str
    id: str | None
    versions: Mapping[str, str]
    machine: Machine
    choices: tuple[Choice, ...]
    groups: tuple[tuple[str, ...], ...]
    findings: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        """Whether nothing failed."""
        return all(finding.state != FAIL for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """Plain values; `healthy` among them."""
        return {**asdict(self), "healthy": self.healthy}

    def __str__(self) -> str:
        width = max(len(finding.about) for finding in self.findings)
        return "\n".join(f"{f.state:<5}{f.about:<{width + 2}}{f.words}" for f in self.findings)


def examine(
    path: Path,
    engine: str | None = None,
    precision: str | None = None,
    *,
    golden: bool = False,
    machine: Machine | None = None,
    tier: str | None = None,
    classifier_tier: str | None = None,
) -> Report:
    """Look at a bundle and at this machine. What is wrong is a finding, not an exception."""
    machine = machine or look()
    found = [_of_machine(machine), *_devices(machine)]
    versions = _versions()
    words = ", ".join(f"{name} {version}" for name, version in versions.items())
    found.append(Finding("versions", OK, words))
    try:
        bundle = Bundle.open(path)
    except BundleError as error:
        found.append(Finding("bundle", FAIL, str(error)))
        return Report(str(path), None, versions, machine, (), (), tuple(found))
    made = f"{bundle.name} ({bundle.id}), {bundle.made_by}, {bundle.created}"
    found.append(Finding("bundle", OK, made))
    found += _hashes(bundle)
    findings, choices = _choices(bundle, engine, precision, machine, (tier, classifier_tier))
    found += findings
    groups: tuple[tuple[str, ...], ...] = ()
    if all(part in choices for part in GENERATOR_PARTS):
        finding, groups = _memory(bundle, choices, machine)
        found.append(finding)
    found += _licences(bundle)
    found += _parity(bundle, choices)
    found.append(_golden(bundle, engine, precision, tier) if golden else _stored(bundle))
    if golden and "classifier" in choices:
        found += _classifier(bundle, choices["classifier"])
    report = tuple(found)
    return Report(str(path), bundle.id, versions, machine, tuple(choices.values()), groups, report)


def damaged(bundle: Bundle, wanted: Iterable[Data]) -> list[str]:
    """Files whose sha256 is not the manifest's. Hashed beside each other: disks outrun a core."""
    data = list(wanted)
    if not data:
        return []
    with ThreadPoolExecutor(min(len(data), usable_cores())) as pool:
        hashes = pool.map(lambda d: sha256(bundle.file(d.path)), data)
        return [d.path for d, found in zip(data, hashes, strict=True) if found != d.sha256]


def files_of(bundle: Bundle, choices: Iterable[Choice] | None = None) -> list[Data]:
    """Graphs, their external data and all else that runs: of a bundle, or of these choices."""
    pairs = (
        [(c.part, c.precision) for c in choices]
        if choices is not None
        else [(part, level) for part, content in bundle.parts.items() for level in content.files]
    )
    found = {data.path: data for data in bundle.files}
    for part, level in pairs:
        file = bundle.parts[part].files.get(level)
        if file is not None:
            own = Data(file.path, file.bytes, file.sha256)
            found |= {data.path: data for data in (own, *file.data)}
    return list(found.values())


def _of_machine(machine: Machine) -> Finding:
    system = f"{platform.system()} {platform.machine()}, {machine.cores} cores"
    if machine.ram is None:
        return Finding("machine", NOTE, f"{system}; its memory is not known, so not planned")
    ram = machine.ram
    free = f"{gigabytes(ram.available)} free of {gigabytes(ram.total)} ({ram.source})"
    return Finding("machine", OK, f"{system}, {free}")


def _devices(machine: Machine) -> list[Finding]:
    found = [
        Finding(
            "device",
            OK,
            f"{gpu.name}, compute capability {'.'.join(map(str, gpu.capability))}, driver "
            f"{gpu.driver}, {gigabytes(gpu.memory.available)} free of "
            f"{gigabytes(gpu.memory.total)}",
        )
        for gpu in machine.gpus
    ] or [Finding("device", OK, f"no NVIDIA GPU: {machine.no_gpu}")]
    return [*found, *(Finding("device", OK, f"Intel {name}") for name in machine.intel)]


def _versions() -> dict[str, str]:
    found = {"dermaflux": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _hashes(bundle: Bundle) -> list[Finding]:
    data = files_of(bundle)
    wrong = damaged(bundle, data)
    if not wrong:
        total = sum(file.bytes for file in data)
        return [Finding("files", OK, f"{len(data)} files, {gigabytes(total)}, as exported")]
    return [
        Finding("files", FAIL, f"{path} is not what was exported: its sha256 differs; export again")
        for path in wrong
    ]


def _choices(
    bundle: Bundle,
    engine: str | None,
    precision: str | None,
    machine: Machine,
    names: tuple[str | None, str | None],
) -> tuple[list[Finding], dict[str, Choice]]:
    """`names` are the tiers of the generator and of the classifier."""
    found: list[Finding] = []
    choices: dict[str, Choice] = {}
    for part in bundle.parts:
        try:
            named = _tier(part, *names)
            choice = choose(bundle, part, engine, precision, machine, tier=named)
        except EngineError as error:
            # Whatever draws needs its four parts; the others are beside it.
            needed = part in GENERATOR_PARTS or part == "classifier"
            found.append(Finding(part, FAIL if needed else NOTE, str(error)))
            continue
        choices[part] = choice
        words = f"{choice.precision} on {choice.engine}: {choice.reason}"
        found.append(Finding(part, OK, words))
        for label, why in choice.rejected:
            # An engine that is not here is not here for any part: once is enough.
            about = "engine" if label in ENGINES else part
            finding = Finding(about, NOTE, f"not {label}: {why}")
            found += [finding] if finding not in found else []
    return found, choices


def _tier(part: str, generator: str | None, classifier: str | None) -> tiers.Tier | None:
    if part == "classifier":
        return None if classifier is None else tiers.classifier_tier(classifier)
    return None if generator is None else tiers.tier(generator)


def _memory(
    bundle: Bundle, choices: Mapping[str, Choice], machine: Machine
) -> tuple[Finding, tuple[tuple[str, ...], ...]]:
    height, width = bundle.defaults.height, bundle.defaults.width
    try:
        made = memory.plan(bundle, choices, machine)
    except EngineError as error:
        return Finding("memory", FAIL, str(error)), ()
    size = f"one image of {width} x {height}: {made.shortage(height, width)}"
    if not made.devices:
        return Finding("memory", NOTE, "not planned: no device tells its memory"), made.groups
    if made.in_turns:
        turns = ", then ".join(" and ".join(group) for group in made.groups)
        return Finding("memory", NOTE, f"in turns ({turns}), loaded anew each time; {size}"), (
            made.groups
        )
    most = made.batch(height, width)
    return Finding("memory", OK, f"all parts together, batches of {most}; {size}"), made.groups


def _licences(bundle: Bundle) -> list[Finding]:
    if not bundle.licences:
        return [Finding("licence", NOTE, "the bundle records none: ask whoever made it")]
    return [
        Finding(
            "licence",
            OK,
            f"{entry.name}: {entry.licence}"
            + (f" ({entry.attribution})" * bool(entry.attribution)),
        )
        for entry in bundle.licences
    ]


def _parity(bundle: Bundle, choices: Mapping[str, Choice]) -> list[Finding]:
    """What the export measured for the transformer's precision, on any engine."""
    choice = choices.get("transformer")
    if choice is None:
        return []
    measured = bundle.parity.images.get(choice.precision, {})
    if choice.engine not in measured:
        there = ", ".join(measured) or "none"
        return [
            Finding(
                "parity",
                NOTE,
                f"images in {choice.precision} were not compared on {choice.engine} when the "
                f"bundle was made (there: {there}); --golden compares one",
            )
        ]
    image = measured[choice.engine]
    return [
        Finding(
            "parity",
            OK,
            f"{choice.precision} on {choice.engine} against eager torch, {image.prompts} images: "
            f"PSNR median {image.psnr_median_db} dB, worst {image.psnr_worst_db} dB",
        )
    ]


def _classifier(bundle: Bundle, choice: Choice) -> list[Finding]:
    """What its engine says of how it was opened, or why it cannot be."""
    try:
        note = note_of(load(bundle, choice, outputs=("logits", "features")))
    except EngineError as error:
        return [Finding("classifier", FAIL, str(error))]
    return [Finding("classifier", NOTE, note)] if note else []


def _stored(bundle: Bundle) -> Finding:
    if bundle.golden is None:
        return Finding("golden", NOTE, "the bundle has no golden image; export it again for one")
    return Finding("golden", NOTE, f"{bundle.golden.image} is there; make it again with --golden")


def _golden(bundle: Bundle, engine: str | None, precision: str | None, tier: str | None) -> Finding:
    from dermaflux.golden import check
    from dermaflux.pipeline import Pipeline

    try:
        found = check(bundle, Pipeline.open(bundle, engine=engine, precision=precision, tier=tier))
    except DermaFluxError as error:
        return Finding("golden", FAIL, str(error))
    if found is None:
        return _stored(bundle)
    words = f"PSNR {found.psnr_db:.1f} dB, needs at least {found.tolerance_db:g} dB"
    if found.passed:
        return Finding("golden", OK, words)
    return Finding("golden", FAIL, f"{words}; try another --engine or --precision")
