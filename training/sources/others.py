"""Adapters for collections outside the ISIC's challenges, each as its publisher packs it.

Identifiers of patients get the collection's name before them, for `PAT_46` may be anybody.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from dermaflux.errors import DatasetError
from training.sources.found import (
    SUFFIXES,
    Found,
    Pictures,
    age,
    given,
    locate,
    sex,
    site,
    skin,
    table,
)

_SKIN_DDI: Final = {"12": "I-II", "34": "III-IV", "56": "V-VI"}


def mednode(folder: Path) -> Iterator[Found]:
    """`complete_mednode_dataset/melanoma/*.jpg` and `naevus/*.jpg`; no table."""
    yield from _folders(folder, {"melanoma": "melanoma", "naevus": "naevus"}, ("",), "clinical")


def kaggle1(folder: Path) -> Iterator[Found]:
    """`melanoma_cancer_dataset/{train,test}/{benign,malignant}/*.jpg`; no table."""
    kinds = {"benign": "benign", "malignant": "malignant"}
    yield from _folders(folder, kinds, ("train", "test"), "dermoscopic")


def kaggle2(folder: Path) -> Iterator[Found]:
    """`{train,test}/{Benign,Malignant}/*.jpg`; no table."""
    yield from kaggle1(folder)


def derm12345(folder: Path) -> Iterator[Found]:
    """`derm12345_metadata_{train,test}` (`.csv`, or Dataverse's `.tab`), pictures in any folder."""
    pictures = Pictures.under(folder)
    some = False
    for split in ("train", "test"):
        names = tuple(f"derm12345_metadata_{split}.{suffix}" for suffix in ("csv", "tab"))
        if locate(folder, *names) is None:
            continue
        some = True
        for row in table(folder, names, ("image_id", "label")):
            said, patient = given(row.get("malignancy")).lower(), given(row.get("patient_id"))
            yield Found(
                pictures.get(row["image_id"]),
                row["image_id"],
                row["label"].lower(),
                said=said if said in ("benign", "malignant") else "",
                group=f"DERM12345 {patient}" if patient else "",
                split=split,
                modality="dermoscopic",
                more={"sub_class": row["sub_class"]} if row.get("sub_class") else {},
            )
    if not some:
        raise DatasetError(f"{folder} has no derm12345_metadata_train.csv (or .tab), nor test's")


def pad_ufes_20(folder: Path) -> Iterator[Found]:
    """`metadata.csv`, pictures in `images/imgs_part_1` to `3`."""
    pictures = Pictures.under(folder)
    for row in table(folder, "metadata.csv", ("img_id", "diagnostic", "patient_id", "lesion_id")):
        patient = given(row["patient_id"])
        yield Found(
            pictures.get(row["img_id"]),
            row["img_id"].rsplit(".", 1)[0],
            row["diagnostic"].lower(),
            group=f"PAD-UFES-20 {patient}" if patient else "",
            confirmed="histo" if row.get("biopsed", "").lower() == "true" else "",
            age=age(row.get("age")),
            sex=sex(row.get("gender")),
            site=site(row.get("region")),
            skin_type=skin(row.get("fitspatrick")),
            modality="clinical",
            more={"lesion": given(row["lesion_id"])},
        )


def ddi(folder: Path) -> Iterator[Found]:
    """`ddi_metadata.csv` and numbered pictures. All diagnoses are histological (its paper)."""
    pictures = Pictures.under(folder)
    columns = ("DDI_file", "skin_tone", "malignant", "disease")
    for row in table(folder, "ddi_metadata.csv", columns):
        yield Found(
            pictures.get(row["DDI_file"]),
            "ddi_" + row["DDI_file"].rsplit(".", 1)[0],
            row["malignant"].lower(),
            term=row["disease"],
            confirmed="histo",
            skin_type=_SKIN_DDI.get(row["skin_tone"].removesuffix(".0")),
            modality="clinical",
            more={"disease": row["disease"]},
        )


def ham10000(folder: Path) -> Iterator[Found]:
    """`HAM10000_metadata` (`.csv`, `.tab` or no suffix), images in two parts; masks if there."""
    pictures = Pictures.under(folder)
    names = tuple(f"HAM10000_metadata{suffix}" for suffix in (".csv", "", ".tab", ".txt"))
    for row in table(folder, names, ("lesion_id", "image_id", "dx", "dx_type")):
        yield Found(
            pictures.get(row["image_id"]),
            row["image_id"],
            row["dx"].lower(),
            group=row["lesion_id"],
            confirmed=given(row["dx_type"]).lower(),
            age=age(row.get("age")),
            sex=sex(row.get("sex")),
            site=site(row.get("localization")),
            mask=pictures.get(f"{row['image_id']}_segmentation"),
            modality="dermoscopic",
        )


def _folders(
    folder: Path, kinds: dict[str, str], splits: tuple[str, ...], modality: str
) -> Iterator[Found]:
    """Pictures whose class, and split where `splits` are named, are their folders' names."""
    found = False
    for file in sorted(Pictures.under(folder).all()):
        parts = [part.lower() for part in file.relative_to(folder).parts[:-1]]
        kind = next((kinds[part] for part in reversed(parts) if part in kinds), None)
        split = next((name for name in splits if name and name in parts), None)
        if kind is None or (split is None and splits != ("",)):
            continue
        found = True
        # Train and test number their pictures alike, and so do the classes.
        name = "_".join(part for part in (split, kind, file.stem) if part)
        yield Found(file, name, kind, split=split or "train", modality=modality)
    if not found:
        places = [f"{split}/{kind}".strip("/") for split in splits for kind in kinds]
        raise DatasetError(
            f"{folder} has no pictures ({', '.join(SUFFIXES)}) in folders {', '.join(places)}"
        )
