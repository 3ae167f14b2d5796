"""search.py index: only new and changed photographs are encoded, and nothing is lost when it is killed."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from clip_retrieval.run.folder import lock_folder
from clip_retrieval.search import update
from clip_retrieval.search.source import INDEX_FOLDER
from tests.conftest import ROOT, Killed
from tests.search.conftest import paint, read_entries

STRANGE = os.fsdecode(b"caf\xe9 \xff\n\xe5\x9b\xbe 1.jpg")


@pytest.fixture
def encoded(monkeypatch):
    """The names of the files that are encoded, in order."""
    from clip_retrieval.search import photos

    names = []
    normal = photos._Fetch._read
    monkeypatch.setattr(photos._Fetch, "_read", lambda self, name: names.append(name) or normal(self, name))
    return names


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    """The files of these tests are a second old, and count as settled."""
    monkeypatch.setattr(update, "SETTLED", -(10**9))


def test_features_equal_those_of_the_python_interface(indexed, models):
    from clip_retrieval.api import load_model

    model = load_model(models / "small.json", "cpu", pretrained=str(models / "a.pt"))
    _, features = read_entries(indexed)
    assert list(features) == ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "trip/4.png", "trip/5.png"]
    expected = model.encode_images([indexed / name for name in features]).numpy()
    np.testing.assert_allclose(np.stack(list(features.values())), expected, atol=1e-6)


def test_unchanged_folder_loads_no_model(indexed):
    before = {path: path.read_bytes() for path in (indexed / INDEX_FOLDER).iterdir()}
    code = (
        "import sys; sys.path.insert(0, 'scripts'); import search\n"
        f"sys.argv = ['search.py', 'index', {str(indexed)!r}]; search.main()\n"
        "print('torch' in sys.modules or 'open_clip' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("6 images in the index (no changes), 0 broken\nFalse\n"), done.stderr
    assert before == {path: path.read_bytes() for path in (indexed / INDEX_FOLDER).iterdir()}


def test_only_new_and_changed_files_are_encoded(indexed, index, encoded):
    _, before = read_entries(indexed)
    paint(indexed / "1.jpg", 100)
    paint(indexed / "new.jpg", 101)
    (indexed / "2.jpg").unlink()
    code, out, err = index()
    assert code == 0 and "6 images in the index (1 new, 1 changed, 1 deleted)" in out, err
    assert sorted(encoded) == ["1.jpg", "new.jpg"]
    entries, after = read_entries(indexed)
    assert sorted(entries) == ["0.jpg", "1.jpg", "3.jpg", "new.jpg", "trip/4.png", "trip/5.png"]
    assert not np.array_equal(after["1.jpg"], before["1.jpg"])
    for name in ("0.jpg", "3.jpg", "trip/4.png", "trip/5.png"):
        assert np.array_equal(after[name], before[name]), name


def test_renamed_copied_and_touched_files_are_not_encoded(indexed, index, encoded):
    _, before = read_entries(indexed)
    (indexed / "0.jpg").rename(indexed / "trip" / "renamed.jpg")
    shutil.copyfile(indexed / "1.jpg", indexed / "copy.jpg")
    os.utime(indexed / "2.jpg", ns=(1, 1))
    code, out, err = index()
    assert code == 0 and "(2 renamed or copied, 1 deleted)" in out and encoded == [], err
    entries, after = read_entries(indexed)
    assert np.array_equal(after["trip/renamed.jpg"], before["0.jpg"])
    assert np.array_equal(after["copy.jpg"], before["1.jpg"]) and np.array_equal(after["1.jpg"], before["1.jpg"])
    assert entries["2.jpg"]["mtime"] == 1 and "0.jpg" not in entries


def test_swapped_files_swap_their_features(indexed, index, encoded):
    _, before = read_entries(indexed)
    for old, new in (("0.jpg", "x"), ("1.jpg", "0.jpg"), ("x", "1.jpg")):
        (indexed / old).rename(indexed / new)
    assert index()[0] == 0 and encoded == []
    _, after = read_entries(indexed)
    assert np.array_equal(after["0.jpg"], before["1.jpg"]) and np.array_equal(after["1.jpg"], before["0.jpg"])


def test_change_of_equal_size_and_time_in_a_young_file_is_seen(photos, index, monkeypatch):
    monkeypatch.setattr(update, "SETTLED", 60 * 10**9)
    paint(photos / "young.bmp", 1)
    stamp = (photos / "young.bmp").stat()
    assert index()[0] == 0
    _, before = read_entries(photos)
    paint(photos / "young.bmp", 2)
    os.utime(photos / "young.bmp", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    code, out, _ = index()
    assert code == 0 and "1 changed" in out
    assert not np.array_equal(read_entries(photos)[1]["young.bmp"], before["young.bmp"])


def test_broken_files_are_listed_remembered_and_repaired(indexed, index, encoded):
    (indexed / "broken.jpg").write_bytes((indexed / "0.jpg").read_bytes()[:200])
    (indexed / "notes.jpg").write_text("no image")
    code, out, err = index()
    assert code == 0 and "6 images in the index (2 new), 2 broken" in out
    assert "broken.jpg: not a readable image" in err and "notes.jpg: not a readable image" in err
    encoded.clear()
    code, out, err = index()
    assert code == 0 and encoded == [] and "broken.jpg" in err and "2 broken" in out
    paint(indexed / "broken.jpg", 7)
    code, out, _ = index()
    assert encoded == ["broken.jpg"] and "7 images in the index (1 changed), 1 broken" in out


def test_file_that_cannot_be_opened_is_tried_again(photos, index, monkeypatch, encoded):
    from clip_retrieval.errors import UserError
    from clip_retrieval.search import photos as loading

    def refuse(path):
        raise UserError(f"{path}: not a readable image (Permission denied)")

    with monkeypatch.context() as patched:
        patched.setattr(loading, "read_encoded", refuse)
        assert "0 images in the index (6 new), 6 broken" in index()[1]
    encoded.clear()
    assert "6 images in the index (no changes), 0 broken" in index()[1] and len(encoded) == 6


def test_young_file_that_cannot_be_opened_is_listed(photos, index, monkeypatch):
    monkeypatch.setattr(update, "SETTLED", 10**12)
    os.mkfifo(photos / "pipe.jpg")
    for _ in range(2):
        code, out, err = index()
        assert code == 0 and "6 images in the index" in out and "1 broken" in out
        assert "pipe.jpg: not a readable image" in err


def test_work_before_a_kill_is_kept(photos, index, monkeypatch, encoded):
    monkeypatch.setattr(update, "SAVE_SECONDS", 0)
    normal, calls = update.write_table, []

    def write(*arguments):
        calls.append(1)
        if len(calls) > 2:
            raise Killed
        return normal(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(update, "write_table", write)
        with pytest.raises(Killed):
            index("--eval_batch_size", 2)
    assert len(encoded) >= 4 and not (photos / INDEX_FOLDER / "index.jsonl").exists()
    encoded.clear()
    code, out, _ = index()
    assert code == 0 and "6 images in the index (2 new)" in out and len(encoded) == 2
    folder = photos / INDEX_FOLDER
    assert sorted(path.name for path in folder.iterdir()) == ["index-features-4.npy", "index.jsonl"]
    assert len(read_entries(photos)[1]) == 6


def test_kill_while_the_index_is_replaced_keeps_the_old_one(indexed, index, monkeypatch, encoded, script):
    paint(indexed / "new.jpg", 9)
    with monkeypatch.context() as patched:
        patched.setattr(update, "copy_features", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            index()
    assert script("search", "a red thing", indexed)[0] == 0 and len(read_entries(indexed)[1]) == 6
    encoded.clear()
    assert "7 images in the index (no changes)" in index()[1] and encoded == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_signal_saves_and_the_next_run_continues(photos, index, monkeypatch, encoded, number):
    from clip_retrieval.search.encoder import Encoder

    normal = Encoder.encode_pixels
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        with monkeypatch.context() as patched:
            patched.setattr(Encoder, "encode_pixels", lambda *inputs: signal.raise_signal(number) or normal(*inputs))
            code, _, err = index("--eval_batch_size", 2)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert code == 130 and "interrupted after 2 images, saved; repeat the command to continue" in err
    encoded.clear()
    code, out, _ = index()
    assert code == 0 and "4 images to encode" in out and len(encoded) == 4 and len(read_entries(photos)[1]) == 6


def test_index_of_another_model_is_refused_or_replaced(indexed, script, models):
    other = ("--vision_model", models / "small.json", "--pretrained", models / "b.pt", "--device", "cpu")
    _, before = read_entries(indexed)
    code, _, err = script("search", "index", indexed, *other)
    assert code == 2 and "an index of another model" in err and err.count("\n") == 1
    code, out, err = script("search", "index", indexed, *other, "--overwrite", "--num_workers", 0)
    assert code == 0 and "6 images in the index (6 new)" in out, err
    assert not np.array_equal(read_entries(indexed)[1]["0.jpg"], before["0.jpg"])


def test_two_updates_at_once_are_refused(indexed, model):
    code = (
        "import sys; sys.path.insert(0, 'scripts'); import search; from clip_retrieval.errors import run_with_exit_code"
    )
    code += "; sys.exit(run_with_exit_code(search.main))"
    with lock_folder(indexed / INDEX_FOLDER):
        command = [sys.executable, "-c", code, "index", indexed]
        done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "is in use by another run" in done.stderr and "--index" in done.stderr


def test_strange_names_links_and_clutter(photos, index, script):
    paint(photos / STRANGE, 20)
    paint(photos / " a b " / "図.jpg", 21)
    for name in ("@eaDir/thumb.jpg", ".hidden/h.jpg", "._0.jpg"):
        paint(photos / name, 22)
    (photos / "loop").symlink_to(photos)
    (photos / "trip" / "up").symlink_to("..")
    (photos / "dangling.jpg").symlink_to("nowhere.jpg")
    (photos / "notes.txt").write_text("text")
    code, out, err = index()
    assert code == 0 and "8 images in the index (8 new), 0 broken; 1 other file ignored" in out, err
    code, out, err = script("search", "a", photos, "--json", "--top_k", 100)
    assert code == 0, err
    names = {result["name"] for result in json.loads(out)["results"]}
    assert f"{photos!s}/caf\\udce9 \\udcff\\n" in script("search", "a", photos)[1]
    assert names >= {STRANGE, " a b /図.jpg", "trip/4.png"} and len(names) == 8


def test_empty_folder_keeps_the_index(indexed, index, tmp_path):
    (indexed / INDEX_FOLDER).rename(tmp_path / "kept")
    for path in indexed.rglob("*.*"):
        path.unlink()
    code, _, err = index("--index", tmp_path / "kept")
    assert code == 2 and "holds no images; is its drive connected?" in err
    assert len((tmp_path / "kept" / "index.jsonl").read_text().splitlines()) == 7


def test_photographs_of_an_unreadable_folder_stay(indexed, index, monkeypatch):
    normal = os.scandir

    def scandir(path):
        if str(path).endswith("trip"):
            raise PermissionError(13, "Permission denied", str(path))
        return normal(path)

    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", scandir)
        code, out, err = index()
    assert code == 0 and "6 images in the index (no changes)" in out and "Permission denied" in err


def test_read_only_photographs_name_the_option(photos, index, tmp_path):
    (photos / INDEX_FOLDER).write_text("in the way")
    code, _, err = index()
    assert code == 2 and "cannot be written" in err and "--index" in err
    code, _, err = index("--index", tmp_path / "elsewhere")
    assert code == 0 and (tmp_path / "elsewhere" / "index.jsonl").is_file(), err


@pytest.mark.parametrize(
    "line",
    [
        '{"name": "../secret.jpg", "width": 1, "height": 1}',
        '{"name": "/etc/x.jpg", "width": 1, "height": 1}',
        '{"name": "x.jpg", "width": 0, "height": 1}',
        '{"name": "x.jpg", "width": 1, "height": 1, "size": "1"}',
        '{"name": 3}',
        "[]",
    ],
)
def test_hostile_index_is_refused_with_its_line(indexed, script, line):
    path = indexed / INDEX_FOLDER / "index.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], line, *lines[4:]]) + "\n")
    for command in (("a", indexed), ("index", indexed)):
        code, _, err = script("search", *command)
        assert code == 2 and "index.jsonl, line 4" in err and err.count("\n") == 1
        assert "delete the file and index the folder again" in err
    path.write_text("\n".join(lines[:4]) + "\n")
    code, _, err = script("search", "a", indexed)
    assert code == 2 and "not the features of index.jsonl" in err


@pytest.mark.parametrize("content", ["", "{}", '{"version": 1}', '{"version": 1, "model": {}, "features": "../a.npy"}'])
def test_file_that_is_no_index_is_refused(indexed, script, content):
    (indexed / INDEX_FOLDER / "index.jsonl").write_text(content)
    for command in (("a", indexed), ("index", indexed)):
        code, _, err = script("search", *command)
        assert code == 2 and "not an index of search.py" in err


@pytest.mark.parametrize(
    "options", [{"vision_model": 3}, {"resume": ["x"]}, {"config": "x.yaml"}, {"image_size": "1"}, {}, []]
)
def test_hostile_model_of_an_index_is_refused(indexed, script, options):
    path = indexed / INDEX_FOLDER / "index.jsonl"
    head, *entries = path.read_text().splitlines()
    content = json.loads(head)
    content["model"]["source"]["options"] = options
    path.write_text("\n".join([json.dumps(content), *entries]) + "\n")
    code, _, err = script("search", "a", indexed)
    assert code == 2 and "does not name its model" in err and err.count("\n") == 1


def test_features_of_another_index_are_refused(indexed, script):
    features = next((indexed / INDEX_FOLDER).glob("*.npy"))
    np.save(features, np.load(features)[:-1])
    code, _, err = script("search", "a", indexed)
    assert code == 2 and "not the features of index.jsonl" in err
    features.unlink()
    code, _, err = script("search", "index", indexed)
    assert code == 2 and "missing; delete index.jsonl, too, and index the folder again" in err


def test_missing_model_and_checkpoint_are_named(photos, script, models, tmp_path):
    code, _, err = script("search", "index", photos)
    assert code == 2 and "--resume CKPT" in err
    code, _, err = script("search", "index", photos, "--resume", tmp_path / "none.pt")
    assert code == 2 and "none.pt: no such checkpoint" in err


def test_index_keeps_the_sizes_of_its_model(photos, script, model):
    """Height and width, and the number of kept positions, are read again from the index."""
    sizes = ("--image_size", 48, 32, "--context_length", 24, "--keep_positions", 4)
    code, _, err = script("search", "index", photos, *model, *sizes, "--num_workers", 0)
    assert code == 0, err
    paint(photos / "new.jpg", 9)
    code, out, err = script("search", "index", photos, "--device", "cpu", "--num_workers", 0)
    assert code == 0 and "1 new" in out, err
    code, out, err = script("search", "index", photos, *model, *sizes)
    assert code == 0 and "no changes" in out and "loading torch" not in out, err
    code, out, err = script("search", "a house", photos, "--device", "cpu", "--top_k", 1)
    assert code == 0 and len(out.splitlines()) == 1, err
