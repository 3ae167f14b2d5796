"""CSV and TSV files of the user."""

import time

import pytest
from PIL import Image

from clip_retrieval.data.catalog import read_dataset
from clip_retrieval.errors import UserError
from clip_retrieval.log import log
from clip_retrieval.options import DataOptions


@pytest.fixture
def table(tmp_path, photos):
    """Writes a table beside the images a.jpg, b.jpg and sub/c.jpg."""
    photos(tmp_path, "a.jpg", "b.jpg", "sub/c.jpg")

    def write(text: str, name: str = "captions.csv", encoding: str = "utf-8"):
        path = tmp_path / name
        path.write_bytes(text.encode(encoding))
        return path

    return write


def test_without_a_split_column_all_rows_are_train_and_test(table, tmp_path, read, described):
    table("image,caption\nb.jpg,a bus\na.jpg,a dog\nb.jpg,a red bus\n")
    for split in ("train", "test"):
        dataset = read("csv", tmp_path, split)
        assert (dataset.name, dataset.split) == ("csv", "all")
        assert list(described(dataset).items()) == [("b.jpg", ["a bus", "a red bus"]), ("a.jpg", ["a dog"])]
    assert read("csv", tmp_path, "val") is None


@pytest.mark.parametrize("word", ["val", "valid", "validation", "dev", "Val"])
def test_split_column(table, tmp_path, read, described, word):
    table(f"split,image,caption\ntrain,a.jpg,a dog\n{word},b.jpg,a bus\n")
    assert described(read("csv", tmp_path, "train")) == {"a.jpg": ["a dog"]}
    assert described(read("csv", tmp_path, "val")) == {"b.jpg": ["a bus"]}
    assert read("csv", tmp_path, "test") is None


def test_columns_by_option(table, tmp_path, read, described):
    table("Filename,Text,fold,image,caption\na.jpg,a dog,test,x,y\n")
    columns = {"image_column": "Filename", "caption_column": "Text", "split_column": "fold"}
    assert described(read("csv", tmp_path, **columns)) == {"a.jpg": ["a dog"]}
    assert read("csv", tmp_path, "train", **columns) is None


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|", " | ", ", "])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_delimiters(table, tmp_path, read, described, delimiter, end):
    lines = [["id", "image", "caption"], ["1", "a.jpg", "a dog"], ["2", "b.jpg", '"a bus, red; ""old""|\ttoo"'], []]
    table(end.join(delimiter.join(line) for line in lines))
    assert described(read("csv", tmp_path)) == {"a.jpg": ["a dog"], "b.jpg": ['a bus, red; "old"|\ttoo']}


def test_hidden_files_are_skipped(table, tmp_path, read):
    table("image,caption\na.jpg,a dog\n")
    (tmp_path / "._captions.csv").write_bytes(b"\x00\x05\x16\x07")
    assert len(read("csv", tmp_path).images) == 1


def test_a_tsv_is_tab_separated(table, tmp_path, read, described):
    table("image\tcaption\na.jpg\ta dog, brown\n", "captions.tsv")
    assert described(read("csv", tmp_path)) == {"a.jpg": ["a dog, brown"]}


def test_byte_order_mark_empty_lines_and_captions_over_lines(table, tmp_path, read, described):
    table('\ufeff\nimage,caption\n\na.jpg,"a dog\nruns"\n,\nb.jpg, ein Bär \n')
    assert described(read("csv", tmp_path)) == {"a.jpg": ["a dog runs"], "b.jpg": ["ein Bär"]}


def test_unquoted_comma_in_the_last_of_two_columns(table, tmp_path, read, described):
    table("image,caption\na.jpg,a dog, running\n")
    assert described(read("csv", tmp_path)) == {"a.jpg": ["a dog, running"]}


def test_duplicates(table, tmp_path, read):
    table("image,caption\na.jpg,a dog\n.\\a.jpg,a dog\nb.jpg,a dog\nsub/../b.jpg,a cat\n")
    dataset = read("csv", tmp_path)
    # The first two lines are one pair; the same words for another image are another caption.
    assert len(dataset.images) == 2
    assert list(dataset.captions) == ["a dog", "a dog", "a cat"]
    assert dataset.pairs.tolist() == [[0, 0], [1, 1], [1, 2]]


def test_paths_are_relative_to_file_or_image_dir_or_absolute(table, tmp_path, photos, read):
    path = table(f"image,caption\nsub/c.jpg,a dog\n{tmp_path / 'a.jpg'},a bus\n")
    dataset = read("csv", "nowhere", annotations=path)
    assert dataset.images.paths == [str(tmp_path / "sub" / "c.jpg"), str(tmp_path / "a.jpg")]
    photos(tmp_path / "other", "sub/c.jpg")
    dataset = read("csv", "nowhere", annotations=path, image_dir=tmp_path / "other")
    assert dataset.images.paths == [str(tmp_path / "other" / "sub" / "c.jpg"), str(tmp_path / "a.jpg")]
    assert dataset.images[1].size == (8, 8)


