"""Samples in a tar shard."""

import io
import json
import tarfile

import pytest
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_expander

from clip_retrieval.data.shards.samples import (
    SkipSample,
    caption_ending,
    check_layout,
    count_samples,
    image_ending,
    key_and_ending,
    read_captions,
    read_members,
    read_samples,
)
from clip_retrieval.errors import UserError
from tests.data.make_shards import jpeg, numbered, write_shard


@pytest.fixture
def mixed(tmp_path):
    """Samples of all kinds, among members that belong to no sample."""
    samples = [
        ("./a/00", {"jpg": jpeg(0), "txt": "zero", "cls": "5"}),
        ("a/01", {"JPEG": jpeg(1), "json": '{"caption": "one"}'}),
        ("02", {"npy": b"12"}),
        ("__meta__/a", {"txt": "not one"}),
        ("03", {"txt": "three"}),
        ("._04", {"jpg": b"made by macOS"}),
        ("04.seg", {"png": jpeg(4)}),
        ("05" * 80, {"png": jpeg(5), "txt": "a name that a header does not hold"}),
        ("06", {"webp": jpeg(6), "txt": "six"}),
        ("06", {"txt": "again"}),
    ]
    return write_shard(tmp_path / "mixed.tar", samples)


def test_headers_give_the_samples_that_webdataset_reads(mixed):
    from_headers = [{m.ending: m for m in reversed(members)} for members in read_members(mixed)]
    streamed = list(read_samples(mixed))
    with mixed.open("rb") as file:
        parts = tar_file_expander([{"url": "x", "stream": file}], select_files=lambda name: key_and_ending(name)[0])
        kept = {"jpg", "jpeg", "png", "webp", "txt", "json", "__key__"}
        theirs = [
            {name: value for name, value in sample.items() if name in kept}
            for sample in group_by_keys(parts, handler=lambda error: True)
            if kept & set(sample) - {"__key__"} and not sample["__key__"].startswith("__meta__")
        ]
    assert streamed == theirs
    assert count_samples(mixed) == len(streamed) == len(from_headers)
    content = mixed.read_bytes()
    for members, sample in zip(from_headers, streamed):
        assert set(members) == {name for name in sample if not name.startswith("__")}
        for ending, member in members.items():
            assert member.key == sample["__key__"]
            assert content[member.begin : member.begin + member.size] == sample[ending]
    assert [sample["__key__"] for sample in streamed] == ["./a/00", "a/01", "03", "05" * 80, "06"]
    assert streamed[-1]["txt"] == b"six"


@pytest.mark.parametrize(
    "name", ["a.jpg", "b/a.jpg", "b.c/a.seg.PNG", "a", "b.c/a", ".a.jpg", "./a.jpg", "a..jpg", "a.", "b/c/é ü.JPG", "."]
)
def test_keys_and_endings_equal_those_of_webdataset(name):
    key, ending = base_plus_ext(name)
    assert key_and_ending(name) == ((key, ending.lower()) if key else ("", ""))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_reading_can_start_at_any_sample(tmp_path, form):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=form) as tar:
        for key, parts in numbered(0, 6):
            for ending, content in parts.items():
                content = content if isinstance(content, bytes) else content.encode()
                info = tarfile.TarInfo(
                    f"{'long' * 24}/{key}{'long' * (12 if form == tarfile.USTAR_FORMAT else 40)}.{ending}"
                )
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    whole = list(read_samples(path))
    assert len(whole) == 6
    for first in range(7):
        assert list(read_samples(path, first)) == whole[first:]


def test_shard_with_a_damaged_header_is_named(tmp_path):
    path = write_shard(tmp_path / "x.tar", numbered(0, 6))
    content = bytearray(path.read_bytes())
    third = next(members for i, members in enumerate(read_members(path)) if i == 3)[0].begin - 512
    content[third : third + 100] = b"\xff" * 100
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"x.tar: cannot be read as a tar \(at byte {third:,}: a damaged header"):
        count_samples(path)


