"""The list of software of unknown provenance, as IEC 62304 asks for (5.3.3, 7.1.2, 7.1.3, 8.1.2).

Libraries that DermaFlux calls itself come with what it needs of them and how their failure shows
(`reviewed.toml`); the others with who needs them. A list is no assessment: whoever puts DermaFlux
into a device does that.

    >>> text = soup(shipped(Path(".")), "0.1.0")
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from serving.inventory.packages import InventoryError, Package, read_reviewed

_HEAD = """# Software of unknown provenance

Made by `python -m serving.inventory` from `constraints.txt` and the installed packages, for
DermaFlux {version}: {count} packages that run with the service and `serving.batch` on a CPU.
Python itself (3.11 or 3.12) and the system's C library come beside them. Known anomalies are where
the last column leads; they have been assessed for no device.

"""


def soup(packages: Sequence[Package], version: str) -> str:
    """The list as Markdown.

    Raises:
        InventoryError: a library that DermaFlux asks for has no purpose in `reviewed.toml`.
    """
    uses = read_reviewed()["uses"]
    direct = [one for one in packages if one.asked]
    missing = [one.name for one in direct if one.name not in uses]
    if missing:
        raise InventoryError(
            f"reviewed.toml does not say what {', '.join(missing)} is for; add "
            f"[uses.{missing[0]}] with purpose and failure"
        )
    lines = ["## Asked for by DermaFlux", ""]
    lines += _table("library|version|maker|licence|what for|if it fails|known anomalies", (
        [_home(one), one.version, one.maker, one.licence, uses[one.name]["purpose"],
         uses[one.name]["failure"], _link(one.issues)]
        for one in direct
    ))  # fmt: skip
    lines += ["", "## Asked for by those", ""]
    by = {one.name: [o.name for o in packages if one.name in o.needs] for one in packages}
    lines += _table("library|version|maker|licence|needed by|known anomalies", (
        [_home(one), one.version, one.maker, one.licence, ", ".join(by[one.name]),
         _link(one.issues)]
        for one in packages if not one.asked
    ))  # fmt: skip
    return _HEAD.format(version=version, count=len(packages)) + "\n".join(lines) + "\n"


def _table(head: str, rows: Iterable[list[str]]) -> list[str]:
    names = head.split("|")
    lines = [names, ["---"] * len(names), *rows]
    return [f"| {' | '.join(cell.replace('|', '/') or '-' for cell in row)} |" for row in lines]


def _home(one: Package) -> str:
    return f"[{one.name}]({one.home})" if one.home else one.name


def _link(url: str) -> str:
    return f"[issues]({url})" if url else ""
