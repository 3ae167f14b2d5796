"""`read_npy` reads numeric arrays exactly, and refuses everything else."""

import io
import os
import pickle
import random

import numpy as np
import pytest

from clip_retrieval import arrays
from clip_retrieval.arrays import read_npy
from clip_retrieval.errors import UserError


def with_header(header, body=b"\0" * 64, version=(1, 0)):
    """The bytes of a .npy file with this header text."""
    header = header.encode("latin-1") + b"\n"
    length = len(header).to_bytes(2 if version == (1, 0) else 4, "little")
    return b"\x93NUMPY" + bytes(version) + length + header + body


@pytest.mark.parametrize("memory_map", [False, True])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f2", "<i8", ">u2", "u1", "?"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_are_read_in_native_byte_order(tmp_path, dtype, order, memory_map):
    array = np.arange(24).reshape(4, 6).astype(dtype, order=order)
    np.save(tmp_path / "a.npy", array)
    found = read_npy(tmp_path / "a.npy", memory_map=memory_map)
    assert found.dtype.isnative and found.dtype == array.dtype.newbyteorder("=")
    assert np.array_equal(found, array)
    assert isinstance(found, np.memmap) == (memory_map and array.dtype.isnative)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (), (1,)])
def test_empty_and_small_arrays(tmp_path, shape):
    np.save(tmp_path / "a.npy", np.ones(shape, np.float32))
    for memory_map in (False, True):
        assert read_npy(tmp_path / "a.npy", memory_map=memory_map).shape == shape


@pytest.mark.filterwarnings("error")
def test_header_of_python_2_and_of_version_2(tmp_path):
    (tmp_path / "a.npy").write_bytes(with_header("{'descr': '<i8', 'fortran_order': False, 'shape': (3L,)}"))
    assert read_npy(tmp_path / "a.npy").shape == (3,)
    header = "{'descr': '<i8', 'fortran_order': False, 'shape': (3,)}"
    (tmp_path / "a.npy").write_bytes(with_header(header, version=(2, 0)))
    assert read_npy(tmp_path / "a.npy").shape == (3,)


class Malice:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def npz():
    file = io.BytesIO()
    np.savez(file, a=np.ones(3))
    return file.getvalue()


def objects():
    file = io.BytesIO()
    np.save(file, np.array([Malice()]), allow_pickle=True)
    return file.getvalue()


HEADER = "{'descr': '%s', 'fortran_order': False, 'shape': %s}"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no array",
        pickle.dumps(Malice()),
        npz(),
        objects(),
        with_header(HEADER % ("|O", "(1,)")),
        with_header(HEADER % ("<U0", f"({10**12},)")),
        with_header(HEADER % ("|V0", f"({10**12},)")),
        with_header(HEADER % ("<c8", "(2,)")),
        with_header(HEADER % ("<f16", "(2,)")),
        with_header(HEADER % ("M8[s]", "(2,)")),
        with_header(HEADER % ("<f4", f"({10**12},)")),
        with_header(HEADER % ("<f4", f"({2**40}, {2**40})")),
        with_header(HEADER % ("<f4", f"({2**70}, 0)")),
        with_header(HEADER % ("<f4", "(-1,)")),
        with_header(HEADER % ("<f4", "(-4, -4)")),
        with_header(HEADER % ("<f4", "(1.5,)")),
        with_header(HEADER % ("<f4", "(" + "1," * 70 + ")")),
        with_header(HEADER % ("<f4", "(9" + "9" * 5000 + ",)")),
        with_header("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (2,)}"),
        with_header("{'descr': 'i4,,', 'fortran_order': False, 'shape': (2,)}"),
        with_header("{'descr': '<f4', 'fortran_order': 7, 'shape': (2,)}"),
        with_header("{'descr': '<f4'}"),
        with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (2,"),
        with_header("{'descr': '''<f4"),
        with_header("\xff\xfe"),
        with_header("(" * 9000),
        with_header("-" * 9000 + "1"),
        with_header("{" * 90 + "}" * 90),
        with_header("1 if 0or 1else 2"),
        with_header(HEADER % ("<f4", "(2,)"), version=(3, 0)),
        with_header(HEADER % ("<f4", "(2,)"), version=(9, 1)),
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff{",
        with_header(HEADER % ("<f4", "(16,)"), body=b"\0" * 63),
    ],
    ids=lambda content: repr(content[:60]),
)
@pytest.mark.parametrize("memory_map", [False, True])
def test_other_content_is_refused_in_one_line(tmp_path, monkeypatch, content, memory_map):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(UserError, match=r"not a readable \.npy array") as error:
        read_npy(tmp_path / "a.npy", memory_map=memory_map)
    assert str(tmp_path / "a.npy") in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "unpickled").exists()


def test_array_larger_than_memory_is_refused(tmp_path, monkeypatch):
    """A sparse file can have all the bytes that its header promises."""
    (tmp_path / "a.npy").write_bytes(with_header(HEADER % ("|u1", f"({2**40},)"), body=b""))
    os.truncate(tmp_path / "a.npy", 2**40 + 4096)
    with pytest.raises(UserError, match=r"a.npy.* are more than the memory"):
        read_npy(tmp_path / "a.npy")
    assert read_npy(tmp_path / "a.npy", memory_map=True)[2**39] == 0
    np.save(tmp_path / "b.npy", np.ones(1000))
    monkeypatch.setattr(arrays, "memory_limit", lambda: 7999)
    with pytest.raises(UserError, match=r"b.npy.* are more than the memory"):
        read_npy(tmp_path / "b.npy")


def test_damaged_files_raise_only_user_errors(tmp_path):
    file = io.BytesIO()
    np.save(file, np.arange(6, dtype=np.float32).reshape(2, 3))
    content, path = file.getvalue(), tmp_path / "a.npy"
    pieces = [b"'", b"(", b")", b"{", b"-", b"9" * 20, b"L", b"|O", b"\0", b"\xff", b",", b"#", b"\\", b"'''", b"e9"]
    for seed in range(600):
        rng, damaged = random.Random(seed), bytearray(content)
        for _ in range(rng.choice([1, 2, 5])):
            place = rng.randrange(90)
            damaged[place : place + rng.choice([0, 1, 3])] = rng.choice([*pieces, bytes([rng.randrange(256)])])
        path.write_bytes(damaged)
        for memory_map in (False, True):
            try:
                assert read_npy(path, memory_map=memory_map).nbytes <= 64
            except UserError as error:
                assert str(path) in str(error)
