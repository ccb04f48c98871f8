"""Freed blocks go back to the system, seen from outside."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Blocks under a ceiling of small ones that stay: what is freed below them cannot leave a heap.
FREED = """
import ctypes, sys
from export.heap import unmap_from
if sys.argv[1] == "mapped":
    print(unmap_from(2**20), end=" ")
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
def block(size):
    at = libc.malloc(ctypes.c_size_t(size))
    ctypes.memset(at, 1, size)
    return at
libc.free(block(30 * 2**20))     # raises glibc's own threshold to 30 MB
large = []
for _ in range(20):
    large.append(block(16 * 2**20))
    block(2**10)                 # stays
for at in large:
    libc.free(at)
status = open("/proc/self/status").read()
print(int(status.split("VmRSS:")[1].split()[0]) * 1024)
"""


def resident(how: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", FREED, how], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is Linux'")
def test_freed_blocks_are_not_kept() -> None:
    (kept,) = resident("as it is")
    did, mapped = resident("mapped")
    assert did == "True"
    assert int(kept) - int(mapped) > 200 * 2**20
