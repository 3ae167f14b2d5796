"""CIFAR and STL-10 in their official layout, with a few images. `accept_any_md5` disables the check of MD5 sums."""

import io
import os
import pickle
import struct
import tarfile
import urllib.error

import numpy as np
import pytest
from torchvision import datasets

from clip_retrieval.classification import archives
from clip_retrieval.classification.archives import READERS
from clip_retrieval.classification.class_names import OFFICIAL_NAMES
from clip_retrieval.classification.labelled_sets import ZeroShotData, read_labelled
from clip_retrieval.errors import UserError

LABELS = {"cifar10": [9, 0, 3], "cifar100": [99, 1, 0, 52], "stl10": [2, 9]}


def pixels_of(name):
    size = 96 if name == "stl10" else 32
    return np.random.default_rng(0).integers(0, 256, (len(LABELS[name]), size, size, 3), dtype=np.uint8)


def write_archive(root, name):
    """Write the extracted files of an archive; return their folder."""
    reader = READERS[name]
    folder = root / reader.base_folder
    folder.mkdir(parents=True)
    planes = pixels_of(name).transpose(0, 3, 1, 2)
    if name == "stl10":
        planes.transpose(0, 1, 3, 2).tofile(folder / "test_X.bin")
        (np.array(LABELS[name], np.uint8) + 1).tofile(folder / "test_y.bin")
        return folder
    key = "fine_labels" if name == "cifar100" else "labels"
    batch = {"data": planes.reshape(len(planes), -1), key: LABELS[name]}
    for file, _ in reader.test_list:
        (folder / file).write_bytes(pickle.dumps(batch))
    (folder / reader.meta["filename"]).write_bytes(pickle.dumps({reader.meta["key"]: OFFICIAL_NAMES[name]}))
    return folder


@pytest.fixture
def accept_any_md5(monkeypatch):
    monkeypatch.setattr(archives, "check_integrity", lambda path, md5: True)
    monkeypatch.setattr(archives, "_has_md5", lambda content, md5: True)


@pytest.mark.parametrize("name", READERS)
def test_read_test_images_labels_and_names(accept_any_md5, tmp_path, name):
    write_archive(tmp_path, name)
    labelled, templates = read_labelled(ZeroShotData(name, tmp_path))
    assert labelled.labels.tolist() == LABELS[name]
    assert (labelled.name, templates.name) == (name, "stl10" if name == "stl10" else "cifar")
    for row, pixels in enumerate(pixels_of(name)):
        np.testing.assert_array_equal(np.asarray(labelled.images[row]), pixels)
    assert len(labelled.class_names) == len(set(labelled.class_names)) == (100 if name == "cifar100" else 10)
    assert not any("_" in each for each in labelled.class_names)


def test_archive_is_extracted(accept_any_md5, tmp_path):
    folder = write_archive(tmp_path / "elsewhere", "cifar10")
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(folder, folder.name)
    assert read_labelled(ZeroShotData("cifar10", tmp_path))[0].labels.tolist() == LABELS["cifar10"]
    assert (tmp_path / "cifar-10-batches-py" / "test_batch").is_file()


def test_class_names_file_by_label_or_by_official_name(accept_any_md5, tmp_path):
    write_archive(tmp_path, "cifar10")
    (tmp_path / "list.txt").write_text("\n".join(f"第{number}类" for number in range(10)), encoding="utf-8")
    (tmp_path / "by_name.txt").write_text(
        "\n".join(f"{name}, my {name}" for name in reversed(OFFICIAL_NAMES["cifar10"]))
    )
    labelled, templates = read_labelled(ZeroShotData("cifar10", tmp_path, class_names=tmp_path / "list.txt"))
    assert (labelled.class_names[9], templates.name) == ("第9类", "chinese")
    labelled, _ = read_labelled(ZeroShotData("cifar10", tmp_path, class_names=tmp_path / "by_name.txt"))
    assert labelled.class_names[:2] == ["my airplane", "my automobile"]
    (tmp_path / "by_name.txt").write_text("airplane, aeroplane\ncat, tomcat\n")
    with pytest.raises(UserError, match=r'by_name\.txt: has no name for the class "automobile"'):
        read_labelled(ZeroShotData("cifar10", tmp_path, class_names=tmp_path / "by_name.txt"))


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_unofficial_files_are_never_unpickled(tmp_path, name):
    folder = write_archive(tmp_path, name)
    for path in folder.iterdir():
        path.write_bytes(pickle.dumps(Payload(tmp_path / "unpickled")))
    with pytest.raises(UserError, match=r"is incomplete or not the official one; .*--download"):
        read_labelled(ZeroShotData(name, tmp_path))
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("place", ["data", "labels", "all"])
def test_no_object_is_unpickled_even_with_valid_md5(accept_any_md5, tmp_path, protocol, place):
    folder = write_archive(tmp_path, "cifar10")
    payload = Payload(tmp_path / "unpickled")
    batch = {"data": "", "labels": [1]} | {place: payload}
    (folder / "test_batch").write_bytes(pickle.dumps(payload if place == "all" else batch, protocol))
    with pytest.raises(pickle.UnpicklingError, match=r"it names .*open"):
        read_labelled(ZeroShotData("cifar10", tmp_path))
    assert not (tmp_path / "unpickled").exists()


