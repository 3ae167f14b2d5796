"""Runs that are killed, stopped, or lose their disk or loaders resume and lose nothing; a few of each.

`scripts/test.sh --full` tries hundreds.
"""

import errno
import shutil

import pytest

from tests.faults import disks, hooks, kills, loaders, sharing, stops
from tests.faults.campaign import Campaign
from tests.faults.runs import KINDS, differences, write_inputs


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    folder = tmp_path_factory.mktemp("campaign")
    return Campaign(folder, write_inputs(folder), kinds=KINDS[:2])


def assert_nothing_lost(counts, tried):
    assert not [note for count in counts for note in count.notes]
    assert sum(count.tried for count in counts) >= tried


def test_killed_runs_resume_and_lose_nothing(campaign):
    assert_nothing_lost(kills.kill_runs(campaign, 10), 10)


def test_stopped_runs_resume_and_lose_nothing(campaign):
    assert_nothing_lost(stops.stop_runs(campaign, 3), 3)


def test_failed_file_operations_end_with_one_line(campaign):
    assert_nothing_lost(disks.break_files(campaign, 8), 8)


def test_file_size_limit_ends_with_one_line(campaign):
    assert_nothing_lost(disks.limit_files(campaign, 2), 2)


def test_deleted_folder_is_reported(campaign):
    assert_nothing_lost(disks.delete_folders(campaign, 1), 1)


def test_runs_do_not_share_a_folder(campaign):
    assert_nothing_lost(sharing.share_folders(campaign, 1), 3)


def test_killed_loaders_are_named(campaign):
    assert_nothing_lost(loaders.kill_loaders(campaign, 2), 2)


# The campaigns themselves.


def test_differences_are_detected(campaign):
    twin = campaign.undisturbed(KINDS[0]).place.output
    copy = campaign.folder / "copy"
    shutil.copytree(twin, copy)
    assert differences(copy, twin) == []
    text = (copy / "results.json").read_text()
    (copy / "results.json").write_text(text.replace('"step": ', '"step": 1'))
    (copy / "epoch_1.pt").unlink()
    found = differences(copy, twin)
    assert any("results.json: /step" in each for each in found) and any("epoch_1.pt" in each for each in found)


def test_chosen_operations_fail(tmp_path):
    from tests.faults.program import call

    assert call(_write_with_faults, tmp_path) == ["EIO at write 2 of a.txt", "ENOSPC at rename 0 of b.txt"]


def _write_with_faults(folder):
    found = []
    faults = (hooks.Fault(2, errno.EIO, file="a.txt", kind="write"), hooks.Fault(0, errno.ENOSPC, kind="rename"))
    for fault in faults:
        hooks.install(folder, fault)
        try:
            with (folder / "a.txt").open("w") as file:
                for number in range(5):
                    file.write(str(number))
            (folder / "a.txt").rename(folder / "b.txt")
        except OSError as error:
            operation = f"write {number}" if error.errno == errno.EIO else "rename 0"
            name = "a.txt" if error.errno == errno.EIO else "b.txt"
            found.append(f"{errno.errorcode[error.errno]} at {operation} of {name}")
    return found