@pytest.mark.parametrize(
    ("cell", "captions"),
    [
        ('["a dog", "it\'s \\u00e9t\\u00e9 \\ud83d\\ude00"]', ["a dog", "it's été 😀"]),
        ("['a dog', \"it's a bus\", 'say \\'x\\'']", ["a dog", "it's a bus", "say 'x'"]),
        ("['a dog' 'a \"red\" bus'\n 'a cat']", ["a dog", 'a "red" bus', "a cat"]),
        ("['a dog', None, nan, '']", ["a dog"]),
        ('["a dog", null]', ["a dog"]),
        ('["a dog"]', ["a dog"]),
        ("[unclear] a dog", ["[unclear] a dog"]),
        ("[1, 2]", ["[1, 2]"]),
        ("['a dog', __import__('os')]", ["['a dog', __import__('os')]"]),
        ("['a dog', 'cut", ["['a dog', 'cut"]),
        ("['broken \\x escape']", ["['broken \\x escape']"]),
    ],
)
def test_a_list_of_captions_in_one_cell(table, tmp_path, read, described, cell, captions):
    quoted = cell.replace('"', '""')
    table(f'image,caption\na.jpg,"{quoted}"\nb.jpg,a bus\n')
    assert described(read("csv", tmp_path)) == {"a.jpg": captions, "b.jpg": ["a bus"]}


@pytest.mark.parametrize(
    "cell", ["[" * 100_000, "[" + "'a'," * 30_000 + "(", "['" + "\\" * 100_001, "['a'" + " " * 120_000]
)
def test_cells_that_resemble_lists_take_linear_time(table, tmp_path, read, described, cell):
    table(f'image,caption\na.jpg,"{cell}"\n')
    began = time.process_time()
    assert described(read("csv", tmp_path)) == {"a.jpg": [cell.strip()]}
    assert time.process_time() - began < 5


@pytest.mark.parametrize("line", ["sep=;\r\n", '"sep=;"\r\n', "SEP=;\n"])
@pytest.mark.parametrize("name", ["x.csv", "x.tsv"])
def test_excel_names_the_separator_in_the_first_line(table, tmp_path, read, described, line, name):
    table(f"\ufeff{line}image;caption\r\na.jpg;a dog, brown\r\n", name)
    assert described(read("csv", tmp_path)) == {"a.jpg": ["a dog, brown"]}
    path = table(f"{line}image;caption\na.jpg;a dog\na.jpg\n", f"bad_{name}")
    fails(read, tmp_path, path, "line 4", "2 columns", annotations=path)


def test_empty_captions_are_left_out_with_their_images(table, tmp_path, read, described, caplog):
    table("image,caption\na.jpg,\nb.jpg,a bus\nb.jpg, \nsub/c.jpg,[]\n")
    with caplog.at_level("WARNING", "clip_retrieval"):
        log.propagate = True
        assert described(read("csv", tmp_path)) == {"b.jpg": ["a bus"]}
    assert "3 of 4 captions are empty" in caplog.text and "another caption: 2" in caplog.text


def test_image_names_that_are_not_utf8(table, tmp_path, read, photos):
    name = "caf\udce9.jpg"  # Latin-1 on the disk
    photos(tmp_path, name)
    table("image,caption\ncafé.jpg,a dog\n")  # UTF-8 in the table
    assert read("csv", tmp_path).images.paths == [str(tmp_path / name)]
    table("image,caption\ncafé.jpg,a dog\n", "x.csv", encoding="latin-1")  # as `ls` writes it
    assert read("csv", tmp_path, annotations=tmp_path / "x.csv").images.paths == [str(tmp_path / name)]


@pytest.mark.parametrize("folder", ["photos [1]", "a*b", "{a,b}", "#recycle"])
def test_folders_with_characters_of_patterns(tmp_path, read, photos, folder):
    photos(tmp_path / folder, "a [2]/a.jpg")
    (tmp_path / folder / "x.csv").write_text("image,caption\na [2]/a.jpg,a dog\n")
    (tmp_path / folder / "@eaDir").mkdir()
    (tmp_path / folder / ".x.csv.swp.csv").write_text("x")
    assert len(read("csv", tmp_path / folder).images) == 1


# Bad input: one line that names the file


def fails(read, root, *parts, **options):
    with pytest.raises(UserError) as error:
        read("csv", root, **options)
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, message


def test_missing_root_and_files(tmp_path, read):
    fails(read, tmp_path / "nowhere", tmp_path / "nowhere", "--dataset_root")
    fails(read, tmp_path, tmp_path, "*.csv", "--annotations")
    fails(read, tmp_path, "gone.csv", annotations="gone.csv")
    fails(read, tmp_path, tmp_path, "a folder", annotations=tmp_path)


def test_a_root_that_is_a_file(table, read):
    path = table("image,caption\na.jpg,a dog\n")
    fails(read, path, path, "not a folder")


