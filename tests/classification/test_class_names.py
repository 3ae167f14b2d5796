import contextlib
import json
import os
import time
from pathlib import Path

import pytest

from clip_retrieval.classification.class_names import (
    imagenet_folder_names,
    imagenet_names,
    read_class_names,
    read_names,
)
from clip_retrieval.errors import UserError

FOLDERS = ["n01", "n02", "n03"]


@pytest.mark.parametrize(
    "content, names",
    [
        ("tench\ngreat white_shark\n\nhen, a bird\n", ["tench", "great white shark", "hen, a bird"]),
        ("n01\ttench\nn02\tgreat white shark\nn03\then, a bird", ["tench", "great white shark", "hen, a bird"]),
        ("n03, hen\nn01,tench\nn02, shark\n", ["tench", "shark", "hen"]),
        ("n01 tench, Tinca tinca\nn02 shark\nn03 hen", ["tench, Tinca tinca", "shark", "hen"]),
        ("folder,name\nn03, hen\nn01,tench\nn02, shark\n", ["tench", "shark", "hen"]),
        ("wnid\tlabel\tname\nn01\t1\ttench\nn02\t2\tshark\nn03\t3\then\n", ["tench", "shark", "hen"]),
        ("n02 2 great_white\nn01 1 tench\nn03 3 hen\n", ["tench", "great white", "hen"]),
        ("n01 7 dwarfs\nn02 shark\nn03 hen\n", ["7 dwarfs", "shark", "hen"]),
        ("苹果\n狗\n一只猫\n", ["苹果", "狗", "一只猫"]),
        ("\ufeffn01,苹果\nn02,狗\nn03,猫", ["苹果", "狗", "猫"]),
        ("n01，苹果\nn02，狗\nn03，猫", ["苹果", "狗", "猫"]),
        ("n01: tench\nn02: great white: shark\nn03: hen\n", ["tench", "great white: shark", "hen"]),
        ("n01;tench\nn02;shark\nn03;hen\n", ["tench", "shark", "hen"]),
        (
            '"wnid","name"\n"n01","tench, Tinca tinca"\n"n02","shark"\n"n03","hen"\n',
            ["tench, Tinca tinca", "shark", "hen"],
        ),
        ('n01,"tench, Tinca tinca"\nn02,shark\nn03,hen\n', ["tench, Tinca tinca", "shark", "hen"]),
        ("folder,name,count\nn01,tench,50\nn02,shark,50\nn03,hen,50\n", ["tench", "shark", "hen"]),
        ("idx,wnid,words\n0,n01,tench\n1,n02,shark\n2,n03,hen\n", ["tench", "shark", "hen"]),
        ('"n01";"tench"\n"n02";"shark"\n"n03";"hen"\n', ["tench", "shark", "hen"]),
        ("id,wnid,label\n0,n01,tench\n1,n02,shark\n2,n03,hen\n", ["tench", "shark", "hen"]),
        ("0 tench\n1 shark\n2 hen\n", ["tench", "shark", "hen"]),
        ("1. tench\n2. shark\n3. hen\n", ["tench", "shark", "hen"]),
        (f"{'1' * 5000} a\n2 b\n3 c\n", [f"{'1' * 5000} a", "2 b", "3 c"]),
        ("n03\nn01\nn02\n", ["n01", "n02", "n03"]),
    ],
)
def test_text_files_with_lists_or_mappings(tmp_path, content, names):
    (tmp_path / "names.txt").write_text(content, encoding="utf-8")
    found = read_class_names(tmp_path / "names.txt", FOLDERS)
    assert [found[folder] for folder in FOLDERS] == names


@pytest.mark.parametrize(
    "content",
    [
        ["tench", "white_shark", "hen"],
        {"n03": "hen", "n01": "tench", "n02": "white shark"},
        {"0": ["n01", "tench"], "1": ["n02", "white_shark"], "2": ["n03", "hen"]},
    ],
)
def test_json_files_with_lists_or_mappings(tmp_path, content):
    (tmp_path / "names.json").write_text(json.dumps(content))
    found = read_class_names(tmp_path / "names.json", FOLDERS)
    assert [found[folder] for folder in FOLDERS] == ["tench", "white shark", "hen"]
    values = content.values() if isinstance(content, dict) else content
    expected = [(value if isinstance(value, str) else value[1]).replace("_", " ") for value in values]
    assert read_names(tmp_path / "names.json") == expected


def test_names_that_start_with_a_folder_are_a_list(tmp_path):
    (tmp_path / "names.txt").write_text("great white\ntiger\ntiger shark\n")
    folders = ["great_white", "tiger", "tiger_shark"]
    assert list(read_class_names(tmp_path / "names.txt", folders).values()) == ["great white", "tiger", "tiger shark"]


