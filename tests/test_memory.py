"""Memory that a video lay in is kept for the next, by a server's process and those it starts."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from scissor_vllm.allocator import keep_touched_memory

NUM_BLOCKS, NUM_BYTES, PAGE = 20, 40 << 20, 4096
PR_SET_THP_DISABLE = 41

# Faults of touching, again and again, as much memory as a video of Qwen-VL takes; in small pages
# whatever the machine's default is.
TOUCH = f"""
import ctypes, resource

ctypes.CDLL(None).prctl({PR_SET_THP_DISABLE}, 1, 0, 0, 0)

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

b"x" * {NUM_BYTES}
before = faults()
for _ in range({NUM_BLOCKS}):
    b"x" * {NUM_BYTES}
print(faults() - before)
"""
KEEP = "from scissor_vllm.allocator import keep_touched_memory; keep_touched_memory()"


def run(code: str, **environment: str) -> list[int]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [int(line) for line in done.stdout.split()]


def is_glibc() -> bool:
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") is not None
    except (AttributeError, ValueError):
        return False


@pytest.mark.skipif(not is_glibc(), reason="settings of glibc")
def test_a_process_touches_a_videos_memory_once() -> None:
    (before,) = run(TOUCH)
    (after,) = run(KEEP + TOUCH)
    assert before > NUM_BLOCKS * NUM_BYTES // PAGE // 2
    assert after < before / 10


@pytest.mark.skipif(not is_glibc(), reason="settings of glibc")
def test_so_do_the_processes_that_it_starts() -> None:
    start = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {TOUCH!r}])"
    (before,) = run(start)
    (after,) = run(f"{KEEP}\n{start}")
    assert after < before / 10


def test_an_operators_own_settings_stay() -> None:
    environment = {"MALLOC_ARENA_MAX": "4", "THP_MEM_ALLOC_ENABLE": "0"}
    keep_touched_memory(environment)
    assert environment == {"MALLOC_ARENA_MAX": "4", "THP_MEM_ALLOC_ENABLE": "0"}
    environment = {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"}
    keep_touched_memory(environment)
    assert environment.keys() == {"GLIBC_TUNABLES", "THP_MEM_ALLOC_ENABLE"}
