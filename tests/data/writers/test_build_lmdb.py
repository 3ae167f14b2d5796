"""scripts/build_lmdb.py: Chinese-CLIP's LMDB folders, complete or absent; only plain values are read from them."""

import logging
import multiprocessing
import os
import pickle
import resource
import runpy
import shutil
import signal
import subprocess
import sys

import lmdb
import pytest
import torch

from clip_retrieval.data.images.base64_images import read_tsv
from clip_retrieval.data.writers import build_lmdb as building
from clip_retrieval.data.writers.build_lmdb import build_lmdb
from clip_retrieval.data.writers.tsv import export
from clip_retrieval.errors import RunError, UserError
from clip_retrieval.log import log
from clip_retrieval.options import DataOptions
from tests.conftest import ROOT
from tests.data.make_chinese import content, photo, write_sample, write_split

fork = multiprocessing.get_context("fork")
IMAGES = 12


@pytest.fixture
def logged(caplog, monkeypatch):
    """logged() returns the messages since its last call."""
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.INFO, "clip_retrieval")

    def lines():
        messages = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return messages

    return lines


def entries(folder):
    """All keys and values of an LMDB folder, pickles unpickled."""
    with lmdb.open(str(folder), readonly=True, lock=False) as env, env.begin() as transaction:
        values = dict(transaction.cursor())
    return {key: pickle.loads(value) if value[:1] == b"\x80" else value for key, value in values.items()}