@pytest.mark.parametrize("read", [count_samples, lambda path: list(read_samples(path))])
def test_truncated_shard_is_named(tmp_path, read):
    path = write_shard(tmp_path / "x.tar", numbered(0, 6))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"x\.tar: cannot be read as a tar"):
        read(path)


def captions(key=None, **parts):
    ending = caption_ending(parts, key)
    return read_captions(parts[ending].encode() if isinstance(parts[ending], str) else parts[ending], ending, key)


def test_captions_are_read_from_the_txt_or_a_key_of_the_json():
    record = json.dumps({"caption": "of the json", "alt": ["first", " second ", "first", ""]})
    assert captions(txt=" of the\ntxt ", json=record) == ["of the txt"]
    assert captions(json=record) == ["of the json"]
    assert captions("caption", txt="of the txt", json=record) == ["of the json"]
    assert captions("alt", txt="of the txt", json=record) == ["first", "second"]


@pytest.mark.parametrize(
    "key, parts, reason",
    [
        (None, {"jpg": b""}, "no .txt and no .json"),
        ("alt", {"txt": "there"}, "no .json"),
        (None, {"txt": " \n"}, "its caption is empty"),
        (None, {"txt": b"\xff\xfe"}, "not UTF-8"),
        (None, {"json": "{"}, "its .json is broken"),
        (None, {"json": '{"text": "x"}'}, "no 'caption'.*text.*--caption_key"),
        (None, {"json": '["x"]'}, "no 'caption'.*list"),
        (None, {"json": '{"caption": 5}'}, "neither a text nor a list"),
        (None, {"json": '{"caption": []}'}, "empty"),
        (None, {"json": '{"caption": null}'}, "neither a text nor a list"),
    ],
)
def test_reason_for_a_missing_caption_is_given(key, parts, reason):
    with pytest.raises(SkipSample, match=reason):
        captions(key, **parts)


def test_image_endings():
    assert [image_ending({ending: 0, "txt": 0}) for ending in ("jpg", "jpeg", "png", "webp")] == [
        "jpg",
        "jpeg",
        "png",
        "webp",
    ]
    with pytest.raises(SkipSample, match="no image"):
        image_ending({"gif": 0, "txt": 0})


def test_names_with_several_dots_are_warned_of(tmp_path, caplog):
    samples = [*numbered(0, 4), ("IMG.2021.1", {"jpg": jpeg(1), "txt": "x"}), ("a.seg", {"png": jpeg(2)})]
    samples.append(("._00000", {"jpg": b"made by macOS"}))
    with caplog.at_level("WARNING", "clip_retrieval"):
        check_layout(write_shard(tmp_path / "dots.tar", samples), None)
        check_layout(write_shard(tmp_path / "plain.tar", numbered(0, 4)), None)
    (message,) = caplog.messages
    assert "dots.tar: skipped 3 files" in message and "(IMG.2021.1.jpg)" in message


def test_nonadjacent_files_are_refused_and_incomplete_samples_warned_of(tmp_path, caplog):
    files = [(key, {ending: parts[ending]}) for ending in ("jpg", "txt") for key, parts in numbered(0, 4)]
    with pytest.raises(UserError, match=r"apart\.tar: 8 of 8 samples are incomplete; .* next to each other"):
        check_layout(write_shard(tmp_path / "apart.tar", files), None)
    path = write_shard(tmp_path / "few.tar", [*numbered(0, 4), ("x", {"jpg": jpeg(1)})])
    with caplog.at_level("WARNING", "clip_retrieval"):
        check_layout(path, None)
    assert caplog.messages == [f"{path}: 1 of 5 samples is incomplete; sample x: it has no .txt and no .json"]
    caplog.clear()
    check_layout(path, "alt")  # adjacent files, but no caption of this key
    assert "5 of 5 samples are incomplete; sample 00000: it has no .json" in caplog.messages[0]


def test_concatenated_tars_are_refused(tmp_path):
    parts = [write_shard(tmp_path / f"{i}.tar", numbered(i, 1)).read_bytes() for i in range(2)]
    (tmp_path / "both.tar").write_bytes(b"".join(parts))
    with pytest.raises(UserError, match=r"both\.tar: data after its end"):
        count_samples(tmp_path / "both.tar")
