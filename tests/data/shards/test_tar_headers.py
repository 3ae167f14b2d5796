"""Tar headers: as tarfile reads them in every format; a hostile header is a one-line error with the shard's name."""

import io
import os
import random
import tarfile
import time

import pytest

from clip_retrieval.data.shards.find import check_whole
from clip_retrieval.data.shards.samples import check_layout, count_samples, read_samples
from clip_retrieval.data.shards.sources import open_shard
from clip_retrieval.data.shards.tar_headers import read_headers
from clip_retrieval.errors import UserError
from tests.data.make_shards import jpeg, numbered, write_shard

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def headers(path):
    with open_shard(path) as file:
        return list(read_headers(path, file))


def info(name="a.jpg", size=0, **changes):
    info = tarfile.TarInfo(name)
    info.size = size
    for attribute, value in changes.items():
        setattr(info, attribute, value)
    return info


@pytest.mark.parametrize("form", FORMATS)
def test_regular_files_equal_those_of_tarfile(tmp_path, form):
    path = tmp_path / "x.tar"
    long = ("d" * 60 + "/") * 2 if form == tarfile.USTAR_FORMAT else "long" * 60 + "/"
    with tarfile.open(path, "w", format=form, pax_headers={"comment": "of all"}) as tar:
        for number, name in enumerate(["a.jpg", "é.txt", f"{long}b.jpg", "caf\udce9.txt", f"{long}é.json"]):
            tar.addfile(info(f"{number}", type=tarfile.DIRTYPE))
            tar.addfile(info(name, 500 * number), io.BytesIO(b"x" * 500 * number))
            tar.addfile(info("link", type=tarfile.SYMTYPE, linkname="long" * (10 if not form else 60)))
            tar.addfile(info("hard", type=tarfile.LNKTYPE, linkname=name[:90]))
        tar.addfile(info("fifo", type=tarfile.FIFOTYPE))
        tar.addfile(info("contiguous", 7, type=tarfile.CONTTYPE), io.BytesIO(b"x" * 7))
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar.getmembers() if m.isreg()]
    assert headers(path) == expected and len(expected) == 6


