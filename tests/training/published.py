"""Small folders packed as the publishers of the collections pack theirs, with their columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

ISIC_2024: Final = (
    "isic_id,target,patient_id,age_approx,sex,anatom_site_general,clin_size_long_diam_mm,"
    "image_type,tbp_tile_type,tbp_lv_A,attribution,copyright_license,lesion_id,iddx_full,iddx_1,"
    "iddx_2,iddx_3,iddx_4,iddx_5,mel_mitotic_index,mel_thick_mm,tbp_lv_dnn_lesion_confidence"
)
PAD: Final = (
    "patient_id,lesion_id,smoke,drink,background_father,background_mother,age,pesticide,gender,"
    "skin_cancer_history,cancer_history,has_piped_water,has_sewage_system,fitspatrick,region,"
    "diameter_1,diameter_2,diagnostic,itch,grew,hurt,changed,bleed,elevation,img_id,biopsed"
)
MILK: Final = (
    "lesion_id,image_type,isic_id,attribution,copyright_license,image_manipulation,age_approx,sex,"
    "skin_tone_class,site,MONET_ulceration_crust,MONET_hair"
)
HIBA: Final = (
    "isic_id,attribution,copyright_license,age_approx,anatom_site_general,concomitant_biopsy,"
    "dermoscopic_type,diagnosis_1,diagnosis_2,diagnosis_3,diagnosis_confirm_type,family_hx_mm,"
    "fitzpatrick_skin_type,image_type,lesion_id,patient_id,personal_hx_mm,sex"
)
HIBA_2022: Final = (
    "isic_id,attribution,copyright_license,age_approx,anatom_site_general,benign_malignant,"
    "diagnosis,diagnosis_confirm_type,fitzpatrick_skin_type,image_type,lesion_id,patient_id,sex"
)


def picture(file: Path, side: int = 24) -> None:
    """A picture of its own, as its name says."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(list(file.name.encode()))
    pixels = rng.integers(0, 255, (side, side + 8, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(file)


def pictures(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        picture(folder / name)


def text(file: Path, *lines: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def mednode(folder: Path) -> None:
    inside = folder / "complete_mednode_dataset"
    pictures(inside, ["melanoma/241395.jpg", "naevus/241395.jpg", "naevus/1412510.jpg"])


def hiba(folder: Path) -> None:
    pictures(folder, [f"ISIC_000000{n}.jpg" for n in range(1, 5)])
    text(
        folder / "metadata.csv",
        HIBA,
        "ISIC_0000001,Hospital Italiano de Buenos Aires,CC-BY,60,head/neck,True,,Malignant,"
        "Malignant adnexal epithelial proliferations - Follicular,Basal cell carcinoma,"
        "histopathology,False,II,clinical: close-up,IL_1,IP_7,False,male",
        "ISIC_0000002,Hospital Italiano de Buenos Aires,CC-BY,60,head/neck,True,,Indeterminate,"
        "Indeterminate epidermal proliferations,Solar or actinic keratosis,histopathology,False,"
        "II,dermoscopic,IL_2,IP_7,False,male",
        'ISIC_0000003,Hospital Italiano de Buenos Aires,CC-BY,,,,,Benign,,"Nevus, NOS, Junctional",'
        "single image expert consensus,,NA,dermoscopic,IL_3,IP_8,,female",
        "ISIC_0000004,Hospital Italiano de Buenos Aires,CC-BY,,,,,Malignant,,Nevus,,,,"
        "dermoscopic,IL_4,,,female",
    )


def hiba_2022(folder: Path) -> None:
    pictures(folder, ["ISIC_0000001.jpg"])
    text(
        folder / "metadata.csv",
        HIBA_2022,
        "ISIC_0000001,Hospital Italiano de Buenos Aires,CC-BY,60,head/neck,malignant,melanoma,"
        "histopathology,II,dermoscopic,IL_1,IP_7,male",
    )


def derm12345(folder: Path) -> None:
    pictures(folder / "derm12345_train_part_1", ["bcc/D_001.jpg", "ak/D_002.jpg"])
    pictures(folder / "derm12345_test", ["jd/D_003.jpg", "ch/D_004.jpg"])
    columns = "image_id,patient_id,super_class,malignancy,main_class_1,main_class_2,sub_class,label"
    text(
        folder / "derm12345_metadata_train.csv",
        columns,
        "D_001,P_1,nonmelanocytic,malignant,keratinocytic,keratinocytic,basal_cell_carcinoma,bcc",
        "D_002,P_1,nonmelanocytic,indeterminate,keratinocytic,keratinocytic,actinic_keratosis,ak",
    )
    # Dataverse gives tables back with tabs and quotes.
    text(
        folder / "derm12345_metadata_test.tab",
        columns.replace(",", "\t"),
        '"D_003"\t"P_2"\t"melanocytic"\t"benign"\t"dysplastic"\t"junctional"\t"junctional"\t"jd"',
        '"D_004"\t"P_3"\t"nonmelanocytic"\t"benign"\t"x"\t"x"\t"cutaneous_horn"\t"ch"',
    )


def isic2017(folder: Path) -> None:
    for part, number in (("Training", 1), ("Validation", 2), ("Test_v2", 3)):
        names = [f"ISIC_00000{number}{n}" for n in (0, 1, 2)]
        data = folder / f"ISIC-2017_{part}_Data"
        pictures(data, [f"{name}.jpg" for name in names])
        pictures(data, [f"{name}_superpixels.png" for name in names])
        masks = folder / f"ISIC-2017_{part}_Part1_GroundTruth"
        pictures(masks, [f"{name}_segmentation.png" for name in names[:2]])
        text(
            data / f"ISIC-2017_{part}_Data_metadata.csv",
            "image_id,age_approximate,sex",
            f"{names[0]},55,female",
            f"{names[1]},unknown,unknown",
            f"{names[2]},85+,male",
        )
        text(
            folder / f"ISIC-2017_{part}_Part3_GroundTruth.csv",
            "image_id,melanoma,seborrheic_keratosis",
            f"{names[0]},1.0,0.0",
            f"{names[1]},0.0,1.0",
            f"{names[2]},0.0,0.0",
        )


def isic2019(folder: Path) -> None:
    names = ["ISIC_0000001", "ISIC_0000002_downsampled", "ISIC_0000003", "ISIC_0000004"]
    pictures(folder / "ISIC_2019_Training_Input", [f"{name}.jpg" for name in names])
    text(
        folder / "ISIC_2019_Training_GroundTruth.csv",
        "image,MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK",
        f"{names[0]},0.0,1.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0",
        f"{names[1]},1.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0",
        f"{names[2]},0.0,0.0,0.0,1.0,0.0,0.0,0.0,0.0,0.0",
        f"{names[3]},0.0,0.0,0.0,0.0,1.0,0.0,0.0,0.0,0.0",
    )
    text(
        folder / "ISIC_2019_Training_Metadata.csv",
        "image,age_approx,anatom_site_general,lesion_id,sex",
        f"{names[0]},55.0,anterior torso,,female",
        f"{names[1]},30.0,anterior torso,MSK4_0011169,female",
        f"{names[2]},,upper extremity,BCN_0001728,",
        f"{names[3]},85.0,head/neck,HAM_0000118,male",
    )


def isic2020(folder: Path) -> None:
    pictures(folder / "train", [f"ISIC_000000{n}.jpg" for n in range(1, 5)])
    text(
        folder / "ISIC_2020_Training_GroundTruth_v2.csv",
        "image_name,patient_id,lesion_id,sex,age_approx,anatom_site_general_challenge,diagnosis,"
        "benign_malignant,target",
        "ISIC_0000001,IP_7279968,IL_1,male,45.0,head/neck,unknown,benign,0",
        "ISIC_0000002,IP_7279968,IL_2,male,45.0,torso,melanoma,malignant,1",
        "ISIC_0000003,IP_3075186,IL_3,female,,,nevus,benign,0",
        "ISIC_0000004,IP_3075186,IL_4,female,,,atypical melanocytic proliferation,benign,0",
    )


def isic2024(folder: Path) -> None:
    pictures(folder / "train-image" / "image", ["ISIC_0015670.jpg", "ISIC_0015845.jpg"])
    (folder / "train-image.hdf5").write_bytes(b"not read")
    text(
        folder / "train-metadata.csv",
        ISIC_2024,
        "ISIC_0015670,0,IP_1235828,60.0,male,lower extremity,3.04,TBP tile: close-up,3D: white,"
        "20.2,Memorial Sloan Kettering Cancer Center,CC-BY,,Benign,Benign,,,,,,,97.5",
        "ISIC_0015845,1,IP_8170065,60.0,male,head/neck,1.1,TBP tile: close-up,3D: white,31.7,"
        "Memorial Sloan Kettering Cancer Center,CC-BY-NC,IL_6727506,"
        "Malignant::Malignant melanocytic proliferations (Melanoma)::Melanoma in situ,Malignant,"
        "Malignant melanocytic proliferations (Melanoma),Melanoma in situ,,,,,3.1",
    )


def isic2024_archive(folder: Path) -> None:
    pictures(folder / "ISIC_2024_Training_Input", ["ISIC_0015670.jpg"])
    text(folder / "ISIC_2024_Training_GroundTruth.csv", "isic_id,malignant", "ISIC_0015670,1.0")
    text(
        folder / "ISIC_2024_Training_Input" / "metadata.csv",
        "isic_id,attribution,copyright_license,age_approx,patient_id,sex",
        "ISIC_0015670,Memorial Sloan Kettering Cancer Center,CC-0,60,IP_1235828,male",
    )


def milk10k(folder: Path) -> None:
    inside = folder / "MILK10k_Training_Input"
    pictures(inside, ["IL_1/ISIC_0000001.jpg", "IL_1/ISIC_0000002.jpg", "IL_2/ISIC_0000003.jpg"])
    text(
        folder / "MILK10k_Training_GroundTruth.csv",
        "lesion_id,AKIEC,BCC,BEN_OTH,BKL,DF,INF,MAL_OTH,MEL,NV,SCCKA,VASC",
        "IL_1,0.0,1.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0",
        "IL_2,0.0,0.0,0.0,0.0,0.0,1.0,0.0,0.0,0.0,0.0,0.0",
    )
    text(
        folder / "MILK10k_Training_Metadata.csv",
        MILK,
        "IL_1,clinical: close-up,ISIC_0000001,MILK study team,CC-BY-NC,,65,male,3,trunk,0.1,0.2",
        "IL_1,dermoscopic,ISIC_0000002,MILK study team,CC-BY-NC,,65,male,3,trunk,0.1,0.2",
        "IL_2,dermoscopic,ISIC_0000003,MILK study team,CC-BY-NC,,65,male,3,trunk,0.1,0.2",
    )
    text(
        folder / "MILK10k_Training_Supplement.csv",
        "isic_id,diagnosis_full,diagnosis_confirm_type,invasion_thickness_interval",
        "ISIC_0000001,Basal cell carcinoma,histopathology,",
        "ISIC_0000002,Basal cell carcinoma,histopathology,",
    )


def pad_ufes_20(folder: Path) -> None:
    pictures(folder / "images" / "imgs_part_1", ["PAT_46_881_939.png", "PAT_8_15_820.png"])
    text(
        folder / "metadata.csv",
        PAD,
        "PAT_46,881,False,False,POMERANIA,POMERANIA,55,False,FEMALE,True,True,True,True,3.0,NECK,"
        "6.0,5.0,BCC,True,True,False,True,True,True,PAT_46_881_939.png,True",
        "PAT_8,15,,,,,40,,,,,,,,FACE,,,ACK,True,False,False,False,False,UNK,PAT_8_15_820.png,False",
    )


def kaggle1(folder: Path) -> None:
    inside = folder / "melanoma_cancer_dataset"
    for split in ("train", "test"):
        pictures(inside / split, ["benign/melanoma_0.jpg", "malignant/melanoma_0.jpg"])


def kaggle2(folder: Path) -> None:
    for split in ("train", "test"):
        pictures(folder / split, ["Benign/6299.jpg", "Malignant/5.jpg"])


def ddi(folder: Path) -> None:
    pictures(folder, ["000001.png", "000002.png"])
    text(
        folder / "ddi_metadata.csv",
        ",DDI_ID,DDI_file,skin_tone,malignant,disease",
        "0,1,000001.png,56,True,melanoma-in-situ",
        "1,2,000002.png,12,False,verruca-vulgaris",
    )


def ham10000(folder: Path) -> None:
    pictures(folder / "HAM10000_images_part_1", ["ISIC_0027419.jpg", "ISIC_0025030.jpg"])
    pictures(folder / "HAM10000_images_part_2", ["ISIC_0031633.jpg"])
    masks = folder / "HAM10000_segmentations_lesion_tschandl"
    pictures(masks, ["ISIC_0027419_segmentation.png"])
    text(
        folder / "HAM10000_metadata",
        "lesion_id,image_id,dx,dx_type,age,sex,localization,dataset",
        "HAM_0000118,ISIC_0027419,bkl,histo,80.0,male,scalp,vidir_modern",
        "HAM_0000118,ISIC_0025030,bkl,histo,80.0,male,scalp,vidir_modern",
        "HAM_0001466,ISIC_0031633,mel,follow_up,,unknown,unknown,vienna_dias",
    )


def measured(folder: Path) -> None:
    pictures(folder, ["images/a.jpg", "masks/a.png"])
    text(
        folder / "metadata.csv",
        "image,mask,label,diagnosis,split,group,asymmetry_word,border_word,color_words,size_word,"
        "t2_globules,source,license,dx_type,age,sex",
        "images/a.jpg,masks/a.png,benign,melanocytic nevus,test,g,asymmetric,irregular border,"
        '"light brown, black",reaches the image edge,1.0,S,CC0-1.0,histo,45.0,unknown',
    )


PACKED: Final[dict[str, Callable[[Path], None]]] = {
    "mednode": mednode,
    "hiba": hiba,
    "derm12345": derm12345,
    "isic2017": isic2017,
    "isic2019": isic2019,
    "isic2020": isic2020,
    "milk10k": milk10k,
    "pad-ufes-20": pad_ufes_20,
    "kaggle1": kaggle1,
    "kaggle2": kaggle2,
    "ddi": ddi,
    "isic2024": isic2024,
    "ham10000": ham10000,
    "measured": measured,
}
