import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clip_retrieval.classification.folder import list_class_folders, list_images
from clip_retrieval.classification.labelled_sets import ZeroShotData, read_labelled
from clip_retrieval.errors import UserError
from clip_retrieval.log import start_log
from tests.classification.conftest import paint


def read(folder, **options):
    return read_labelled(ZeroShotData(str(folder), **options))[0]


def test_each_folder_is_a_class_in_sorted_order(colours):
    labelled = read(colours)
    assert (labelled.name, labelled.class_names) == ("colours", ["blue", "green", "red"])
    assert labelled.labels.tolist() == [0, 0, 1, 1, 2, 2, 2, 2] and labelled.labels.dtype == np.int64
    assert [labelled.images.name(row).split("colours")[1] for row in (1, 7)] == ["/blue/1.png", "/red/3.png"]


def test_numbered_folders_are_sorted_by_value(tmp_path):
    for number in (10, 9, 0):
        paint(tmp_path / str(number) / "a.png", "red")
    assert list_class_folders(tmp_path) == ["0", "9", "10"]
    paint(tmp_path / "x" / "a.png", "red")
    assert list_class_folders(tmp_path) == ["0", "10", "9", "x"]


def test_all_image_modes_are_read_as_rgb(tmp_path):
    kinds = {"L": "0.png", "P": "1.png", "CMYK": "2.JPG", "I;16": "3.tif", "RGBA": "4.webp", "1": "5.gif"}
    for mode, name in kinds.items():
        path = tmp_path / "data" / "deep_er" / "below" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, (8, 6)).save(path)
    labelled = read(tmp_path / "data")
    assert len(labelled.images) == len(kinds) and labelled.class_names == ["deep er"]
    assert all(labelled.images[row].mode == "RGB" for row in range(len(kinds)))


def test_other_files_are_skipped_and_logged(colours, capsys):
    for name in ("data.bin", "notes.txt", "Thumbs.db", ".DS_Store", "._0.png", "desktop.ini"):
        (colours / "red" / name).write_text("x")
    for name in (".git", "@eaDir", "#recycle", "__MACOSX", ".ipynb_checkpoints", "$RECYCLE.BIN", "lost+found"):
        paint(colours / name / "0.png", "red")
        paint(colours / "red" / name / "0.png", "red")
    (colours / "README.md").write_text("x")
    start_log()
    labelled = read(colours)
    assert len(labelled.images) == 8 and len(labelled.class_names) == 3
    names = ", ".join(str(colours / "red" / name) for name in ("data.bin", "notes.txt"))
    assert f"skipped files without an image suffix: {names}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "scored"), [(("train", "val"), "val"), (("train", "Test", "valid"), "Test"), (("train",), "train")]
)
def test_a_root_of_splits_is_recognised(tmp_path, colours, names, scored):
    root = tmp_path / "root"
    for name in names:
        shutil.copytree(colours, root / name)
    (root / "@eaDir").mkdir()
    labelled = read(root)
    assert labelled.class_names == ["blue", "green", "red"] and labelled.place == root / scored


def test_classes_may_have_the_names_of_splits(tmp_path, colours):
    root = tmp_path / "root"
    paint(root / "train" / "0.png", "red")
    paint(root / "test" / "0.png", "red")
    assert read(root).class_names == ["test", "train"]
    shutil.copytree(colours, root / "train" / "deep")
    paint(root / "bus" / "0.png", "red")
    assert read(root).class_names == ["bus", "test", "train"]


def test_list_images_without_subfolders(colours):
    paint(colours / "a.png", "red")
    images, others = list_images(colours, recursive=False)
    assert [path.name for path in images] == ["a.png"] and others == []


def test_class_names_from_a_file_and_classes_without_folder(colours, tmp_path, capsys):
    file = tmp_path / "names.csv"
    file.write_text("red,Rot\nblack,Schwarz\nblue,Blau\ngreen,Grün\n", encoding="utf-8")
    assert read(colours, class_names=file).class_names == ["Blau", "Grün", "Rot"]
    start_log()
    labelled = read(colours, class_names=file, all_classes=True)
    assert f"{colours}: further candidates: 1 class without a folder" in capsys.readouterr().out
    assert labelled.class_names == ["Schwarz", "Blau", "Grün", "Rot"]
    assert labelled.labels.tolist() == [1, 1, 2, 2, 3, 3, 3, 3]