def test_mapping_may_name_further_folders(tmp_path):
    (tmp_path / "names.txt").write_text("".join(f"n{number:02} class number_{number}\n" for number in range(50)))
    found = read_class_names(tmp_path / "names.txt", FOLDERS)
    assert len(found) == 50 and found["n02"] == "class number 2"


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("n.txt", "tench\nshark\n", ["names 2 classes", "there are 3", "n01, n02, n03"]),
        ("n.json", '["a", "b", "c", "d"]', ["names 4 classes", "there are 3"]),
        ("n.txt", "n01,tench\nn02\nn03,hen\n", ["n.txt, line 2", '"n02"']),
        ("n.txt", "n01,tench\nn01,shark\nn02,hen\n", ["n.txt, line 2", "another name"]),
        ("n.txt", "\n", ["n.txt", "no classes"]),
        ("n.txt", "{0: 'tench',\n 1: 'shark',\n 2: 'hen'}\n", ["n.txt", "is not a class name"]),
        ("n.txt", "1 n01 tench\n2 n02 shark\n3 n03 hen\n", ["n.txt", "seems to hold folder and name"]),
        ("n.csv", "folder,index,count\nn01,0,5\nn02,1,5\nn03,2,5\n", ["folder, index, count", "is called name"]),
        ("n.csv", '"tench",\n"shark",\n"hen"\n', ["is not a class name"]),
        ("n.csv", f'a,"{"x" * 200000}\n', ["names 1 class,"]),
        ("n.json", '{"n01": ["tench", "Tinca tinca"]}', ["n.json", "JSON list"]),
        ("n.csv", "index,folder,name\n0,n01,tench\n1\n2,n03,hen\n", ["n.csv, line 3", "no name"]),
        ("n.json", "[1, 2, 3]", ["n.json", "JSON list"]),
        ("n.json", '"tench"', ["n.json", "JSON list"]),
        ("n.json", "{", ["n.json, line 1", "broken JSON"]),
    ],
)
def test_bad_file_is_one_line(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as error:
        read_class_names(tmp_path / name, FOLDERS)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_imagenet_names_by_wordnet_id_or_number():
    names = imagenet_names()
    assert len(names) == 1000 and list(names) == sorted(names)
    assert (
        names["n01440764"] == "tench"
        and names["n02012849"] == "crane bird"
        and names["n03126707"] == "construction crane"
    )
    assert len(set(names.values())) < 1000  # two classes are called missile
    assert imagenet_folder_names(["n15075141"], place=Path("d"))["n15075141"] == "toilet paper"
    assert imagenet_folder_names(["0", "999"], place=Path("d"))["999"] == "toilet paper"


@pytest.mark.parametrize(
    "folders, unknown", [(["n01440764", "train"], "train"), (["0", "1000"], "0"), (["cat"], "cat")]
)
def test_unknown_imagenet_folder_asks_for_class_names(folders, unknown):
    with pytest.raises(UserError, match=f'^DIR: .*"{unknown}".*--class_names'):
        imagenet_folder_names(folders, place=Path("DIR"))


def test_blank_separates_only_after_ids(tmp_path):
    """Half of these lines start with a folder, but the whole line is the name."""
    (tmp_path / "names.txt").write_text("crane bird\nshark fish\nlemon\nteddy bear\n")
    found = read_class_names(tmp_path / "names.txt", ["crane", "shark", "lemon", "teddy"])
    assert list(found.values()) == ["crane bird", "shark fish", "lemon", "teddy bear"]


def test_header_is_not_a_class(tmp_path):
    (tmp_path / "names.csv").write_text("class,name\nn03,hen\nn01,tench\nn02,shark\nn04,owl\n")
    assert set(read_class_names(tmp_path / "names.csv", FOLDERS)) == {"n01", "n02", "n03", "n04"}
    found = read_class_names(tmp_path / "names.csv", ["class", "n01"])
    assert found["class"] == "name"  # a folder is called class, so the line is not a header


def test_list_of_the_folders_in_any_order(tmp_path):
    (tmp_path / "names.txt").write_text("sea\nmaple tree\nbus\n")
    found = read_class_names(tmp_path / "names.txt", ["bus", "maple_tree", "sea"])
    assert found == {"bus": "bus", "maple_tree": "maple tree", "sea": "sea"}


def test_numbers_in_names_are_not_folders_and_misplaced_folders_refused(tmp_path):
    (tmp_path / "names.txt").write_text("level 0\nlevel 1\nlevel 2\n")
    assert list(read_class_names(tmp_path / "names.txt", ["0", "1", "2"]).values()) == ["level 0", "level 1", "level 2"]
    (tmp_path / "names.txt").write_text("dog\ncat\nbird\n")
    with pytest.raises(UserError, match='"dog" is a folder, but its position makes it the name of the folder "cat"'):
        read_class_names(tmp_path / "names.txt", ["cat", "dog", "eagle"])


@pytest.mark.parametrize("blanks", [" ", "\t", "\u3000"])
@pytest.mark.parametrize("between", ["", "x", ",", "\t", ":"])
def test_many_blanks_take_linear_time(tmp_path, blanks, between):
    long = 2 * 10**5 * blanks
    (tmp_path / "names.txt").write_text(f"n01{long}{between}{long}tench\nn02, shark\nn03{between} hen\n")
    began = time.process_time()
    with contextlib.suppress(UserError):
        read_class_names(tmp_path / "names.txt", FOLDERS)
    assert time.process_time() - began < 5


def test_undecodable_characters_in_names_are_replaced(tmp_path):
    folder = os.fsdecode(b"caf\xe9")
    (tmp_path / "names.json").write_text(json.dumps({folder: "caf\udce9 \ud83d", "n01": "a\x1bb"}))
    assert read_class_names(tmp_path / "names.json", [folder, "n01"]) == {folder: "caf\ufffd \ufffd", "n01": "a\x1bb"}


def test_many_columns_take_linear_time(tmp_path):
    header = "id,name" + "," * 50_000
    (tmp_path / "names.csv").write_text(header + "\n" + "n01,tench\nn02,shark\nn03,hen\n" * 20_000)
    began = time.process_time()
    assert read_class_names(tmp_path / "names.csv", FOLDERS)["n02"] == "shark"
    assert time.process_time() - began < 10