def write(folder, images=IMAGES):
    """A split of some images with two texts each."""
    texts = [(i, f"文本 {i}", [i // 2]) for i in range(2 * images)]
    return write_split(folder, "train", {i: photo(i) for i in range(images)}, texts)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# Content


def test_layout_is_that_of_chinese_clip(tmp_path):
    write_split(tmp_path, "valid", {5: photo(5), 77: photo(7)}, [(1, "一", [5, 77]), ("b", "二", []), (3, "三", [5])])
    build_lmdb(tmp_path, ["valid"])
    folder = tmp_path / "lmdb" / "valid"
    lines = dict(line.split("\t") for line in (tmp_path / "valid_imgs.tsv").read_text().splitlines())
    assert entries(folder / "imgs") == {k.encode(): v.encode() for k, v in lines.items()} | {b"num_images": b"2"}
    pairs = entries(folder / "pairs")
    assert {key: pairs[key] for key in (b"0", b"1", b"2", b"num_samples")} == {
        b"0": (5, 1, "一"),
        b"1": (77, 1, "一"),
        b"2": (5, 3, "三"),
        b"num_samples": b"3",
    }
    assert len(pairs) == 5, "and our own key: the text without an image"
    assert names(tmp_path / "lmdb") == ["valid"] and names(folder) == ["imgs", "pairs", "sources.json"]


def test_flickr8k_cn_is_read_back(real_data, tmp_path, read, monkeypatch):
    monkeypatch.setattr(building, "COMMIT_BYTES", 2**20)
    root = real_data / "flickr8k"
    options = {"dataset": "flickr8k", "dataset_root": str(root), "annotations": str(root / "dataset_flickr8kcn.json")}
    export(DataOptions(**options), tmp_path, ["valid"])
    lines = (tmp_path / "valid_imgs.tsv").read_text().splitlines(True)[:300]
    (tmp_path / "valid_imgs.tsv").write_text("".join(lines))
    lines = (tmp_path / "valid_texts.jsonl").read_text().splitlines(True)[:1500]
    (tmp_path / "valid_texts.jsonl").write_text("".join(lines))
    build_lmdb(tmp_path, ["valid"])
    from_lmdb = read("chinese", tmp_path, "val")
    from_files = read("chinese", "nowhere", "val", val_data=tmp_path / "valid")
    assert (len(from_lmdb.images), len(from_lmdb.captions), len(from_lmdb.pairs)) == (300, 1500, 1500)
    assert content(from_lmdb) == content(from_files)


def test_the_map_grows_with_its_content(tmp_path, read, monkeypatch):
    monkeypatch.setattr(building, "MAP_BYTES", 2**14)
    monkeypatch.setattr(building, "COMMIT_BYTES", 5000)
    write(tmp_path, images=24)
    build_lmdb(tmp_path, ["train"])
    size = (tmp_path / "train_imgs.tsv").stat().st_size
    imgs = tmp_path / "lmdb" / "train" / "imgs"
    assert size > 1.5 * 2**14
    data = (imgs / "data.mdb").read_bytes()
    assert 2**14 < int.from_bytes(data[32:40], sys.byteorder) < 6 * size, "the size of the map, as recorded in the file"
    assert len(data) < 4 * size
    files = read("chinese", "nowhere", "train", train_data=tmp_path / "train")
    assert content(read("chinese", tmp_path, "train")) == content(files)


# Interrupted, repeated and concurrent builds


def kill_after(monkeypatch, records, folder):
    """Build in a process that is killed after so many images."""

    def read_some(*arguments):
        for number, record in enumerate(read_tsv(*arguments)):
            if number == records:
                os.kill(os.getpid(), signal.SIGKILL)
            yield record

    monkeypatch.setattr(building, "read_tsv", read_some)
    process = fork.Process(target=build_lmdb, args=(folder, ["train"]))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("killed", [0, 1, 7, 11])
def test_a_killed_build_leaves_no_split_and_is_rebuilt(tmp_path, monkeypatch, killed):
    monkeypatch.setattr(building, "COMMIT_BYTES", 1)
    write(tmp_path)
    kill_after(monkeypatch, killed, tmp_path)
    assert names(tmp_path / "lmdb") == [".train.lock", ".train.partial"]
    monkeypatch.setattr(building, "read_tsv", read_tsv)
    build_lmdb(tmp_path, ["train"])
    assert names(tmp_path / "lmdb") == ["train"]
    whole = write(tmp_path / "whole")
    build_lmdb(whole, ["train"])
    for part in ("imgs", "pairs"):
        assert entries(tmp_path / "lmdb/train" / part) == entries(whole / "lmdb/train" / part)


def test_a_killed_build_of_other_images_leaves_none_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(building, "COMMIT_BYTES", 1)
    write(tmp_path)
    kill_after(monkeypatch, 7, tmp_path)
    write(tmp_path, images=4)
    monkeypatch.setattr(building, "read_tsv", read_tsv)
    build_lmdb(tmp_path, ["train"])
    assert len(entries(tmp_path / "lmdb/train/imgs")) == 5


def test_a_text_of_an_unknown_image_is_named_and_nothing_is_left(tmp_path):
    write_split(tmp_path, "train", {1: photo(1)}, [(1, "a", [1]), (2, "b", [3])])
    with pytest.raises(UserError, match=r"train_texts.jsonl, line 2: there is no image 3 in .*train_imgs.tsv"):
        build_lmdb(tmp_path, ["train"])
    assert names(tmp_path / "lmdb") == []
    lines = (tmp_path / "train_texts.jsonl").read_text()
    (tmp_path / "train_texts.jsonl").write_text(lines.replace("[3]", "[1]"))
    build_lmdb(tmp_path, ["train"])
    assert entries(tmp_path / "lmdb/train/pairs")[b"1"] == (1, 2, "b")


def test_an_unchanged_split_is_skipped_and_a_changed_one_replaced(tmp_path, monkeypatch, logged, read):
    write(tmp_path)
    build_lmdb(tmp_path, ["train"])
    logged()
    with monkeypatch.context() as patch:
        patch.setattr(building, "read_texts", None)  # nothing is read
        build_lmdb(tmp_path, ["train"])
    assert logged() == [f"{tmp_path / 'lmdb/train'} is up to date"]
    write(tmp_path, images=3)
    build_lmdb(tmp_path, ["train"])
    assert len(read("chinese", tmp_path, "train").images) == 3 and names(tmp_path / "lmdb") == ["train"]


def test_an_old_lmdb_stays_when_the_new_one_fails(tmp_path, read):
    write(tmp_path)
    build_lmdb(tmp_path, ["train"])
    before = content(read("chinese", tmp_path, "train"))
    with (tmp_path / "train_imgs.tsv").open("a") as file:
        file.write("glued\tAAAA\tBBBB\n")
    with pytest.raises(UserError, match=f"train_imgs.tsv, line {IMAGES + 1}: holds several records"):
        build_lmdb(tmp_path, ["train"])
    assert content(read("chinese", tmp_path, "train")) == before and names(tmp_path / "lmdb") == ["train"]


def test_two_builds_at_once_are_refused(tmp_path):
    write(tmp_path)
    with (
        building._lock_partial_folder(tmp_path / "lmdb" / "train"),
        pytest.raises(UserError, match="another process is building it"),
    ):
        build_lmdb(tmp_path, ["train"])
    build_lmdb(tmp_path, ["train"])


def test_a_full_disk_keeps_the_old_lmdb(tmp_path, monkeypatch):
    monkeypatch.setattr(building, "COMMIT_BYTES", 1)
    write(tmp_path, images=3)
    build_lmdb(tmp_path, ["train"])
    before = entries(tmp_path / "lmdb/train/imgs")
    write(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        with pytest.raises(RunError, match="repeat the command") as error:
            build_lmdb(tmp_path, ["train"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value) and str(tmp_path / "lmdb/train") in str(error.value)
    assert entries(tmp_path / "lmdb/train/imgs") == before and names(tmp_path / "lmdb") == ["train"]
    build_lmdb(tmp_path, ["train"])
    assert len(entries(tmp_path / "lmdb/train/imgs")) == IMAGES + 1


# Invalid input


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("num_images\tAAAA", "an LMDB cannot hold the image id num_images"),
        ("x" * 600 + "\tAAAA", "an LMDB cannot hold the image id xxx"),
        ("1\tAAAA", "image 1 is on line 1 already"),
    ],
)
@pytest.mark.parametrize("commit_bytes", [1, 2**20])
def test_images_that_an_lmdb_cannot_hold(tmp_path, monkeypatch, line, message, commit_bytes):
    monkeypatch.setattr(building, "COMMIT_BYTES", commit_bytes)
    write_split(tmp_path, "train", {1: photo(1)}, [(1, "a", [1])])
    with (tmp_path / "train_imgs.tsv").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=f"train_imgs.tsv, line 2: {message}") as error:
        build_lmdb(tmp_path, ["train"])
    assert "\n" not in str(error.value)


def test_texts_are_checked_before_images_are_copied(tmp_path):
    write(tmp_path)
    with (tmp_path / "train_texts.jsonl").open("a") as file:
        file.write("{]\n")
    with pytest.raises(UserError, match=f"train_texts.jsonl, line {2 * IMAGES + 1}: broken JSON"):
        build_lmdb(tmp_path, ["train"])
    assert not (tmp_path / "lmdb").exists()


def test_missing_files_are_named_before_any_build(tmp_path):
    write(tmp_path)
    with pytest.raises(UserError, match=r"valid_imgs.tsv: no such file; check --data_dir and --splits"):
        build_lmdb(tmp_path, ["train", "valid"])
    assert not (tmp_path / "lmdb").exists()


def test_a_folder_with_other_content_is_not_replaced(tmp_path):
    write(tmp_path)
    (tmp_path / "lmdb" / "train" / "mine").mkdir(parents=True)
    with pytest.raises(UserError, match=r"lmdb/train: holds more than an LMDB \(mine\); choose another --lmdb_dir"):
        build_lmdb(tmp_path, ["train"])


def test_an_unwritable_folder_is_named(tmp_path):
    write(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/\.train\.partial: cannot be written"):
        build_lmdb(tmp_path, ["train"], tmp_path / "file")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", [".train.lock", ".train.partial", ".train.partial/new", "train/sources.json"])
@pytest.mark.parametrize("kind", ["fifo", "link", "dangling"])
def test_a_build_follows_no_link_and_waits_for_no_fifo(tmp_path, name, kind):
    write(tmp_path)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "imgs").write_text("precious")
    path = tmp_path / "lmdb" / name
    path.parent.mkdir(parents=True)
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / ("precious" if kind == "link" else "gone"))
    build_lmdb(tmp_path, ["train"])
    assert names(tmp_path / "lmdb") == ["train"] and names(tmp_path / "lmdb/train") == ["imgs", "pairs", "sources.json"]
    assert (tmp_path / "precious" / "imgs").read_text() == "precious" and not (tmp_path / "gone").exists()


# Invalid LMDBs


@pytest.fixture
def built(tmp_path):
    write_sample(tmp_path)
    build_lmdb(tmp_path, ["test"])
    return tmp_path / "lmdb" / "test"


def put(folder, key, value):
    with lmdb.open(str(folder), lock=False, map_size=2**24) as env, env.begin(write=True) as transaction:
        transaction.put(key, value) if value is not None else transaction.delete(key)


def fails(read, root, *parts):
    with pytest.raises(UserError) as error:
        read("chinese", root)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    for part in parts:
        assert str(part) in str(error.value), str(error.value)


class Malicious:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_never_runs_code(tmp_path, built, read, protocol):
    put(built / "pairs", b"1", pickle.dumps((1000002, 8428, Malicious(tmp_path / "marker")), protocol))
    fails(read, tmp_path, built / "pairs", "key 1: refused", "mkdir")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "value",
    [
        pickle.dumps([1000002, 8428, "a"]),
        pickle.dumps((1000002, 8428)),
        pickle.dumps((1000002, 8428, "a", "b")),
        pickle.dumps((1000002, 8428, b"a")),
        pickle.dumps((1000002, True, "a")),
        pickle.dumps((1.0, 8428, "a")),
        pickle.dumps(([1000002], 8428, "a")),
        pickle.dumps((1000002, None, "a")),
        pickle.dumps(torch.zeros(2).size()),
        b"\x80\x02Pid\n.",
        b"",
        b"no pickle",
        pickle.dumps((1000002, 8428, "a"))[:-3],
    ],
)
def test_pairs_of_other_types_are_refused(tmp_path, built, read, value):
    put(built / "pairs", b"1", value)
    fails(read, tmp_path, built / "pairs", "key 1: ")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pairs_of_every_protocol_are_read(tmp_path, built, read, protocol):
    for key, pair in enumerate([(1000002, "x", "文"), ("1000002", 2**62, "本"), (517602, -1, "末")]):
        put(built / "pairs", str(key).encode(), pickle.dumps(pair, protocol))
    assert read("chinese", tmp_path).captions[:3] == ["文", "本", "末"]