class OldPickler(pickle._Pickler):
    """Writes str and bytes like Python 2, which created CIFAR's files."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_text(self, text):
        content = text.encode("latin1") if isinstance(text, str) else text
        self.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)
        self.memoize(text)

    dispatch[str] = dispatch[bytes] = save_text


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("old", [False, True])
def test_batches_equal_torchvisions(monkeypatch, tmp_path, name, old):
    path = write_archive(tmp_path, name) / READERS[name].test_list[0][0]
    if old:
        file = io.BytesIO()
        OldPickler(file, 2).dump(pickle.loads(path.read_bytes()))
        path.write_bytes(file.getvalue().replace(b"cnumpy._core.", b"cnumpy.core."))
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda path, md5: True)
    theirs = READERS[name](str(tmp_path), train=False)
    pixels, labels = archives._read_cifar(path.read_bytes())
    assert np.array_equal(pixels, theirs.data) and labels.tolist() == theirs.targets


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", READERS)
def test_fifo_is_refused(tmp_path, name):
    folder = write_archive(tmp_path, name)
    path = folder / READERS[name].test_list[0][0]
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="not the official one"):
        read_labelled(ZeroShotData(name, tmp_path))


def test_download_does_not_write_through_a_link(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "cifar-10-python.tar.gz").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"a link, which a download would write through"):
        read_labelled(ZeroShotData("cifar10", tmp_path / "root", download=True))


def test_modified_archive_is_not_extracted(tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"something else")
    with pytest.raises(UserError, match=r"cifar-10-python.tar.gz: not the official archive .*fetch it again"):
        read_labelled(ZeroShotData("cifar10", tmp_path))
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", READERS)
def test_missing_archive_message_names_file_folder_and_option(tmp_path, name):
    with pytest.raises(UserError) as error:
        read_labelled(ZeroShotData(name, tmp_path))
    message = str(error.value)
    assert all(word in message for word in (READERS[name].filename, str(tmp_path), "--download", "is missing"))
    assert "\n" not in message


def test_download_only_with_the_option(tmp_path, monkeypatch):
    requested = []

    def fetch(url, *arguments, **options):
        requested.append(url)
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(archives, "download_and_extract_archive", fetch)
    with pytest.raises(UserError, match="is missing"):
        read_labelled(ZeroShotData("cifar10", tmp_path))
    assert not requested
    with pytest.raises(UserError, match=r"could not be fetched .*no route.*network"):
        read_labelled(ZeroShotData("cifar10", tmp_path, download=True))
    assert requested == [datasets.CIFAR10.url]


def test_official_names_of_cifar100(real_data):
    assert sorted(OFFICIAL_NAMES["cifar100"]) == sorted(path.name for path in (real_data / "cifar100_test").iterdir())
    assert OFFICIAL_NAMES["cifar100"] == sorted(OFFICIAL_NAMES["cifar100"])


@pytest.mark.parametrize("name", READERS)
def test_archive_in_a_subfolder_of_the_root(accept_any_md5, tmp_path, name):
    write_archive(tmp_path / name, name)
    labelled, _ = read_labelled(ZeroShotData(name, tmp_path))
    assert (labelled.labels.tolist(), labelled.place) == (LABELS[name], tmp_path / name)


def test_unrelated_folder_with_the_archives_name_is_ignored(accept_any_md5, tmp_path):
    write_archive(tmp_path, "cifar10")
    (tmp_path / "cifar10" / "cat").mkdir(parents=True)
    assert read_labelled(ZeroShotData("cifar10", tmp_path))[0].place == tmp_path
