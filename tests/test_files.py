"""Files are written atomically, and never in the place of a device."""

import os
import stat

import pytest

from clip_retrieval import files
from clip_retrieval.files import write_json, write_text
from tests.conftest import read_json


def test_device_is_not_replaced(tmp_path):
    device = tmp_path / "null"
    try:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except (AttributeError, PermissionError):
        pytest.skip("only root of Linux makes devices")
    with pytest.raises(OSError, match="a device, not a file"):
        write_text(device, "text")
    assert stat.S_ISCHR(device.lstat().st_mode) and list(tmp_path.iterdir()) == [device]


def test_names_in_the_folder_of_devices_are_refused(script, tmp_path, monkeypatch):
    """/dev/stdout is a symbolic link, which would be replaced."""
    recalls = {"R@1": 1, "R@5": 2, "R@10": 3}
    write_json(tmp_path / "results.json", {"model": "m", "i2t": recalls, "t2i": recalls, "mean_recall": 2})
    arguments = ("convert_results", tmp_path, "--format", "clip_benchmark", "--output")
    (tmp_path / "dev").mkdir()
    monkeypatch.setattr(files, "DEVICES", tmp_path / "dev")
    code, _, err = script(*arguments, tmp_path / "dev" / "stdout")
    assert code == 2 and "a device, not a file" in err and not any((tmp_path / "dev").iterdir())
    assert script(*arguments, tmp_path / "file.json")[0] == 0
    assert read_json(tmp_path / "file.json")["model"] == "m"