def test_imagenet_folders_need_no_class_names_file(tmp_path):
    for folder in ("n01443537", "n01440764"):
        paint(tmp_path / folder / "a.JPEG", "red")
    labelled, templates = read_labelled(ZeroShotData("imagenet", tmp_path))
    assert (labelled.name, labelled.class_names, templates.name) == ("imagenet", ["tench", "goldfish"], "imagenet")
    everything, _ = read_labelled(ZeroShotData("imagenet", tmp_path, all_classes=True))
    assert len(everything.class_names) == 1000 and everything.labels.tolist() == [0, 1]
    (tmp_path / "names.txt").write_text("丁鲷\n金鱼\n", encoding="utf-8")
    labelled, templates = read_labelled(ZeroShotData("imagenet", tmp_path, class_names=tmp_path / "names.txt"))
    assert (labelled.class_names, templates.name) == (["丁鲷", "金鱼"], "chinese")


def test_folder_of_imagenet_ids_gets_names_and_a_subset_is_logged(tmp_path, capsys):
    for folder in ("n01443537", "n01440764"):
        paint(tmp_path / folder / "a.JPEG", "red")
    start_log()
    assert read(tmp_path).class_names == ["tench", "goldfish"]
    assert "the folders are ImageNet's ids" in capsys.readouterr().out
    read_labelled(ZeroShotData("imagenet", tmp_path))
    assert "holds 2 of ImageNet's 1,000 classes" in capsys.readouterr().err
    paint(tmp_path / "n00000000" / "a.JPEG", "red")
    assert read(tmp_path).class_names == ["n00000000", "n01440764", "n01443537"]


def test_link_cycles_list_no_image_twice(colours):
    (colours / "red" / "loop").symlink_to(colours / "red")
    (colours / "blue" / "up").symlink_to(colours)
    assert len(list_images(colours / "red")[0]) == 4
    found = list_images(colours / "blue")[0]
    assert len({path.resolve() for path in found}) == len(found) == 8
    (colours / "green" / "a").mkdir()
    (colours / "green" / "b").symlink_to(colours / "green" / "a")
    paint(colours / "green" / "a" / "2.png", "green")
    assert len(list_images(colours / "green")[0]) == 3


def test_classes_with_the_same_name_stay_separate(tmp_path):
    for folder in ("n04008634", "n03773504"):
        paint(tmp_path / folder / "a.png", "red")
    labelled, _ = read_labelled(ZeroShotData("imagenet", tmp_path))
    assert labelled.class_names == ["missile", "missile"] and labelled.labels.tolist() == [0, 1]


def test_empty_folder_and_empty_class_are_errors(colours, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: holds no folders"):
        read(tmp_path / "empty")
    (colours / "yellow").mkdir()
    with pytest.raises(UserError, match="yellow: holds no images"):
        read(colours)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"data": "nowhere"}, ["nowhere: no such folder", "cifar10"]),
        ({"data": "imagenet", "data_root": Path("nowhere")}, ["nowhere: no such folder"]),
        ({"data": "colours/red/0.png"}, ["0.png: a file"]),
        ({"data": "colours", "class_names": Path("two.txt")}, ["two.txt", "names 2 classes", "there are 3"]),
        ({"data": "colours", "class_names": Path("lacks.txt")}, ["colours/green", "no name"]),
        ({"data": "colours", "all_classes": True}, ["--all_classes", "--class_names"]),
        ({"data": "colours", "download": True}, ["--download", "colours"]),
        ({"data": "imagenet", "data_root": Path("colours")}, ['"blue"', "--class_names"]),
    ],
)
def test_bad_input_is_one_line(colours, tmp_path, monkeypatch, options, words):
    (tmp_path / "two.txt").write_text("a\nb\n")
    (tmp_path / "lacks.txt").write_text("red,Rot\nblue,Blau\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        read_labelled(ZeroShotData(**options))
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_imagenet_in_a_subfolder_of_the_root(tmp_path):
    paint(tmp_path / "imagenet" / "n01440764" / "a.png", "red")
    labelled, _ = read_labelled(ZeroShotData("imagenet", tmp_path))
    assert (labelled.class_names, labelled.place) == (["tench"], tmp_path / "imagenet")
