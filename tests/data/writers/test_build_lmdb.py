"""scripts/build_lmdb.py: Chinese-CLIP's LMDB folders, whole or not there; nothing but plain values read from them."""

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
def said(caplog, monkeypatch):
    """said() is what was logged since it was last called."""
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


# What is built


def test_the_layout_is_chinese_clips(tmp_path):
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
    assert len(pairs) == 5, "one more, of ours: the text that no image answers"
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


def test_the_map_grows_with_what_is_in_it(tmp_path, read, monkeypatch):
    monkeypatch.setattr(building, "MAP_BYTES", 2**14)
    monkeypatch.setattr(building, "COMMIT_BYTES", 5000)
    write(tmp_path, images=24)
    build_lmdb(tmp_path, ["train"])
    size = (tmp_path / "train_imgs.tsv").stat().st_size
    imgs = tmp_path / "lmdb" / "train" / "imgs"
    assert size > 1.5 * 2**14
    data = (imgs / "data.mdb").read_bytes()
    assert 2**14 < int.from_bytes(data[32:40], sys.byteorder) < 6 * size, "the size of the map, as the file says it"
    assert len(data) < 4 * size
    files = read("chinese", "nowhere", "train", train_data=tmp_path / "train")
    assert content(read("chinese", tmp_path, "train")) == content(files)


# Interrupted, repeated, shared


def killed_after(monkeypatch, records, folder):
    """Build in a process that is killed at that many images."""

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


def count_reads(monkeypatch):
    seen = []

    def read_and_note(*arguments):
        for record in read_tsv(*arguments):
            seen.append(record.key)
            yield record

    monkeypatch.setattr(building, "read_tsv", read_and_note)
    return seen


@pytest.mark.parametrize("killed", [0, 1, 7, 11])
def test_a_killed_build_is_gone_on_with(tmp_path, monkeypatch, said, killed):
    monkeypatch.setattr(building, "COMMIT_BYTES", 1)
    write(tmp_path)
    killed_after(monkeypatch, killed, tmp_path)
    assert names(tmp_path / "lmdb") == [".train.partial"]
    seen = count_reads(monkeypatch)
    build_lmdb(tmp_path, ["train"])
    assert seen == [str(i) for i in range(killed, IMAGES)]
    assert not killed or f"{killed} images are there" in said()[0]
    assert names(tmp_path / "lmdb") == ["train"]
    whole = write(tmp_path / "whole")
    build_lmdb(whole, ["train"])
    for part in ("imgs", "pairs"):
        assert entries(tmp_path / "lmdb/train" / part) == entries(whole / "lmdb/train" / part)


def test_a_killed_build_of_other_images_is_begun_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(building, "COMMIT_BYTES", 1)
    write(tmp_path)
    killed_after(monkeypatch, 7, tmp_path)
    write(tmp_path, images=4)
    seen = count_reads(monkeypatch)
    build_lmdb(tmp_path, ["train"])
    assert len(seen) == 4 and len(entries(tmp_path / "lmdb/train/imgs")) == 5


def test_images_that_are_done_are_not_copied_again_when_a_text_is_mended(tmp_path, monkeypatch):
    write_split(tmp_path, "train", {1: photo(1)}, [(1, "a", [1]), (2, "b", [3])])
    with pytest.raises(UserError, match=r"train_texts.jsonl, line 2: there is no image 3 in .*train_imgs.tsv"):
        build_lmdb(tmp_path, ["train"])
    lines = (tmp_path / "train_texts.jsonl").read_text()
    (tmp_path / "train_texts.jsonl").write_text(lines.replace("[3]", "[1]"))
    seen = count_reads(monkeypatch)
    build_lmdb(tmp_path, ["train"])
    assert seen == [] and entries(tmp_path / "lmdb/train/pairs")[b"1"] == (1, 2, "b")


def test_what_is_up_to_date_is_left_alone_and_what_is_not_is_replaced(tmp_path, monkeypatch, said, read):
    write(tmp_path)
    build_lmdb(tmp_path, ["train"])
    said(), count_reads(monkeypatch)
    build_lmdb(tmp_path, ["train"])
    assert said() == [f"{tmp_path / 'lmdb/train'} is up to date"]
    write(tmp_path, images=3)
    build_lmdb(tmp_path, ["train"])
    assert len(read("chinese", tmp_path, "train").images) == 3 and names(tmp_path / "lmdb") == ["train"]


def test_an_old_lmdb_stays_when_the_new_one_fails(tmp_path, read):
    write(tmp_path)
    build_lmdb(tmp_path, ["train"])
    before = content(read("chinese", tmp_path, "train"))
    with (tmp_path / "train_imgs.tsv").open("a") as file:
        file.write("glued\tAAAA\tBBBB\n")
    with pytest.raises(UserError, match=f"train_imgs.tsv, line {IMAGES + 1}: several records"):
        build_lmdb(tmp_path, ["train"])
    assert content(read("chinese", tmp_path, "train")) == before


def test_two_builds_at_once_are_refused(tmp_path, monkeypatch):
    write(tmp_path)
    with (
        building._alone(tmp_path / "lmdb" / ".train.partial"),
        pytest.raises(UserError, match="another process is building it"),
    ):
        build_lmdb(tmp_path, ["train"])
    build_lmdb(tmp_path, ["train"])


