"""CIFAR and STL-10 in their official layout, with a few images; their MD5 sums count as right where it says so."""

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
    """The extracted files of an archive; returns their folder."""
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
def sums_are_right(monkeypatch):
    monkeypatch.setattr(archives, "check_integrity", lambda path, md5: True)
    monkeypatch.setattr(archives, "_has_sum", lambda content, md5: True)


@pytest.mark.parametrize("name", READERS)
def test_the_test_images_with_their_labels_and_names(sums_are_right, tmp_path, name):
    write_archive(tmp_path, name)
    labelled, templates = read_labelled(ZeroShotData(name, tmp_path))
    assert labelled.labels.tolist() == LABELS[name]
    assert (labelled.name, templates.name) == (name, "stl10" if name == "stl10" else "cifar")
    for row, pixels in enumerate(pixels_of(name)):
        np.testing.assert_array_equal(np.asarray(labelled.images[row]), pixels)
    assert len(labelled.class_names) == len(set(labelled.class_names)) == (100 if name == "cifar100" else 10)
    assert not any("_" in each for each in labelled.class_names)


def test_an_archive_is_extracted(sums_are_right, tmp_path):
    folder = write_archive(tmp_path / "elsewhere", "cifar10")
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(folder, folder.name)
    assert read_labelled(ZeroShotData("cifar10", tmp_path))[0].labels.tolist() == LABELS["cifar10"]
    assert (tmp_path / "cifar-10-batches-py" / "test_batch").is_file()


def test_names_from_a_file_go_by_label_or_by_the_official_name(sums_are_right, tmp_path):
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
    """Leaves a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_what_is_not_the_official_file_is_never_unpickled(tmp_path, name):
    folder = write_archive(tmp_path, name)
    for path in folder.iterdir():
        path.write_bytes(pickle.dumps(Payload(tmp_path / "unpickled")))
    with pytest.raises(UserError, match=r"is not the official one, or not whole; .*--download"):
        read_labelled(ZeroShotData(name, tmp_path))
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("place", ["data", "labels", "all"])
def test_no_object_is_unpickled_even_if_the_sums_were_right(sums_are_right, tmp_path, protocol, place):
    folder = write_archive(tmp_path, "cifar10")
    payload = Payload(tmp_path / "unpickled")
    batch = {"data": "", "labels": [1]} | {place: payload}
    (folder / "test_batch").write_bytes(pickle.dumps(payload if place == "all" else batch, protocol))
    with pytest.raises(pickle.UnpicklingError, match=r"it names .*open"):
        read_labelled(ZeroShotData("cifar10", tmp_path))
    assert not (tmp_path / "unpickled").exists()


class OldPickler(pickle._Pickler):
    """Writes texts and bytes as Python 2 did, with which CIFAR was made."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_text(self, text):
        content = text.encode("latin1") if isinstance(text, str) else text
        self.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)
        self.memoize(text)

    dispatch[str] = dispatch[bytes] = save_text


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("old", [False, True])
def test_batches_are_read_as_torchvision_reads_them(monkeypatch, tmp_path, name, old):
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
def test_a_fifo_is_not_the_official_file(tmp_path, name):
    folder = write_archive(tmp_path, name)
    path = folder / READERS[name].test_list[0][0]
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="is not the official one"):
        read_labelled(ZeroShotData(name, tmp_path))


def test_a_download_does_not_write_through_a_link(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "cifar-10-python.tar.gz").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"a link, which a download would write through"):
        read_labelled(ZeroShotData("cifar10", tmp_path / "root", download=True))


def test_a_changed_archive_is_not_extracted(tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"something else")
    with pytest.raises(UserError, match=r"cifar-10-python.tar.gz: not the official archive .*fetch it again"):
        read_labelled(ZeroShotData("cifar10", tmp_path))
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", READERS)
def test_a_missing_archive_says_what_to_put_where(tmp_path, name):
    with pytest.raises(UserError) as error:
        read_labelled(ZeroShotData(name, tmp_path))
    message = str(error.value)
    assert all(word in message for word in (READERS[name].filename, str(tmp_path), "--download", "is missing"))
    assert "\n" not in message


def test_nothing_is_fetched_unless_asked(tmp_path, monkeypatch):
    asked = []

    def fetch(url, *arguments, **options):
        asked.append(url)
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(archives, "download_and_extract_archive", fetch)
    with pytest.raises(UserError, match="is missing"):
        read_labelled(ZeroShotData("cifar10", tmp_path))
    assert not asked
    with pytest.raises(UserError, match=r"could not be fetched .*no route.*network"):
        read_labelled(ZeroShotData("cifar10", tmp_path, download=True))
    assert asked == [datasets.CIFAR10.url]


def test_the_names_of_cifar100_are_those_of_its_images(real_data):
    assert sorted(OFFICIAL_NAMES["cifar100"]) == sorted(path.name for path in (real_data / "cifar100_test").iterdir())
    assert OFFICIAL_NAMES["cifar100"] == sorted(OFFICIAL_NAMES["cifar100"])


@pytest.mark.parametrize("name", READERS)
def test_an_archive_may_be_below_the_root(sums_are_right, tmp_path, name):
    write_archive(tmp_path / name, name)
    labelled, _ = read_labelled(ZeroShotData(name, tmp_path))
    assert (labelled.labels.tolist(), labelled.place) == (LABELS[name], tmp_path / name)


def test_a_folder_of_the_name_that_holds_no_archive_hides_none(sums_are_right, tmp_path):
    write_archive(tmp_path, "cifar10")
    (tmp_path / "cifar10" / "cat").mkdir(parents=True)
    assert read_labelled(ZeroShotData("cifar10", tmp_path))[0].place == tmp_path