def test_an_incomplete_lmdb(tmp_path, built, read):
    for part, key, message in [
        ("pairs", b"2", "key 2: missing"),
        ("pairs", b"num_samples", "no num_samples"),
        ("imgs", b"517602", "key 1: there is no image 517602"),
        ("imgs", b"num_images", "no num_images"),
    ]:
        shutil.copytree(built, tmp_path / "kept", dirs_exist_ok=True)
        put(built / part, key, None)
        fails(read, tmp_path, built / ("pairs" if part == "pairs" or key == b"517602" else "imgs"), message)
        shutil.rmtree(built)
        (tmp_path / "kept").rename(built)


@pytest.mark.parametrize("part", ["imgs", "pairs"])
def test_files_that_are_not_an_lmdb(tmp_path, built, read, part):
    data = built / part / "data.mdb"
    whole = data.read_bytes()
    for broken in (whole[: len(whole) // 2], b"x" * 9000, b""):
        data.write_bytes(broken)
        fails(read, tmp_path, built / part)
    data.unlink()
    fails(read, tmp_path, built / part, "not an LMDB folder")


# The script, and Chinese-CLIP itself


def run_script(name, *arguments):
    command = [sys.executable, ROOT / "scripts" / f"{name}.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_script(tmp_path):
    write(tmp_path)
    run = run_script("build_lmdb", "--data_dir", tmp_path, "--splits", "train")
    assert run.returncode == 0 and run.stdout.splitlines() == [
        f"{tmp_path / 'train_imgs.tsv'}: {IMAGES} images, {2 * IMAGES} texts, {2 * IMAGES} pairs",
        f"wrote {tmp_path / 'lmdb' / 'train'}",
    ]
    run = run_script("build_lmdb", "--data-dir", tmp_path, "--splits", "train,exam")
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "exam_imgs.tsv: no such file" in run.stderr
    run = run_script("build_lmdb", "--data_dir", tmp_path, "--splits", ",")
    assert run.returncode == 2 and "--splits is empty" in run.stderr


def test_chinese_clip_reads_our_lmdb(tmp_path, read):
    module = pytest.importorskip("cn_clip.training.data")
    evaluation = pytest.importorskip("cn_clip.eval.data")
    write_sample(tmp_path)
    build_lmdb(tmp_path, ["test"])
    theirs = module.LMDBDataset(str(tmp_path / "lmdb" / "test"), resolution=16, max_txt_length=12)
    assert (len(theirs), theirs.number_images) == (4, 3)
    samples = [theirs[i] for i in range(len(theirs))]
    del theirs  # an LMDB is opened once in a process
    to_encode = evaluation.EvalImgDataset(str(tmp_path / "lmdb" / "test" / "imgs"), 16)
    ids = [to_encode[i][0] for i in range(len(to_encode))]
    to_encode.env_imgs.close()
    ours = read("chinese", tmp_path)
    transform = module.LMDBDataset._build_transform(_NoAugment(), 16)
    place = {image_id: i for i, image_id in enumerate(ours.image_ids)}
    for (image, text, _), image_id, caption in zip(
        samples, [1000002, 517602, 517602, 517602], ["高级感托特包斜挎"] * 2 + ["“红色”的包", "红色的包"]
    ):
        assert torch.equal(image, transform(ours.images[place[image_id]]))
        assert torch.equal(text, module.tokenize([module._preprocess_text(caption)], context_length=12)[0])
    assert sorted(ids) == sorted(ours.image_ids)


class _NoAugment:
    split, use_augment = "val", False


@pytest.mark.parametrize("kept", [True, False])
def test_an_lmdb_of_chinese_clip_is_read(tmp_path, read, monkeypatch, kept):
    pytest.importorskip("cn_clip")
    write_sample(tmp_path)
    (tmp_path / "answers").mkdir()
    answered = [line for line in (tmp_path / "test_texts.jsonl").read_text().splitlines(True) if "[]" not in line]
    unanswered = '{"text_id": 1, "text": "一", "image_ids": []}\n'
    (tmp_path / "test_texts.jsonl").write_text("".join(answered) if kept else unanswered)
    from_files = content(read("chinese", tmp_path))
    monkeypatch.setattr(sys, "argv", ["build_lmdb_dataset.py", "--data_dir", str(tmp_path), "--splits", "test"])
    runpy.run_module("cn_clip.preprocess.build_lmdb_dataset", run_name="__main__")
    dataset = read("chinese", tmp_path)
    assert dataset.images.path == tmp_path / "lmdb" / "test" / "imgs"
    assert content(dataset) == from_files  # texts without an image come from the jsonl
    if kept:
        theirs = {part: entries(tmp_path / "lmdb" / "test" / part) for part in ("imgs", "pairs")}
        build_lmdb(tmp_path, ["test"], tmp_path / "ours")
        assert {part: entries(tmp_path / "ours" / "test" / part) for part in theirs} == theirs
