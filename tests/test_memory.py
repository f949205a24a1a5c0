"""Memory of videos is kept for the next ones, and what they do not reuse goes back."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from scissor_vllm import plugin
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


# Buffers of videos with small blocks between them, all in one heap, of which the buffers are freed.
BUFFERS, BUFFER_MIB, MIB = 100, 4, 1 << 20
SPLIT = f"""
import ctypes

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = (ctypes.c_size_t,)
libc.free.argtypes = (ctypes.c_void_p,)

def touched(num_bytes):
    block = libc.malloc(num_bytes)
    ctypes.memset(block, 1, num_bytes)
    return block

def resident_mib():
    _, resident, shared, *_ = map(int, open("/proc/self/statm").read().split())
    return (resident - shared) * {PAGE} // {MIB}

def split_heap(num_buffers={BUFFERS}):
    buffers = [(touched({BUFFER_MIB * MIB}), touched(100_000))[0] for _ in range(num_buffers)]
    for buffer in buffers:
        libc.free(buffer)

"""
# Threads of this process, of a fork, and of both after a second call.
THREADS = """
import os, threading
from scissor_vllm import allocator

allocator._CHECK_SECONDS = 3600

def print_number():
    names = [thread.name for thread in threading.enumerate()]
    print(names.count("scissor-vllm-memory"), flush=True)

def print_numbers():
    print_number()
    if os.fork() == 0:
        print_number()
        allocator.return_free_memory()
        print_number()
        os._exit(0)
    os.wait()

"""


def run(code: str, **environment: str) -> list[int]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [int(number) for number in done.stdout.split()]


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


@pytest.mark.skipif(not is_glibc(), reason="settings of glibc")
def test_free_memory_between_small_blocks_is_returned_once_it_is_too_much() -> None:
    half = BUFFERS * BUFFER_MIB * MIB // 2
    code = f"""
free = FreeMemory()
free.return_excess(0)
print(resident_mib())
split_heap()
print(resident_mib())
print(int(free.return_excess({4 * half})), resident_mib())
print(int(free.return_excess({half})), resident_mib())
print(int(free.return_excess({half})))
"""
    importing = "from scissor_vllm.allocator import FreeMemory\n"
    at_first, split, keeps, kept, returns, left, keeps_again = run(KEEP + SPLIT + importing + code)
    # glibc itself returns nothing, because the last block is in use.
    assert split - at_first > 0.9 * BUFFERS * BUFFER_MIB
    assert not keeps
    assert kept == split
    assert returns
    assert left - at_first < 0.1 * BUFFERS * BUFFER_MIB
    assert not keeps_again


@pytest.mark.skipif(not is_glibc(), reason="settings of glibc")
@pytest.mark.parametrize(
    ("num_buffers", "checks_until_all", "is_returned"),
    [(BUFFERS, 1 << 30, True), (BUFFERS // 5, 3, True), (BUFFERS // 5, 1 << 30, False)],
    ids=["much-at-once", "little-in-time", "little-not-before"],
)
def test_a_thread_returns_it(num_buffers: int, checks_until_all: int, is_returned: bool) -> None:
    code = f"""
import time
from scissor_vllm import allocator

allocator._CHECK_SECONDS = 0.1
allocator._CHECKS_UNTIL_ALL = {checks_until_all}
allocator.return_free_memory()
time.sleep(0.5)
before = resident_mib()
split_heap({num_buffers})
deadline = time.monotonic() + {20 if is_returned else 1}
limit = before + {num_buffers * BUFFER_MIB // 10}
while resident_mib() > limit and time.monotonic() < deadline:
    time.sleep(0.05)
print(resident_mib() - before)
"""
    (left,) = run(KEEP + SPLIT + code)
    size = num_buffers * BUFFER_MIB
    assert left <= 0.1 * size if is_returned else left > 0.9 * size


@pytest.mark.skipif(not is_glibc(), reason="settings of glibc")
def test_every_process_has_one_such_thread() -> None:
    start = "allocator.return_free_memory()\n" * 2 + "print_numbers()"
    assert run(f"{KEEP}\n{THREADS}{start}") == [1, 1, 1]
    # With other settings free memory is the operator's matter.
    assert run(THREADS + start) == [0, 0, 0]
    assert run(f"{KEEP}\n{THREADS}{start}", MALLOC_ARENA_MAX="4") == [0, 0, 0]


def test_vllm_starts_it_with_the_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[None] = []
    monkeypatch.setattr(plugin, "return_free_memory", lambda: started.append(None))
    plugin.register()
    assert started


def test_an_operators_own_settings_stay() -> None:
    environment = {"MALLOC_ARENA_MAX": "4", "THP_MEM_ALLOC_ENABLE": "0"}
    keep_touched_memory(environment)
    assert environment == {"MALLOC_ARENA_MAX": "4", "THP_MEM_ALLOC_ENABLE": "0"}
    environment = {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"}
    keep_touched_memory(environment)
    assert environment.keys() == {"GLIBC_TUNABLES", "THP_MEM_ALLOC_ENABLE"}
