"""The number of CPUs follows the affinity and the quota of control groups."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scissor_vllm import cpus
from scissor_vllm.byte_locks import ByteLocks, OpenByteLocks
from scissor_vllm.cpus import cgroup_cpu_quota, num_cpus, num_own_cpus, share_cpus, take_cpus


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V1 = "sys/fs/cgroup/cpu,cpuacct"


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}, 2.5),
        (
            {
                "proc/self/cgroup": "0::/pods/one\n",
                "sys/fs/cgroup/pods/one/cpu.max": "max 100000\n",
                "sys/fs/cgroup/pods/cpu.max": "300000 100000\n",
            },
            3.0,
        ),
        # The path is the host's, the mount is the container's.
        (
            {"proc/self/cgroup": "0::/../x\n", "sys/fs/cgroup/cpu.max": "100000 100000\n"},
            1.0,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/a\n3:cpu,cpuacct:/docker/ab\n0::/\n",
                f"{V1}/docker/ab/cpu.cfs_quota_us": "150000\n",
                f"{V1}/docker/ab/cpu.cfs_period_us": "50000\n",
            },
            3.0,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/docker/ab\n",
                f"{V1}/cpu.cfs_quota_us": "50000\n",
                f"{V1}/cpu.cfs_period_us": "100000\n",
            },
            0.5,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
        ({"proc/self/cgroup": "garbage\n", "sys/fs/cgroup/cpu.max": "x\n"}, None),
    ],
)
def test_the_lowest_quota_of_a_group_and_its_parents_counts(
    files: dict[str, str], quota: float | None, tmp_path: Path
) -> None:
    assert cgroup_cpu_quota(write(tmp_path, files)) == quota


@pytest.mark.parametrize(
    ("quota", "expected"), [(None, 8), (0.2, 1), (2.0, 2), (2.5, 3), (100.0, 8)]
)
def test_no_more_cpus_than_the_quota_and_at_least_one(
    quota: float | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(cpus, "cgroup_cpu_quota", lambda: quota)
    assert num_cpus.__wrapped__() == expected


def test_a_video_has_a_thread_for_two_cpus_and_at_most_eight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for available, expected in ((1, 1), (2, 1), (4, 2), (8, 4), (16, 8), (64, 8)):
        monkeypatch.setattr(cpus, "num_cpus", lambda available=available: available)
        assert cpus.threads_per_video() == expected


def test_processes_share_the_cpus_and_each_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpus, "num_cpus", lambda: 16)
    monkeypatch.setattr(cpus, "_num_sharing", 1)
    assert num_own_cpus() == 16
    for num_processes, expected in ((4, 4), (6, 2), (40, 1), (1, 16), (0, 16)):
        share_cpus(num_processes)
        assert num_own_cpus() == expected


# ---- CPUs of one video ----

OTHER_PROCESS = """
import sys, time
from pathlib import Path
from scissor_vllm import cpus
from scissor_vllm.byte_locks import ByteLocks, OpenByteLocks
cpus._TAKEN = ByteLocks(Path(sys.argv[1]), "")
cpus.num_cpus = lambda: 8
with cpus.take_cpus(3) as num_taken:
    print(num_taken, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def eight_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cpus.lock"
    monkeypatch.setattr(cpus, "_TAKEN", ByteLocks(path, ""))
    monkeypatch.setattr(cpus, "num_cpus", lambda: 8)
    return path


@pytest.mark.usefixtures("eight_cpus")
def test_videos_take_the_cpus_that_others_left_and_at_least_one() -> None:
    with take_cpus(5) as first, take_cpus(5) as second, take_cpus(5) as third:
        assert (first, second, third) == (5, 3, 1)
    with take_cpus(20) as all_of_them:
        assert all_of_them == 8


@pytest.mark.usefixtures("eight_cpus")
def test_spared_cpus_are_left_to_others() -> None:
    with take_cpus(8, spared=2) as first, take_cpus(8, spared=2) as second:
        assert (first, second) == (6, 1)
        with take_cpus(4) as other:
            assert other == 2


def test_a_process_that_dies_gives_its_cpus_back(eight_cpus: Path) -> None:
    command = [sys.executable, "-c", OTHER_PROCESS, str(eight_cpus)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "3\n"
        with take_cpus(8) as left:
            assert left == 5
        other.kill()
    with take_cpus(8) as left:
        assert left == 8


@pytest.mark.usefixtures("eight_cpus")
def test_on_a_file_system_without_locks_a_video_has_one_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(self: OpenByteLocks, number: int) -> bool:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(OpenByteLocks, "try_lock", fail)
    with take_cpus(4) as num_taken:
        assert num_taken == 1


def test_without_a_place_for_the_file_a_process_has_its_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpus, "_TAKEN", ByteLocks(tmp_path / "missing" / "cpus.lock", "none"))
    monkeypatch.setattr(cpus, "num_cpus", lambda: 16)
    monkeypatch.setattr(cpus, "_num_sharing", 4)
    for wanted, expected in ((8, 4), (2, 2), (0, 1)):
        with take_cpus(wanted) as num_taken:
            assert num_taken == expected
    assert len([line for line in caplog.messages if "none: " in line]) == 1