def test_a_full_disk_keeps_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(building, "COMMIT_BYTES", 1)
    write(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        with pytest.raises(RunError, match="the same command goes on") as error:
            build_lmdb(tmp_path, ["train"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    seen = count_reads(monkeypatch)
    build_lmdb(tmp_path, ["train"])
    assert 0 < len(seen) < IMAGES and len(entries(tmp_path / "lmdb/train/imgs")) == IMAGES + 1


# What is wrong with the input


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("num_images\tAAAA", "no LMDB can hold the image id num_images"),
        ("x" * 600 + "\tAAAA", "no LMDB can hold the image id xxx"),
        ("1\tAAAA", "image 1 is there already"),
    ],
)
@pytest.mark.parametrize("commit_bytes", [1, 2**20])
def test_images_that_cannot_stand_in_an_lmdb(tmp_path, monkeypatch, line, says, commit_bytes):
    monkeypatch.setattr(building, "COMMIT_BYTES", commit_bytes)
    write_split(tmp_path, "train", {1: photo(1)}, [(1, "a", [1])])
    with (tmp_path / "train_imgs.tsv").open("a") as file:
        file.write(line + "\n")
    for _ in range(2):  # also when it is gone on with
        with pytest.raises(UserError, match=f"train_imgs.tsv, line 2: {says}") as error:
            build_lmdb(tmp_path, ["train"])
        assert "\n" not in str(error.value)


def test_nothing_is_copied_before_the_texts_are_known_to_be_well_formed(tmp_path):
    write(tmp_path)
    with (tmp_path / "train_texts.jsonl").open("a") as file:
        file.write("{]\n")
    with pytest.raises(UserError, match=f"train_texts.jsonl, line {2 * IMAGES + 1}: broken JSON"):
        build_lmdb(tmp_path, ["train"])
    assert not (tmp_path / "lmdb").exists()


def test_missing_files_are_named_before_any_split_is_built(tmp_path):
    write(tmp_path)
    with pytest.raises(UserError, match=r"valid_imgs.tsv: no such file; check --data_dir and --splits"):
        build_lmdb(tmp_path, ["train", "valid"])
    assert not (tmp_path / "lmdb").exists()


def test_a_folder_with_other_things_in_it_is_not_replaced(tmp_path):
    write(tmp_path)
    (tmp_path / "lmdb" / "train" / "mine").mkdir(parents=True)
    with pytest.raises(UserError, match=r"holds more than an LMDB \(mine\); choose another --lmdb_dir"):
        build_lmdb(tmp_path, ["train"])


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    write(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/\.train\.partial: cannot be written"):
        build_lmdb(tmp_path, ["train"], tmp_path / "file")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["lock", "sources.json"])
@pytest.mark.parametrize("kind", ["fifo", "link", "dangling"])
def test_a_build_follows_no_link_and_waits_for_no_fifo(tmp_path, name, kind):
    write(tmp_path)
    (tmp_path / "precious").write_text("precious")
    path = tmp_path / "lmdb" / ".train.partial" / name
    path.parent.mkdir(parents=True)
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / ("precious" if kind == "link" else "gone"))
    try:
        build_lmdb(tmp_path, ["train"])
        assert names(tmp_path / "lmdb/train") == ["imgs", "pairs", "sources.json"]
    except UserError as error:
        assert name == "lock" and str(path.parent) in str(error)
    assert (tmp_path / "precious").read_text() == "precious" and not (tmp_path / "gone").exists()


# What is wrong with an LMDB


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
def test_a_pickle_that_would_run_code_does_not(tmp_path, built, read, protocol):
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
def test_anything_but_ids_and_a_text_is_refused(tmp_path, built, read, value):
    put(built / "pairs", b"1", value)
    fails(read, tmp_path, built / "pairs", "key 1: ")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_pairs_of_every_protocol_are_read(tmp_path, built, read, protocol):
    for key, pair in enumerate([(1000002, "x", "文"), ("1000002", 2**62, "本"), (517602, -1, "")]):
        put(built / "pairs", str(key).encode(), pickle.dumps(pair, protocol))
    assert read("chinese", tmp_path).captions[:3] == ["文", "本", ""]


def test_an_lmdb_that_is_not_whole(tmp_path, built, read):
    for part, key, says in [
        ("pairs", b"2", "key 2: missing"),
        ("pairs", b"num_samples", "no num_samples"),
        ("imgs", b"517602", "key 1: there is no image 517602"),
        ("imgs", b"num_images", "no num_images"),
    ]:
        shutil.copytree(built, tmp_path / "kept", dirs_exist_ok=True)
        put(built / part, key, None)
        fails(read, tmp_path, built / ("pairs" if part == "pairs" or key == b"517602" else "imgs"), says)
        shutil.rmtree(built)
        (tmp_path / "kept").rename(built)


@pytest.mark.parametrize("part", ["imgs", "pairs"])
def test_files_that_are_no_lmdb(tmp_path, built, read, part):
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


def test_chinese_clip_reads_ours(tmp_path, read):
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
def test_ours_reads_what_chinese_clip_writes(tmp_path, read, monkeypatch, kept):
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
    assert content(dataset) == from_files  # texts that no image answers are found in the jsonl
    if kept:
        theirs = {part: entries(tmp_path / "lmdb" / "test" / part) for part in ("imgs", "pairs")}
        build_lmdb(tmp_path, ["test"], tmp_path / "ours")
        assert {part: entries(tmp_path / "ours" / "test" / part) for part in theirs} == theirs