def test_several_files(table, tmp_path, read):
    table("image,caption\na.jpg,a dog\n", "x.csv")
    table("image,caption\na.jpg,a dog\n", "y.tsv")
    fails(read, tmp_path, "x.csv, y.tsv", "--annotations")


def test_missing_image(table, tmp_path, read):
    path = table("image,caption\na.jpg,a dog\ngone.jpg,a bus\n")
    fails(read, tmp_path, path, tmp_path / "gone.jpg", "1 of 2 images is missing", "--image_dir")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ["no column image", "none"]),
        ("image,caption\n", ["no captions"]),
        ("file,caption\na.jpg,a dog\n", ["no column image", "file, caption", "--image_column"]),
        ("image;text\na.jpg;a dog\n", ["no column caption", "image, text", "--caption_column"]),
        ("image,caption\na.jpg,a dog\nb.jpg\n", ["line 3", "2 columns"]),
        ("image,caption\na.jpg,a dog\n,a bus\n", ["line 3", "column image is empty"]),
        ("image,caption,split\na.jpg,a dog, running,test\n", ["line 2", "3 columns", "double quotes"]),
        ("image,caption,split\na.jpg,a dog,exam\n", ["line 2", "'exam'", "train"]),
        ("image,caption,split\na.jpg,a dog,test\nb.jpg,a bus,\n", ["line 3"]),
        ('image,caption\na.jpg,"a dog\nb.jpg,a bus\n', ["line 3", "not well-formed"]),
        ('image,caption\na.jpg,"stop" says the sign\n', ["line 2", "not well-formed"]),
    ],
)
def test_bad_tables(table, tmp_path, read, text, message):
    path = table(text)
    fails(read, tmp_path, path, *message)


def test_a_split_column_named_by_option_must_exist(table, tmp_path, read):
    path = table("image,caption\na.jpg,a dog\n")
    fails(read, tmp_path, path, "no column fold", "image, caption", split_column="fold")


def test_wrong_encoding_names_the_line(table, tmp_path, read):
    path = table("image,caption\na.jpg,a dog\nb.jpg,un café\n", encoding="latin-1")
    fails(read, tmp_path, path, "line 3", "UTF-8")
    path = table("image,caption\na.jpg,a dog\n", encoding="utf-16")
    fails(read, tmp_path, path, "line 1", "UTF-8")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_line_ends_of_every_system(tmp_path, photos, read, described, end, mark):
    photos(tmp_path, "a.jpg", "b.jpg")
    text = mark + end.join(["caption;image", "a dog, here;a.jpg", "", "a cat;b.jpg", ""])
    (tmp_path / "x.csv").write_bytes(text.encode())
    assert described(read("csv", tmp_path)) == {"a.jpg": ["a dog, here"], "b.jpg": ["a cat"]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"image,caption\na.jpg,a\0dog\n", ["line 2", "NUL"]),
        (b"image,caption\na.jpg,a dog\n\0b.jpg,x\n", ["line 3", "NUL"]),
        ("image,caption\na.jpg,a dog\n".encode("utf-16"), ["line 1", "UTF-8"]),
        ("image,caption\na.jpg,a dog\n".encode("utf-16-le"), ["line 1", "UTF-8"]),
        (b"image,caption\na.jpg," + b"x" * 200_000, ["line 2", "131072"]),
        (b'image,caption\na.jpg,"' + b"x\n" * 100_000, ["131072", "quote"]),
    ],
    ids=lambda value: None,
)
def test_files_that_are_not_text(table, tmp_path, read, content, words):
    path = tmp_path / "x.csv"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read("csv", tmp_path)
    assert all(word in str(error.value) for word in (str(path), *words)) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "image,caption\n" + "," * 400_000,
        "image,caption\na.jpg,x" + "," * 400_000 + "\na.jpg",
        "\n" * 10**6 + "image,caption\n" + "\n" * 10**6 + "a.jpg",
        "image," * 400_000 + "caption\na.jpg,x",
        "image,caption\na.jpg," + "x" * 10**7,
        "image,caption " + " " * 10**7,
        '"' * 10**6,
    ],
    ids=range(7),
)
def test_long_lines_take_linear_time(tmp_path, photos, read, text):
    photos(tmp_path, "a.jpg")
    (tmp_path / "x.csv").write_text(text)
    began = time.process_time()
    with pytest.raises(UserError, match=r"x\.csv"):
        read("csv", tmp_path)
    assert time.process_time() - began < 10


def test_absolute_and_relative_names_are_one_image(tmp_path):
    (tmp_path / "im").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "im" / "a.png")
    lines = ("image,caption", "im/a.png,one", f"{tmp_path}/im/a.png,two", "./im/../im/a.png,three")
    (tmp_path / "all.csv").write_text("\n".join(lines))
    dataset = read_dataset(DataOptions(dataset="csv", annotations=str(tmp_path / "all.csv")), "train")
    assert len(dataset.images) == 1 and len(dataset.captions) == 3
