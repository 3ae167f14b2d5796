"""Data sets saved by save_to_disk of the library datasets, read as any other data set."""

import base64
import io
import logging
import multiprocessing
import os
import pickle
import struct
import sys

import numpy as np
import pyarrow
import pyarrow.ipc
import pytest
from PIL import Image

from clip_retrieval.data.dataset import UNSPLIT
from clip_retrieval.data.mixture import Mixture
from clip_retrieval.data.readers import csv_file
from clip_retrieval.errors import UserError
from clip_retrieval.log import log


def encoded(number, format="png", side=9):
    """The bytes of an image file, different for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (side, side + 2, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


def text64(number, **options):
    return base64.b64encode(encoded(number, **options)).decode()


@pytest.fixture
def library():
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    return datasets


@pytest.fixture
def save(library, tmp_path):
    """save({"image": [...], "caption": [...]}) saves a Dataset; save(train={...}, test={...}) a DatasetDict."""

    def save_columns(columns=None, folder=tmp_path / "saved", features=None, shards=1, **splits):
        def make(columns):
            made = library.Dataset.from_dict(columns)
            return made.cast(library.Features(features)) if features else made

        if columns is not None:
            make(columns).save_to_disk(str(folder), num_shards=shards)
        else:
            whole = library.DatasetDict({name: make(columns) for name, columns in splits.items()})
            whole.save_to_disk(str(folder))
        return folder

    return save_columns


@pytest.fixture
def logged(caplog, monkeypatch):
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.WARNING, "clip_retrieval")
    return lambda: caplog.text


def same_picture(image, number):
    return np.array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(encoded(number)))))


# Splits


def test_a_dataset_has_no_splits_and_a_dictionary_has(save, tmp_path, read):
    root = save({"image": [encoded(0), encoded(1)], "caption": ["a dog", "a bus"]})
    assert [read("huggingface", root, split).split for split in ("train", "test")] == [UNSPLIT, UNSPLIT]
    assert read("huggingface", root, "val") is None
    columns = [{"image": [encoded(i)], "caption": [f"caption {i}"]} for i in range(3)]
    root = save(folder=tmp_path / "splits", train=columns[0], validation=columns[1], other=columns[2])
    assert [read("huggingface", root, split).captions for split in ("train", "val")] == [["caption 0"], ["caption 1"]]
    assert (read("huggingface", root, "val").name, read("huggingface", root, "val").split) == ("huggingface", "val")
    assert read("huggingface", root, "test") is None
    assert read("huggingface", root / "other", "test").captions == ["caption 2"]


# Images


def forms(library):
    """The same three images in each supported column type: the column, and its feature."""
    contents = [encoded(i) for i in range(3)]
    return {
        "image": (
            [{"bytes": content, "path": None} for content in contents],
            library.Image(),
        ),
        "bytes": (contents, library.Value("binary")),
        "base64": ([text64(i) for i in range(3)], library.Value("string")),
        "list of base64": ([[text64(i)] for i in range(3)], library.List(library.Value("string"))),
        "list of images": ([[{"bytes": c, "path": None}] for c in contents], library.List(library.Image())),
        "large": ([text64(i) for i in range(3)], library.Value("large_string")),
    }


FORMS = ("image", "bytes", "base64", "list of base64", "list of images", "large")


@pytest.mark.parametrize("form", FORMS)
def test_images_in_every_form(library, save, read, form):
    column, feature = forms(library)[form]
    features = {"image": feature, "caption": library.Value("string")}
    root = save({"image": column, "caption": ["a", "b", "c"]}, features=features, shards=2)
    dataset = read("huggingface", root)
    assert len(dataset.images) == 3 and dataset.pairs.tolist() == [[0, 0], [1, 1], [2, 2]]
    for i in range(3):
        assert same_picture(dataset.images[i], i)
        assert dataset.images.encoded(i) == encoded(i)
        assert dataset.images.name(i) == f"{root}, row {i}"


def test_another_alphabet_of_base64_without_padding(save, read):
    content = next(e for e in map(encoded, range(100)) if "+" in base64.b64encode(e).decode() and len(e) % 3)
    text = base64.urlsafe_b64encode(content).decode().rstrip("=")
    assert read("huggingface", save({"image": [text], "caption": ["a"]})).images.encoded(0) == content


def test_paths_are_relative_to_the_data_set_or_image_dir(library, save, tmp_path, read):
    root = save({"image": ["a.png", "sub/b.png", "a.png"], "caption": ["one", "two", "three"]})
    for folder in (root, tmp_path / "elsewhere"):
        (folder / "sub").mkdir(parents=True)
        (folder / "a.png").write_bytes(encoded(0))
        (folder / "sub" / "b.png").write_bytes(encoded(1))
    for options in ({}, {"image_dir": tmp_path / "elsewhere"}):
        dataset = read("huggingface", root, **options)
        assert dataset.pairs.tolist() == [[0, 0], [0, 2], [1, 1]]
        assert dataset.captions == ["one", "two", "three"]
        assert same_picture(dataset.images[1], 1)
    assert str(dataset.images.name(0)) == str(tmp_path / "elsewhere" / "a.png")


def test_an_image_feature_that_holds_paths(library, save, tmp_path, read, monkeypatch):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(encoded(0))
    column = [{"bytes": None, "path": str(tmp_path / "photos" / "a.png")}, None]
    # Written by versions of the library that did not copy the files into the data set.
    features = {"image": {"bytes": library.Value("binary"), "path": library.Value("string")}}
    root = save({"image": column, "caption": ["a", "b"]}, features=features | {"caption": library.Value("string")})
    dataset = read("huggingface", root)
    assert len(dataset.images) == 1 and same_picture(dataset.images[0], 0)


# Rows


def test_caption_lists_and_duplicate_images(save, read):
    columns = {
        "image": [encoded(0), encoded(1), encoded(0), encoded(2)],
        "caption": [["a", " b\nc "], ["b"], ["a", "d"], [""]],
    }
    dataset = read("huggingface", save(columns))
    assert dataset.captions == ["a", "b c", "b", "d"]
    assert dataset.pairs.tolist() == [[0, 0], [0, 1], [0, 3], [1, 2]]


def test_rows_without_image_or_caption_are_skipped_and_counted(save, read, logged):
    columns = {
        "image": [None, text64(1), "", text64(3), text64(4)],
        "caption": ["a", "b", "c", None, "  "],
    }
    dataset = read("huggingface", root := save(columns))
    assert dataset.captions == ["b"] and dataset.images.name(0) == f"{root}, row 1"
    assert "4 of 5 rows are skipped: 2 without one image, 2 without a caption" in logged()


def test_rows_with_two_images_are_skipped(save, read, logged):
    dataset = read("huggingface", save({"image": [[text64(0), text64(1)], [text64(2)]], "caption": ["a", "b"]}))
    assert dataset.captions == ["b"] and "1 without one image" in logged()


def test_columns_by_option(save, read):
    root = save({"picture": [encoded(0)], "text": ["a"], "image": [encoded(1)], "caption": ["b"]})
    dataset = read("huggingface", root, image_column="picture", caption_column="text")
    assert dataset.captions == ["a"] and same_picture(dataset.images[0], 0)


# In other processes


def test_pickled_images_are_small_and_open_the_files_again(save, read):
    root = save({"image": [encoded(i, side=100) for i in range(20)], "caption": ["x"] * 20})
    images = read("huggingface", root).images
    assert len(pickle.dumps(images)) < 2000
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(images.encoded, [3, 7]) == [encoded(3, side=100), encoded(7, side=100)]


def test_a_stamp_changes_when_the_data_set_is_saved_again(library, save, tmp_path, read):
    columns = {"image": [encoded(0), encoded(1)], "caption": ["a", "b"]}
    first = read("huggingface", save(columns)).images
    assert first.stamp(0)[0] == len(encoded(0))
    again = read("huggingface", save(columns, folder=tmp_path / "again")).images
    assert first.stamp(0)[0] == again.stamp(0)[0] and first.stamp(0)[1] < again.stamp(0)[1]


# By name


M3IT = {
    "instruction": ["Describe"] * 3,
    "inputs": [""] * 3,
    "image_base64_str": [[text64(0)], [text64(1)], [text64(0)]],
    "outputs": ["a dog", "a bus", "a brown dog"],
}


def test_textcap_has_the_columns_of_m3it(save, tmp_path, read):
    save(folder=tmp_path / "textcap", train=M3IT, validation={name: column[:1] for name, column in M3IT.items()})
    for root in (tmp_path, tmp_path / "textcap"):
        dataset = read("textcap", root, "train")
        assert dataset.name == "textcap" and len(dataset.images) == 2
        assert dataset.captions == ["a dog", "a bus", "a brown dog"]
        assert dataset.pairs.tolist() == [[0, 0], [0, 2], [1, 1]]
        assert read("textcap", root, "val").captions == ["a dog"]


def test_sbucaptions_is_in_its_folder_or_in_the_root(save, tmp_path, read):
    save({"image": [encoded(0)], "caption": ["a dog"]}, folder=tmp_path / "sbu_captions_images")
    for root in (tmp_path, tmp_path / "sbu_captions_images"):
        assert read("sbucaptions", root, "train").captions == ["a dog"]
    save(folder=tmp_path / "other" / "sbu_captions_images", train={"image": [encoded(0)], "caption": ["a cat"]})
    assert read("sbucaptions", tmp_path / "other", "train").captions == ["a cat"]


def test_combined_has_the_three_data_sets_of_simple_clip(save, tmp_path, read):
    image = [{"bytes": encoded(5), "path": None}]
    save(folder=tmp_path / "coco", train={"image": image, "caption": [["a", "b"]]}, validation=M3IT)
    save(folder=tmp_path / "textcap", train=M3IT)
    save({"image": [encoded(6), None], "caption": ["c", "d"]}, folder=tmp_path / "sbu_captions_images")
    train = read("combined", tmp_path, "train")
    assert isinstance(train, Mixture) and (train.name, train.split) == ("combined", "train")
    assert [part.name for part in train.parts] == ["coco", "textcap", "sbucaptions"]
    assert [(len(part.images), len(part.captions)) for part in train.parts] == [(1, 2), (2, 3), (1, 1)]
    assert same_picture(train.images[0], 5) and same_picture(train.images[3], 6)
    val = read("combined", tmp_path, "val")
    assert (val.name, val.split, len(val.images)) == ("coco", "val", 2)
    assert read("combined", tmp_path, "test") is None


# Bad input: one line that names the folder


def fails(read, root, *parts, dataset="huggingface", split="train", **options):
    with pytest.raises(UserError) as error:
        read(dataset, root, split, **options)
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, message


def test_folders_without_a_saved_data_set(tmp_path, read):
    fails(read, tmp_path / "nowhere", tmp_path / "nowhere", "no such folder")
    fails(read, tmp_path, tmp_path, "dataset_dict.json", "--dataset_root")
    fails(read, tmp_path, tmp_path / "coco", dataset="combined")
    (tmp_path / "dataset_dict.json").write_text("[1]")
    fails(read, tmp_path, "dataset_dict.json", "splits")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["all", "rest"]}')
    fails(read, tmp_path, "all, rest", "validation")


def test_unknown_columns_are_listed(save, read):
    root = save({"picture": [encoded(0)], "text": ["a"]})
    fails(read, root, root, "no column image", "picture, text", "--image_column")
    fails(read, root, "no column caption", "picture, text", "--caption_column", image_column="picture")
    fails(read, root, "no column image or image_base64_str", dataset="sbucaptions")


def test_columns_of_other_types(save, read):
    root = save({"image": [7, 8], "caption": [[1], [2]], "text": ["a", "b"]})
    fails(read, root, "column caption", "list<", "not texts", "--caption_column")
    fails(read, root, "column image", "int64", "not images", "--image_column", caption_column="text")


def test_no_usable_row(save, library, read):
    features = {"image": library.Image(), "caption": library.Value("string")}
    fails(read, save({"image": [None], "caption": ["a"]}, features=features), "no row has one image in image")


def test_a_broken_image_names_its_row(save, read):
    images = read(
        "huggingface", root := save({"image": ["!!!!", text64(0), text64(1)[:40]], "caption": list("abc")})
    ).images
    for row in (0, 2):
        with pytest.raises(UserError, match=f"{root}, row {row}: "):
            images[row]
    assert same_picture(images[1], 0)


@pytest.fixture
def saved(save):
    """A saved data set, and its Arrow file."""
    root = save({"image": [encoded(i) for i in range(50)], "caption": [f"caption {i}" for i in range(50)]})
    (file,) = root.glob("*.arrow")
    return root, file


@pytest.mark.parametrize("kept", [0, 5, 300, 0.5, -8, -1])
def test_an_arrow_file_cut_short(saved, read, kept):
    root, file = saved
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    fails(read, root, file, "cut short")


def test_missing_files(saved, read):
    root, file = saved
    content = file.read_bytes()
    file.unlink()
    fails(read, root, file, "No such file")
    file.write_bytes(content)
    (root / "dataset_info.json").unlink()
    assert len(read("huggingface", root, "train").images) == 50  # it is not needed


@pytest.mark.parametrize("place", [0.0, 0.001, 0.02, 0.3, 0.9])
def test_a_damaged_arrow_file_never_ends_the_process(saved, read, place):
    root, file = saved
    content = bytearray(file.read_bytes())
    begin = int(place * len(content))
    content[begin : begin + 64] = b"\xa7" * 64
    file.write_bytes(content)
    try:
        dataset = read("huggingface", root, "train")
    except UserError as error:
        assert str(root) in str(error) and "\n" not in str(error)
        return
    broken = 0
    for i in range(len(dataset.images)):
        try:
            dataset.images[i]
        except UserError:
            broken += 1
    assert 0 < broken + (len(dataset.images) < 50) < 50


def test_offsets_outside_the_file_are_refused(library, read, tmp_path, save):
    """Following the damaged offset would end the process."""
    for number, image in enumerate(("bytes", "list of base64", "image")):
        column, feature = forms(library)[image]
        features = {"image": feature, "caption": library.Value("string")}
        root = save({"image": column, "caption": list("abc")}, folder=tmp_path / str(number), features=features)
        (file,) = root.glob("*.arrow")
        content = file.read_bytes()
        sizes = [len(text64(i)) if "64" in image else len(encoded(i)) for i in range(3)]
        offsets = np.cumsum([0, *sizes]).astype("<i4").tobytes()
        assert content.count(offsets) == 1
        file.write_bytes(content.replace(offsets, offsets[:4] + b"\xff\xff\xff\x3f" + offsets[8:]))
        fails(read, root, root, "column image", "damaged")


@pytest.mark.parametrize("version", [None, "14.0.2"])
def test_without_pyarrow_the_error_has_the_pip_command(saved, read, monkeypatch, version):
    if version:
        monkeypatch.setattr(pyarrow, "__version__", version)  # it runs pickles in a schema
    else:
        monkeypatch.setitem(sys.modules, "pyarrow", None)
    fails(read, saved[0], "pip install -U pyarrow")


def test_no_code_runs_and_the_library_is_not_needed(save, tmp_path, read, monkeypatch):
    root = save({"image": [encoded(0)], "caption": ["a"]})
    marker = tmp_path / "marker"
    for name in ("saved.py", "dataset.py", "__init__.py", "conftest.py", "datasets.py", "dataset_info.json"):
        (root / name).write_text(f"open({str(marker)!r}, 'w')")
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.chdir(root)
    assert len(read("huggingface", root).images) == 1 and not marker.exists()


# Hostile folders


STATES = {
    "no object": "[1]",
    "no files": "{}",
    "a number": '{"_data_files": 3}',
    "a name that is none": '{"_data_files": [{"filename": 3}]}',
    "a list": '{"_data_files": [["filename"]]}',
    "a NUL": '{"_data_files": [{"filename": "a\\u0000b.arrow"}]}',
    "the folder above": '{"_data_files": [{"filename": "../saved/data-00000-of-00001.arrow"}]}',
    "an absolute path": '{"_data_files": [{"filename": "/etc/passwd"}]}',
    "half a surrogate pair": '{"_data_files": [{"filename": "\\ud800.arrow"}]}',
    "a long name": '{"_data_files": [{"filename": "%s"}]}' % ("x" * 5000),
    "an address": '{"_data_files": [{"filename": "hf://datasets/a/b.arrow"}]}',
    "rows in another order": '{"_data_files": [], "_indices_data_files": [{"filename": "i.arrow"}]}',
    "nested": "[" * 100_000,
    "broken": '{"_data_files"',
}


@pytest.mark.parametrize("name", STATES)
def test_an_invalid_state_is_one_line(saved, read, name):
    root, _ = saved
    (root / "state.json").write_text(STATES[name])
    fails(read, root, root)


@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "dangling"])
@pytest.mark.parametrize("target", ["arrow", "state in a split"])
@pytest.mark.timeout(60)
def test_only_regular_files_are_read_without_waiting(save, read, kind, target):
    root = save(train={"image": [encoded(0)], "caption": ["a"]})
    path = next(root.glob("train/*.arrow")) if target == "arrow" else root / "train" / "state.json"
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "/nowhere")
    fails(read, root, path)


def write_stream(file, table, **options):
    with pyarrow.ipc.new_stream(file, table.schema, options=pyarrow.ipc.IpcWriteOptions(**options)) as stream:
        stream.write_table(table)


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_compressed_arrow_files_are_refused(saved, read, codec):
    root, file = saved
    write_stream(file, pyarrow.table({"image": [b"x" * 10**7], "caption": ["a"]}), compression=codec)
    assert file.stat().st_size < 10**5
    fails(read, root, root, "is compressed")
    dictionary = pyarrow.array(["x" * 10**7]).dictionary_encode()
    write_stream(file, pyarrow.table({"image": [b"x"], "caption": dictionary}), compression=codec)
    fails(read, root, root, "is compressed")


def test_columns_many_times_their_file_are_refused(saved, read):
    root, file = saved
    images = pyarrow.array([encoded(i) for i in range(3)])
    text = "x" * 10**6
    columns = {
        "dictionary": pyarrow.DictionaryArray.from_arrays([0] * 3, [text]),
        "run_end_encoded": pyarrow.RunEndEncodedArray.from_arrays([3], [text]),
        "view": pyarrow.array([text] * 3, pyarrow.string_view()),
    }
    for column in columns.values():
        write_stream(file, pyarrow.table({"image": images, "caption": column}))
        fails(read, root, root, "column caption", "not texts")


def test_more_rows_than_the_file_can_hold_are_refused(saved, read):
    root, file = saved
    nothing = pyarrow.nulls(777)
    write_stream(file, pyarrow.table({"image": nothing, "caption": nothing}))
    file.write_bytes(file.read_bytes().replace(struct.pack("<q", 777), struct.pack("<q", 10**12)))
    fails(read, root, root, "1,000,000,000,000 rows are more than its files can hold")


def test_columns_of_the_same_name_are_refused(saved, read):
    root, file = saved
    both = pyarrow.Table.from_arrays([pyarrow.array([encoded(0)])] * 2, names=["image", "image"])
    write_stream(file, both)
    fails(read, root, root, "duplicate field names")


# Comparison with other readers


def test_the_pairs_of_a_csv_are_the_same_data_set(captioned, save, read):
    rows, _ = csv_file._read_rows(captioned / "captions.csv", "image", "caption", "split", None)
    splits = {}
    for row in rows:
        columns = splits.setdefault(row.split, {"image": [], "caption": []})
        columns["image"].append((captioned / row.image).read_bytes())
        columns["caption"].append(row.caption)
    root = save(**splits)
    for split in ("train", "val", "test"):
        a, b = read("csv", captioned, split), read("huggingface", root, split)
        assert list(a.captions) == list(b.captions) and np.array_equal(a.pairs, b.pairs)
        assert [a.images.encoded(i) for i in range(len(a.images))] == [
            b.images.encoded(i) for i in range(len(b.images))
        ]
