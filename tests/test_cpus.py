"""The number of CPUs follows the affinity and the quota of control groups."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from scissor_vllm import cpus
from scissor_vllm.cpus import cgroup_cpu_quota, num_cpus, num_own_cpus, share_cpus


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
    assert num_cpus() == expected


def test_a_video_has_a_thread_for_four_cpus_and_at_most_four(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for available, expected in ((1, 1), (4, 1), (8, 2), (16, 4), (64, 4)):
        monkeypatch.setattr(cpus, "num_cpus", lambda available=available: available)
        assert cpus.threads_per_video.__wrapped__() == expected


def test_processes_share_the_cpus_and_each_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpus, "num_cpus", lambda: 16)
    monkeypatch.setattr(cpus, "_num_sharing", 1)
    assert num_own_cpus() == 16
    for num_processes, expected in ((4, 4), (6, 2), (40, 1), (1, 16), (0, 16)):
        share_cpus(num_processes)
        assert num_own_cpus() == expected
