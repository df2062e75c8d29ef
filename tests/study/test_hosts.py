"""Speedup inside one host and between hosts."""

from cifar_exp.study.finished_runs import grouped
from cifar_exp.study.hosts import HEADINGS, hosts_sections
from cifar_exp.study.run_result import RunResult

LINKS = {
    "communication/bytes_per_step": 2e6,
    "communication/inside_a_host/bytes_per_second": 4e9,
    "communication/inside_a_host/seconds_per_step": 0.0005,
    "communication/between_hosts/bytes_per_second": 1e9,
    "communication/between_hosts/seconds_per_step": 0.002,
}


def test_groups_are_named_by_their_hosts() -> None:
    jobs = [[f"launcher.hosts={hosts}", f"train.scaling={kind}"] for hosts in ("1", "2") for kind in ("weak", "strong")]
    assert grouped(jobs) == ["1 host weak", "1 host strong", "2 hosts weak", "2 hosts strong"]


def runs(devices: int, *rates: float) -> list[RunResult]:
    return [RunResult(devices, 256 * devices, rate, 100.0, 0.9, times=LINKS) for rate in rates]


def test_each_number_of_hosts_and_devices_is_relative_to_the_smallest_on_one_host() -> None:
    one, two = [*runs(1, 100, 102), *runs(2, 190, 194)], [*runs(2, 180, 184), *runs(4, 350, 352)]
    (section,) = hosts_sections({"2 hosts": two, "1 host": one})
    title, (headings, *rows), notes = section
    assert title == "Inside one host and between hosts"
    assert headings == HEADINGS
    assert [row[:4] for row in rows] == [
        ["1", "1", "101", "1.00"],
        ["1", "2", "192", "1.90"],
        ["2", "2", "182", "1.80"],
        ["2", "4", "351", "3.48"],
    ]
    assert rows[0][4] == ""
    low, high = map(float, rows[3][4].split(" to "))
    assert low < 3.48 < high
    assert notes == [
        "inside a host: a rank sends 2 MB per step; the link carries 4 GB/s, so that takes 0.5 ms "
        "(4 devices on 2 hosts)",
        "between hosts: a rank sends 2 MB per step; the link carries 1 GB/s, so that takes 2 ms (4 devices on 2 hosts)",
    ]


def test_other_settings_make_tables_of_their_own_and_equal_hosts_none() -> None:
    names = [f"{scaling} {hosts}" for scaling in ("weak", "strong") for hosts in ("1 host", "2 hosts")]
    titles = [title for title, *_ in hosts_sections({name: runs(2, 100) for name in names})]
    assert titles == [f"Inside one host and between hosts: {kind}" for kind in ("weak", "strong")]
    assert hosts_sections({"2 hosts": runs(2, 100), "": runs(1, 50)}) == []
