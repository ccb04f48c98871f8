"""Adapters for the challenges of the ISIC: 2017, 2019, 2020, 2024 and MILK10k.

Tables and columns are those of challenge.isic-archive.com and, for 2020 and 2024, of the same data
on Kaggle; pictures may lie in any folder below. Identifiers of lesions (`HAM_...`, `BCN_...`,
`IL_...`) and patients (`IP_...`) are the archive's own, the same in all collections.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from dermaflux.errors import DatasetError
from training.sources.found import (
    Found,
    Pictures,
    age,
    by,
    chosen,
    confirmed,
    given,
    licence,
    locate,
    sex,
    site,
    skin,
    table,
)

_PARTS_2017: Final = (("Training", "train"), ("Validation", "val"), ("Test_v2", "test"))
_CLASSES_2019: Final = ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC", "UNK")
_CLASSES_MILK: Final = (
    "AKIEC", "BCC", "BEN_OTH", "BKL", "DF", "INF", "MAL_OTH", "MEL", "NV", "SCCKA", "VASC",
)  # fmt: skip


def isic2017(folder: Path) -> Iterator[Found]:
    """`ISIC-2017_*_Data`, `*_Part3_GroundTruth.csv`, masks of `*_Part1_GroundTruth` if there."""
    pictures = Pictures.under(folder)
    some = False
    for part, split in _PARTS_2017:
        truth = f"ISIC-2017_{part}_Part3_GroundTruth.csv"
        if locate(folder, truth) is None:
            continue
        some = True
        people = {}
        data = f"ISIC-2017_{part}_Data_metadata.csv"
        if locate(folder, data) is not None:
            people = by(table(folder, data, ("image_id", "age_approximate", "sex")), "image_id")
        columns = ("image_id", "melanoma", "seborrheic_keratosis")
        for row in table(folder, truth, columns):
            person = people.get(row["image_id"], {})
            yield Found(
                pictures.get(row["image_id"]),
                row["image_id"],
                chosen(row, columns[1:], truth) or "neither",
                split=split,
                age=age(person.get("age_approximate")),
                sex=sex(person.get("sex")),
                mask=pictures.get(f"{row['image_id']}_segmentation"),
                modality="dermoscopic",
            )
    if not some:
        raise DatasetError(
            f"{folder} has no ISIC-2017_Training_Part3_GroundTruth.csv, nor that of Validation or "
            "Test_v2; give the folder as its publisher packs it"
        )


def isic2019(folder: Path) -> Iterator[Found]:
    """`ISIC_2019_Training_GroundTruth.csv` and `_Metadata.csv`; `_Test_` if its truth is there."""
    pictures = Pictures.under(folder)
    for part, split in (("Training", "train"), ("Test", "test")):
        truth = f"ISIC_2019_{part}_GroundTruth.csv"
        if split == "test" and locate(folder, truth) is None:
            continue
        needed = ("image", *_CLASSES_2019[:-1])
        rows = table(folder, truth, needed)
        people = by(table(folder, f"ISIC_2019_{part}_Metadata.csv", ("image",)), "image")
        for row in rows:
            person = people.get(row["image"], {})
            yield Found(
                pictures.get(row["image"]),
                row["image"],
                chosen(row, _CLASSES_2019, truth) or "unk",
                group=given(person.get("lesion_id")),
                split=split,
                age=age(person.get("age_approx")),
                sex=sex(person.get("sex")),
                site=site(person.get("anatom_site_general")),
                modality="dermoscopic",
            )


def isic2020(folder: Path) -> Iterator[Found]:
    """`ISIC_2020_Training_GroundTruth_v2.csv` or the first version, or Kaggle's `train.csv`."""
    pictures = Pictures.under(folder)
    names = (
        "ISIC_2020_Training_GroundTruth_v2.csv",
        "ISIC_2020_Training_GroundTruth.csv",
        "train.csv",
    )
    for row in table(folder, names, ("image_name", "patient_id", "benign_malignant", "target")):
        yield Found(
            pictures.get(row["image_name"]),
            row["image_name"],
            row["benign_malignant"].lower(),
            term=given(row.get("diagnosis")),
            said={"0": "benign", "1": "malignant"}.get(row["target"].removesuffix(".0"), ""),
            group=given(row["patient_id"]) or given(row.get("lesion_id")),
            age=age(row.get("age_approx")),
            sex=sex(row.get("sex")),
            site=site(row.get("anatom_site_general_challenge")),
            modality="dermoscopic",
        )


