"""What a batch job is told: one field an option, its comment the help."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Final

from dermaflux.command import option

LOCAL: Final = "local"


@dataclass(frozen=True)
class Settings:
    """The settings of `python -m serving.batch`."""

    out: Path = option("the dataset's folder; a job there goes on", MISSING, position=False)
    requests: Path | None = option("a JSON object a line, one a picture", None, position=True)
    plan: Path | None = option("instead of requests: a YAML plan of counts", None)
    bundle: Path = option("the bundle's folder", Path("bundles/mini"))
    seed: int = option("of the whole job: each picture's own comes of it and its id", 0)
    attempts: int = option("seeds that are tried until one passes the gate", 1)
    gate: str = option("a YAML file of thresholds; `default`; or `off`", "default")
    seen: Path | None = option(
        "an index of pictures that the generator saw (python -m training.data index): what is "
        "near one of them is rejected",
        None,
    )
    shard: str | None = option(
        "a share of the job: 2/3, `slurm`, `kubernetes`; array jobs are noticed by themselves", None
    )
    ray: str | None = option(
        "draw on a Ray cluster: its address, or `local` for one here", None, alone=LOCAL
    )
    workers: int = option("with --ray: engines in the cluster, one an actor", 2)
    policy: str = option(
        "private, research, commercial, or a YAML file: what the bundle's licences have to allow",
        "research",
    )
    marks: Path | None = option(
        "sign every picture with the keys of this folder, and register its pixels there, as the "
        "service does; default: DERMAFLUX_MARKS",
        None,
    )
    engine: str | None = option("run this one; default: the fastest", None)
    precision: str | None = option("run this one; default: the fastest", None)
    tier: str | None = option(
        "what may be given up for speed: lossless, fp8, int8, or cached, which forecasts steps",
        None,
    )
    threads: int | None = option("of an engine; default: all cores", None)
    batch: int | None = option("pictures denoised together; default: what the bundle allows", None)
    webdataset: int | None = option("also write tar files of so many pictures", None)
    parquet: bool = option("also write dataset.parquet, a row a picture", False)
    embed: bool = option("with --parquet: the pictures too", False)
    verify: bool = option("compare the sha256 of pictures that are there already", False)
    dry_run: bool = option("draw one batch, write nothing; tell time, memory and disk", False)
