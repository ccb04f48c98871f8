"""Give the pictures of a dataset/ their captions, and check the captions that they have.

    python -m training.caption DATASET --model Llama-3.2-11B-Vision-Instruct   # as the paper
    python -m training.caption DATASET --model FOLDER --label-blind            # the control
    python -m training.caption DATASET --attributes                            # measured words
    python -m training.caption DATASET --import isic2020.json                  # made elsewhere
    python -m training.caption DATASET --check --checkpoint models/mini

Captions go into `text` of `metadata.jsonl`, with where they come from in `caption`. A model may be
any image-text-to-text model of transformers, a folder or a name in the local cache; weights are
safetensors. Llama 3.2 Vision is the paper's, but its licence does not reach persons and companies
in the EU: use another one there (LLaVA, Idefics3, Qwen2-VL, Gemma 3, ...).

Answers are kept in `captions.jsonl` from batch to batch, and `metadata.jsonl` is replaced at the
end: the same command goes on where it was stopped. Pictures that cannot be captioned are listed,
keep the text they had, and are tried again by the next run. `--part 1/4` to `--part 4/4` share the
work over processes or GPUs; then the command without `--part` writes all captions.

`--check` ends with status 1 and a list where something is wrong (`training.caption_check`).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from dermaflux import dataset, files
from dermaflux.command import ended, names
from dermaflux.errors import DatasetError
from training import caption_check, caption_import, caption_text
from training.caption_attributes import AttributeCaptioner
from training.caption_run import run
from training.caption_text import Asking
from training.captioner import VisionCaptioner
from training.data import count

MODES: Final = ("model", "attributes", "imported", "check")
_SHOWN: Final = 20
"""Problems of one kind that are shown; `--report` has all."""
_OF_MODE: Final = {
    "label_blind": ("model",), "prompt": ("model",), "template": ("model",),
    "patient": ("model",), "batch": ("model",), "max_tokens": ("model",),
    "temperature": ("model",), "top_p": ("model",), "seed": ("model",), "dtype": ("model",),
    "device": ("model",), "download": ("model",), "revision": ("model",),
    "part": ("model", "attributes"), "border": ("attributes",), "jobs": ("attributes",),
    "checkpoint": ("check",), "allow": ("check",), "identical": ("check",), "report": ("check",),
}  # fmt: skip
"""Option -> the modes that it says something to."""

Part = tuple[int, int]


def run_import(folder: Path, file: Path) -> dict[str, Any]:
    """Take captions from a file; what the command prints. An empty text takes no other's place.

    Raises:
        DatasetError: what `dermaflux.dataset.read` and `caption_import` refuse, or all texts that
            belong to pictures are empty.
    """
    texts, sha256 = caption_import.read(file)
    records = dataset.read(folder)
    matched = caption_import.matches(records, texts)
    good = {name: text for name, text in matched.found.items() if text.strip()}
    failures = {name: "its text is empty" for name in matched.found if name not in good}
    if not good:
        raise DatasetError(f"all {len(failures)} texts of {file} for this dataset are empty")
    dataset.write(
        folder,
        (
            caption_import.imported(record, good[record.file_name], file.name, sha256)
            if record.file_name in good
            else record
            for record in records
        ),
    )
    return {
        "dataset": str(folder),
        "captions": len(texts),
        "captioned": len(good),
        "without": len(records) - len(good),
        "failed": len(failures),
        "failures": dict(list(failures.items())[:_SHOWN]),
        "unknown": {"count": len(matched.unknown), "first": matched.unknown[:_SHOWN]},
        "ambiguous": {"count": len(matched.ambiguous), "first": matched.ambiguous[:_SHOWN]},
    }


def run_check(
    folder: Path, checkpoint: Path | None, allow: Sequence[str] = (),
    identical: float = caption_check.IDENTICAL, report: Path | None = None,
) -> tuple[dict[str, Any], bool]:  # fmt: skip
    """Check captions; what the command prints, and whether nothing is wrong.

    Raises:
        DatasetError: what `dermaflux.dataset.read` refuses, or `allow` names no kind.
        BundleError: the checkpoint's tokenizers cannot be opened.
    """
    if unknown := sorted(set(allow) - set(caption_check.KINDS)):
        raise DatasetError(
            f"--allow {unknown[0]!r} is no kind; use {', '.join(caption_check.KINDS)}"
        )
    records = dataset.read(folder)
    tokenizers = {}
    if checkpoint is not None:
        from dermaflux.checkpoint import Checkpoint
        from dermaflux.engines import eager

        tokenizers = eager.tokenizers(Checkpoint.open(checkpoint))
    else:
        print("tokens are not counted; --checkpoint names the model to count for", file=sys.stderr)
    found = caption_check.problems(records, tokenizers, identical)
    if report is not None:
        lines = (json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in found)
        files.write(report, "".join(lines).encode())
    wrong = [one for one in found if one.kind not in allow]
    counts = Counter(one.kind for one in found)
    shown: Counter[str] = Counter()
    for one in wrong:
        shown[one.kind] += 1
        if shown[one.kind] <= _SHOWN:
            print(f"{one.kind}: {one.file_name}: {one.detail}", file=sys.stderr)
    for kind, number in shown.items():
        if number > _SHOWN:
            print(f"{kind}: and {number - _SHOWN} more; --report has all", file=sys.stderr)
    summary = {
        "dataset": str(folder),
        "records": len(records),
        "ok": not wrong,
        "problems": {kind: counts[kind] for kind in caption_check.KINDS if counts[kind]},
        "allowed": sorted(set(allow)),
        "tokens": caption_check.lengths(records, tokenizers) or None,
        "repetition": caption_check.repetition(records),
    }
    return summary, not wrong


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    (mode,) = [one for one in MODES if getattr(options, one)]
    for name, modes in _OF_MODE.items():
        if mode not in modes and getattr(options, name) != parser.get_default(name):
            flags = " and ".join(f"--{one}" for one in modes)
            parser.error(f"--{name.replace('_', '-')} goes with {flags} only")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")

    def work() -> int:
        good = True
        if mode == "imported":
            summary = run_import(options.dataset, options.imported)
        elif mode == "check":
            summary, good = run_check(
                options.dataset, options.checkpoint, options.allow, options.identical,
                options.report,
            )  # fmt: skip
        elif mode == "attributes":
            measuring = AttributeCaptioner(options.dataset, options.border, options.jobs)
            try:
                summary = run(options.dataset, measuring, options.part)
            finally:
                measuring.close()
        else:
            dataset.read(options.dataset)
            vision = VisionCaptioner(options.dataset, _asking(options))
            summary = run(options.dataset, vision, options.part)
        print(json.dumps(summary, ensure_ascii=False))
        return 0 if good else 1

    return ended(work, "stopped; the same command goes on from the last batch")


def _asking(options: argparse.Namespace) -> Asking:
    blind = options.label_blind
    asking = Asking(
        model=options.model,
        revision=options.revision,
        download=options.download,
        prompt=options.prompt or (caption_text.BLIND_PROMPT if blind else caption_text.PROMPT),
        template=options.template
        or (caption_text.BLIND_TEMPLATE if blind else caption_text.TEMPLATE),
        patient=options.patient,
        batch=options.batch,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        dtype=options.dtype,
        device=options.device,
    )
    if blind and "{label}" in asking.prompt:
        raise DatasetError("--label-blind, but --prompt has {label}; leave one of them out")
    return asking


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.caption", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("dataset", type=Path, help="folder with metadata.jsonl")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--model", help="folder, or name, of an image-text-to-text model")
    mode.add_argument("--attributes", action="store_true", help="words: own ones, or measured")
    mode.add_argument(
        "--import", dest="imported", type=Path, metavar="FILE", help="JSON: name -> text, or a list"
    )
    mode.add_argument("--check", action="store_true", help="list what is wrong with the captions")
    add("--label-blind", action="store_true", help="neither prompt nor template names the label")
    add("--prompt", default="", help="other than the paper's; {label} is filled in")
    add("--template", default="", help="of the text: {text}, {label} and {patient} are filled in")
    add(
        "--patient", action=argparse.BooleanOptionalAction, default=Asking.patient,
        help="a sentence on sex and age where they are known, as in the paper",
    )  # fmt: skip
    add("--batch", type=count, default=Asking.batch, help="pictures at once")
    add("--max-tokens", type=count, default=Asking.max_tokens, help="of an answer")
    add("--temperature", type=float, default=Asking.temperature, help="0 is greedy decoding")
    add("--top-p", type=float, default=Asking.top_p, help="share of probability to draw from")
    add("--seed", type=int, default=Asking.seed, help="of drawing, where temperature is above 0")
    add(
        "--dtype", choices=list(caption_text.DTYPES), default=Asking.dtype, help="auto: the model's"
    )
    add("--device", default=Asking.device, help="torch's name, or auto: over all GPUs")
    add("--download", action="store_true", help="fetch a model by name if it is not here")
    add("--revision", default=Asking.revision, help="of a model by name")
    add("--part", type=_part, metavar="K/N", help="caption every Nth picture, from the Kth")
    add("--border", action="store_true", help="with border words, which are not validated")
    add("--jobs", type=count, default=os.cpu_count() or 1, help="processes that measure")
    add("--checkpoint", type=Path, help="whose tokenizers count")
    add("--allow", type=names, default=(), help=", ".join(caption_check.KINDS))
    add(
        "--identical", type=float, default=caption_check.IDENTICAL,
        help="largest share of patients or lesions that one text may stand for",
    )  # fmt: skip
    add("--report", type=Path, help="JSON lines with all problems")
    return parser


def _part(text: str) -> Part:
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is no part; use 1/4 to 4/4, or the like")
    return int(part), int(parts)


if __name__ == "__main__":
    sys.exit(main())
