"""Limits of containers, in folders that look like the system's."""

import pytest

from anybit.engine import machine
from anybit.engine.control_groups import ControlGroups


@pytest.fixture
def make_groups(tmp_path):
    """Files below a mount point by path, and what /proc/self/cgroup says."""

    def make(membership: str, files: dict[str, str]) -> ControlGroups:
        mount = tmp_path / "cgroup"
        mount.mkdir()
        for name, content in files.items():
            path = mount / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content + "\n")
        (tmp_path / "membership").write_text(membership + "\n")
        return ControlGroups(mount, tmp_path / "membership")

    return make


def test_a_container_of_version_2_sees_its_group_as_the_root(make_groups):
    files = {
        "cpu.max": "150000 100000",
        "memory.max": "1000000",
        "memory.current": "700000",
        "memory.stat": "anon 400000\ninactive_file 250000",
    }
    groups = make_groups("0::/", files)
    assert groups.cpus() == 1.5
    assert groups.memory_left() == 550_000


def test_the_tightest_of_the_groups_around_a_process_counts(make_groups):
    files = {
        "cpu.max": "max 100000",
        "service/cpu.max": "200000 100000",
        "service/job/cpu.max": "400000 100000",
        "memory.stat": "inactive_file 0",
        "service/memory.max": "500",
        "service/memory.current": "100",
        "service/job/memory.max": "max",
        "service/job/memory.current": "50",
    }
    groups = make_groups("0::/service/job", files)
    assert groups.cpus() == 2.0
    assert groups.memory_left() == 400


def test_version_1_has_a_tree_for_each_controller(make_groups):
    membership = "9:name=systemd:/\n4:memory:/docker/0123\n2:cpuacct,cpu:/docker/0123\n0::/"
    files = {  # the container's own group is mounted as the root, whatever the machine calls it
        "cpu/cpu.cfs_quota_us": "50000",
        "cpu/cpu.cfs_period_us": "100000",
        "memory/memory.limit_in_bytes": "3000",
        "memory/memory.usage_in_bytes": "2500",
        "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 600",
    }
    groups = make_groups(membership, files)
    assert groups.cpus() == 0.5
    assert groups.memory_left() == 1100


@pytest.mark.parametrize(
    ("membership", "files"),
    [
        ("", {}),
        ("0::/../elsewhere", {"memory.current": "5"}),
        ("0::/", {"cpu.max": "max 100000", "memory.max": "max", "memory.current": "5"}),
        (
            "4:memory:/\n1:cpu:/",
            {
                "cpu/cpu.cfs_quota_us": "-1",
                "cpu/cpu.cfs_period_us": "100000",
                "memory/memory.limit_in_bytes": str(0x7FFFFFFFFFFFF000),
                "memory/memory.usage_in_bytes": "5",
            },
        ),
    ],
)
def test_without_limits_there_are_none(make_groups, membership, files):
    groups = make_groups(membership, files)
    assert groups.cpus() is None
    assert groups.memory_left() is None


def test_a_group_that_is_over_its_limit_has_nothing_left(make_groups):
    files = {"memory.max": "1000", "memory.current": "1500"}
    assert make_groups("0::/", files).memory_left() == 0


def test_threads_and_memory_keep_to_the_limits(make_groups, monkeypatch):
    files = {"cpu.max": "50000 100000", "memory.max": "100000", "memory.current": "40000"}
    groups = make_groups("0::/", files)
    monkeypatch.setattr(machine, "_control_groups", lambda: groups)
    assert machine.physical_cores() == 1
    assert machine.free_bytes(machine.resolve_device("cpu")) == 60_000