def isic2024(folder: Path) -> Iterator[Found]:
    """SLICE-3D: Kaggle's `train-metadata.csv`, or `metadata.csv` beside the ground truth."""
    pictures = Pictures.under(folder)
    truth = "ISIC_2024_Training_GroundTruth.csv"
    if locate(folder, "train-metadata.csv") is not None:
        rows = table(folder, "train-metadata.csv", ("isic_id", "target", "patient_id"))
        labels = {row["isic_id"]: row["target"] for row in rows}
    else:
        known = table(folder, truth, ("isic_id", "malignant"))
        labels = {row["isic_id"]: row["malignant"] for row in known}
        supplement = {}
        if locate(folder, "ISIC_2024_Training_Supplement.csv") is not None:
            supplement = by(
                table(folder, "ISIC_2024_Training_Supplement.csv", ("isic_id",)), "isic_id"
            )
        rows = [
            {**row, **supplement.get(row["isic_id"], {})}
            for row in table(folder, "metadata.csv", ("isic_id", "patient_id"))
            if row["isic_id"] in labels
        ]
    for row in rows:
        kind = labels[row["isic_id"]].lower().removesuffix(".0")
        yield Found(
            pictures.get(row["isic_id"]),
            row["isic_id"],
            {"false": "0", "true": "1"}.get(kind, kind),
            term=given(row.get("iddx_3")),
            group=given(row["patient_id"]) or given(row.get("lesion_id")),
            age=age(row.get("age_approx")),
            sex=sex(row.get("sex")),
            site=site(row.get("anatom_site_general")),
            licence=licence(row.get("copyright_license")),
            attribution=given(row.get("attribution")),
            modality="total body photograph",
        )


def milk10k(folder: Path) -> Iterator[Found]:
    """`MILK10k_Training_GroundTruth.csv` by lesion, `_Metadata.csv` and `_Supplement.csv`."""
    pictures = Pictures.under(folder)
    truth = "MILK10k_Training_GroundTruth.csv"
    lesions = {
        row["lesion_id"]: chosen(row, _CLASSES_MILK, truth)
        for row in table(folder, truth, ("lesion_id", *_CLASSES_MILK))
    }
    supplement = {}
    if locate(folder, "MILK10k_Training_Supplement.csv") is not None:
        supplement = by(table(folder, "MILK10k_Training_Supplement.csv", ("isic_id",)), "isic_id")
    for row in table(
        folder, "MILK10k_Training_Metadata.csv", ("lesion_id", "image_type", "isic_id")
    ):
        further = supplement.get(row["isic_id"], {})
        tone = given(row.get("skin_tone_class"))
        yield Found(
            pictures.get(row["isic_id"]),
            row["isic_id"],
            lesions.get(row["lesion_id"], ""),
            group=row["lesion_id"],
            confirmed=confirmed(further.get("diagnosis_confirm_type")),
            age=age(row.get("age_approx")),
            sex=sex(row.get("sex")),
            site=site(row.get("site")),
            licence=licence(row.get("copyright_license")),
            attribution=given(row.get("attribution")),
            modality=row["image_type"].lower().split(":")[0],
            # MILK10k's own scale of six, which is not Fitzpatrick's.
            more={"skin_tone_class": tone} if tone else {},
        )


def hiba(folder: Path) -> Iterator[Found]:
    """A bundle of the ISIC Archive: its `metadata.csv`, whose columns changed over the years."""
    pictures = Pictures.under(folder)
    for row in table(folder, "metadata.csv", ("isic_id",)):
        if "benign_malignant" not in row and "diagnosis_1" not in row:
            raise DatasetError(
                f"{folder}/metadata.csv has neither column 'benign_malignant' nor 'diagnosis_1'"
            )
        older, newer = given(row.get("benign_malignant")), given(row.get("diagnosis_1"))
        yield Found(
            pictures.get(row["isic_id"]),
            row["isic_id"],
            (newer or older).lower(),
            term=given(row.get("diagnosis_3")) or given(row.get("diagnosis")),
            said=older.lower() if newer and older.lower() in ("benign", "malignant") else "",
            group=given(row.get("patient_id")) or given(row.get("lesion_id")),
            confirmed=confirmed(row.get("diagnosis_confirm_type")),
            age=age(row.get("age_approx")),
            sex=sex(row.get("sex")),
            site=site(row.get("anatom_site_general")),
            skin_type=skin(row.get("fitzpatrick_skin_type")),
            licence=licence(row.get("copyright_license")),
            attribution=given(row.get("attribution")),
            modality=row.get("image_type", "").lower().split(":")[0],
        )