def test_tar_of_the_command_line_program_is_read(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.txt").write_text("zero")
    (tmp_path / "a" / ("1" * 200 + ".txt")).write_text("one")
    assert os.system(f"cd {tmp_path} && tar -cf x.tar --sort=name a") == 0
    assert [(header.name, header.size) for header in headers(tmp_path / "x.tar")] == [
        ("a/0.txt", 4),
        ("a/" + "1" * 200 + ".txt", 3),
    ]


def with_checksum(header):
    """The header with a valid checksum."""
    header = bytearray(header)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def raw(kind=b"0", size=b"00000000000", name=b"a.jpg"):
    header = bytearray(tarfile.TarInfo("x").tobuf(tarfile.GNU_FORMAT))
    header[:100] = name.ljust(100, b"\0")
    header[124:136] = size.ljust(12, b"\0")
    header[156:157] = kind
    return with_checksum(header)


def base256(number):
    return b"\xff" + number.to_bytes(11, "big", signed=True) if number < 0 else b"\x80" + number.to_bytes(11, "big")


def sparse():
    header = bytearray(raw(b"S", b"00000001000"))
    header[386:398], header[410:422], header[483:495] = b"\0" * 12, b"\0" * 12, b"77777777777\0"
    return with_checksum(header) + b"\0" * 512


def pax(*records, kind=b"x"):
    lines = b""
    for keyword, value in records:
        length = len(keyword) + len(value) + 3
        while len(b"%d" % length) + len(keyword) + len(value) + 3 != length:
            length = len(b"%d" % length) + len(keyword) + len(value) + 3
        lines += b"%d %s=%s\n" % (length, keyword, value)
    return raw(kind, b"%011o" % len(lines)) + lines.ljust(-(-len(lines) // 512) * 512, b"\0")


END = b"\0" * 1024
CONTENT = raw(size=b"%011o" % 512) + b"x" * 512
HOSTILE = {
    "old sparse member": sparse() + END,
    "sparse member of 64 GB": pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0")) + CONTENT + END,
    "sparse map": pax((b"GNU.sparse.size", b"68719476736"), (b"GNU.sparse.numblocks", b"1")) + CONTENT + END,
    "sparse for all": pax((b"GNU.sparse.map", b"0,1"), kind=b"g") + CONTENT + END,
    "larger than the file": raw(size=b"77777777777") + END,
    "larger by base 256": raw(size=base256(2**80)) + END,
    "negative": raw(size=base256(-512)) + END,
    "negative, of an unknown kind": raw(b"Z", base256(-512)) + END,
    "negative long name": raw(b"L", base256(-512)) + CONTENT + END,
    "long name of gigabytes": raw(b"L", b"17777777777") + CONTENT + END,
    "extended header of gigabytes": raw(b"x", b"17777777777") + CONTENT + END,
    "extended header beyond the file": raw(b"x", b"00000100000") + CONTENT + END,
    "size in the extended header": pax((b"size", b"9" * 18)) + CONTENT + END,
    "size of 5,000 digits": pax((b"size", b"9" * 5000)) + CONTENT + END,
    "record that goes beyond": raw(b"x", b"%011o" % 10) + b"999 path=a".ljust(512, b"\0") + CONTENT + END,
    "record of no length": raw(b"x", b"%011o" % 10) + b"0 path=aa\n".ljust(512, b"\0") + CONTENT + END,
    "record of a negative length": raw(b"x", b"%011o" % 10) + b"-9 path=a\n".ljust(512, b"\0") + CONTENT + END,
    "name of a megabyte": pax((b"path", b"a/" * 400_000 + b"b.jpg")) + CONTENT + END,
    "only extended headers": pax((b"path", b"a")) * 1000,
    "header that is no number": raw(size=b"x" * 11) + END,
    "cut short": CONTENT[:-100],
    "two tars": CONTENT + END + CONTENT + END,
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize(
    "read", [count_samples, lambda path: list(read_samples(path)), lambda p: check_layout(p, None)]
)
def test_hostile_header_is_a_one_line_error(tmp_path, name, read):
    path = tmp_path / "x.tar"
    path.write_bytes(HOSTILE[name])
    started = time.perf_counter()
    with pytest.raises(UserError) as error:
        read(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 400
    assert time.perf_counter() - started < 2


def test_sparse_file_is_not_read_to_its_end(tmp_path):
    path = write_shard(tmp_path / "x.tar", numbered(0, 2))
    os.truncate(path, 2**40)
    started = time.perf_counter()
    with pytest.raises(UserError, match="data after its end"):
        count_samples(path)
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize(
    ("ending", "size", "words"), [("jpg", 2**31 + 1, "more than 2 GiB"), ("txt", 2**24 + 1, "a caption's file")]
)
def test_oversized_member_is_not_read(tmp_path, ending, size, words):
    path = tmp_path / "x.tar"
    with path.open("wb") as file:
        file.write(raw(size=base256(size), name=f"a.{ending}".encode()))
        file.truncate(512 + -(-size // 512) * 512 + 1024)  # holes
    check_whole(path)
    with pytest.raises(UserError, match=f"x.tar, a.{ending}: .*{words}"):
        list(read_samples(path))


@pytest.mark.parametrize("kind", ["fifo", "folder", "gone", "device"])
def test_path_that_is_no_file_is_named(tmp_path, kind):
    path = tmp_path / "x.tar"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    for read in (check_whole, count_samples, lambda path: list(read_samples(path))):
        with pytest.raises(UserError, match=f"{path}: cannot be read"):
            read(path)


def test_names_with_invalid_utf8_or_line_breaks_are_read(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name in ("caf\udce9", "a\nb", "tab\t", "\x01"):
            for ending, content in (("jpg", jpeg(1)), ("txt", b"a thing")):
                tar.addfile(info(f"{name}.{ending}", len(content)), io.BytesIO(content))
    assert [sample["__key__"] for sample in read_samples(path)] == ["caf\udce9", "a\nb", "tab\t", "\x01"]
    assert count_samples(path) == 4


def test_mutated_shards_are_read_or_refused(tmp_path):
    path, draw = write_shard(tmp_path / "x.tar", numbered(0, 4)), random.Random(0)
    whole, refused = path.read_bytes(), 0
    at = [header.begin - 512 for header in headers(path)]
    for _ in range(1000):
        damaged = bytearray(whole)
        begin = draw.choice(at)
        for _ in range(draw.randint(1, 3)):
            damaged[begin + draw.randrange(512)] = draw.choice([0, 0x20, 0x30, 0x37, 0x80, 0xFF, draw.randrange(256)])
        if draw.random() < 0.3:
            damaged[begin + 124 : begin + 136] = draw.choice([base256(draw.randrange(-(2**70), 2**70)), b"7" * 12])
        damaged[begin + 156 : begin + 157] = draw.choice([b"0", b"x", b"g", b"L", b"K", b"S", b"1", b"5", b"V", b"\0"])
        damaged[begin : begin + 512] = with_checksum(damaged[begin : begin + 512])
        path.write_bytes(damaged)
        try:
            assert count_samples(path) == len(list(read_samples(path)))
        except UserError as error:
            refused += 1
            assert str(path) in str(error)
    assert 100 < refused < 900
