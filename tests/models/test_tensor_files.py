"""Weight files are read without running them; compared with torch's own readers on trusted files."""

import collections
import contextlib
import os
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from clip_retrieval.errors import UserError
from clip_retrieval.models.pickled import DamagedError, PythonObjectError, Unusable
from clip_retrieval.models.tensor_files import read_tensor_file
from clip_retrieval.models.unpickle import Unpickler
from clip_retrieval.models.weights import read_weights
from tests.models.small import small_clip

DTYPES = ["float64", "float32", "float16", "bfloat16", "uint8", "int8", "int16", "int32", "int64", "bool", "complex64"]
DTYPES += ["uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2"]


def is_equal(a, b):
    """Whether two contents are equal, tensors in every bit and in their strides."""
    if isinstance(b, torch.Tensor):
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        equal = a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
        view = bits[b.element_size()]
        return equal and torch.equal(a.contiguous().view(view), b.detach().contiguous().view(view))
    if isinstance(b, dict):
        return a.keys() == b.keys() and all(is_equal(a[name], b[name]) for name in b)
    if isinstance(b, (list, tuple)):
        return type(a) is (tuple if isinstance(b, tuple) else list) and len(a) == len(b) and all(map(is_equal, a, b))
    return type(a) is type(b) and a == b


def tensors():
    """Make tensors of every dtype and layout that a file may hold."""
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    kinds = {name: (100 * torch.rand(3, 4)).to(getattr(torch, name)) for name in DTYPES}
    layouts = {
        "transposed": base.t(),
        "slice": base[2:5, ::3],
        "last rows": base[4:],
        "scalar": torch.tensor(2.5),
        "one": torch.ones(1),
        "empty": torch.empty(0, 3),
        "empty storage": torch.empty(0),
        "five": torch.randn(1, 2, 1, 3, 2).permute(4, 0, 2, 1, 3),
        "channels last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "expanded": torch.randn(4)[:2].expand(2, 2),
        "parameter": torch.nn.Parameter(torch.randn(3)),
    }
    return {**kinds, **layouts, "tied": base, "tied again": base}


@pytest.mark.parametrize("is_zip", [True, False])
def test_tensors_equal_torch_load(tmp_path, is_zip):
    state = collections.OrderedDict(tensors())
    if not is_zip:  # torch itself does not read these in the old format
        state = {name: v for name, v in state.items() if not name.startswith(("uint16", "uint32", "uint64", "float8"))}
    torch.save({"state_dict": state}, tmp_path / "a.pt", _use_new_zipfile_serialization=is_zip)
    read = read_tensor_file(tmp_path / "a.pt").content
    expected = torch.load(tmp_path / "a.pt", weights_only=True)
    assert is_equal(read, {"state_dict": dict(expected["state_dict"])})
    assert read["state_dict"]["tied"] is read["state_dict"]["tied again"]


@pytest.mark.parametrize("is_zip", [True, False])
def test_values_beside_tensors_are_kept(tmp_path, is_zip):
    values = {
        "none": None,
        "flags": [True, False],
        "numbers": (0, 255, 65535, -1, 2**31, -(2**70), 1.5, float("inf")),
        "text": "grün \ud800",
        "bytes": b"\x00\xff",
        1: {"nested": [[], {}, ()]},
        "size": torch.Size([2, 3]),
        "complex": 1 + 2j,
    }
    torch.save(values, tmp_path / "a.pt", _use_new_zipfile_serialization=is_zip)
    read = read_tensor_file(tmp_path / "a.pt").content
    assert is_equal(read, {**values, "size": (2, 3)})
    torch.save([{3, 4}, collections.Counter("aab"), torch.float16], tmp_path / "b.pt")
    members, counter, _ = read_tensor_file(tmp_path / "b.pt").content
    assert (sorted(members), counter) == ([3, 4], {"a": 2, "b": 1})


def test_safetensors_equal_the_saved_tensors(tmp_path):
    state = {name: v.detach().contiguous() for name, v in tensors().items() if not name.startswith("tied")}
    save_file(state, tmp_path / "a.safetensors")
    (tmp_path / "named.bin").write_bytes((tmp_path / "a.safetensors").read_bytes())
    assert is_equal(read_tensor_file(tmp_path / "a.safetensors").content, state)
    assert is_equal(read_tensor_file(tmp_path / "named.bin").content, state)


def rewrite_archive(path, change=lambda name, content: content, *, drop=(), rename=str):
    """Rewrite the archive at `path`, uncompressed, with entries changed, dropped and renamed."""
    with zipfile.ZipFile(path) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries:
            if not any(part in name for part in drop):
                archive.writestr(zipfile.ZipInfo(rename(name)), change(name, content))
    return path


def test_big_endian_numbers_are_byte_swapped(tmp_path):
    state = {"a": torch.arange(5, dtype=torch.float32), "b": torch.arange(7), "c": torch.tensor([True, False])}
    torch.save(state, tmp_path / "a.pt")

    def swap(name, content):
        if name.endswith("byteorder"):
            return b"big"
        size = {"0": 4, "1": 8}.get(name.rpartition("/data/")[2], 1)
        return b"".join(content[i : i + size][::-1] for i in range(0, len(content), size))

    assert is_equal(read_tensor_file(rewrite_archive(tmp_path / "a.pt", swap)).content, state)


@pytest.mark.parametrize("module", [b"numpy.core", b"numpy._core"])
@pytest.mark.parametrize("is_zip", [True, False])
def test_numbers_of_numpy_are_plain_numbers(tmp_path, module, is_zip):
    kinds = ["float64", "float32", "float16", "int8", "int64", "uint8", "uint32", "bool", "complex64", "complex128"]
    values = {kind: np.dtype(kind).type(1.5) for kind in kinds}
    values["swapped"] = np.frombuffer(struct.pack(">d", 2.5), ">f8")[0]
    content = {"lr": np.cos(np.float64(0.1)), "groups": [{"lr": np.float32(0.1)}], **values}
    path = tmp_path / "a.pt"
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    if is_zip:
        rewrite_archive(path, lambda name, data: data.replace(b"numpy._core", module))
    else:
        path.write_bytes(path.read_bytes().replace(b"numpy._core", module))
    expected = {name: value.item() for name, value in values.items()}
    read = read_tensor_file(path).content
    assert is_equal(read, {"lr": float(np.cos(0.1)), "groups": [{"lr": float(np.float32(0.1))}], **expected})


def test_arrays_of_numpy_beside_the_weights_are_skipped(tmp_path):
    random_state = np.random.RandomState(0).get_state()
    torch.save(
        {"state_dict": small_clip().state_dict(), "random": random_state, "name": np.str_("x")}, tmp_path / "a.pt"
    )
    assert "visual.proj" in read_weights(tmp_path / "a.pt").state
    torch.save({"visual.proj": np.ones(3)}, tmp_path / "b.pt")
    with pytest.raises(UserError, match=r"b.pt: visual.proj is a NumPy array; .*torch.from_numpy"):
        read_weights(tmp_path / "b.pt")


@pytest.mark.parametrize(
    "call",
    [
        b"cnumpy\ndtype\n(X\x02\x00\x00\x00f8tR(K\x03X\x01\x00\x00\x00<tbX\x03\x00\x00\x00abc",
        b"cnumpy\ndtype\n(X\x02\x00\x00\x00O8tR(K\x03X\x01\x00\x00\x00|tb]",
        b"cnumpy\ndtype\n(X\x02\x00\x00\x00f8tR(K\x03X\x03\x00\x00\x00f8,tbX\x03\x00\x00\x00abc",
        b"cnumpy\ndtype\n(]tR]",
        b"K\x01]",
        b"cnumpy\nndarray\n]",
    ],
)
def test_crafted_numbers_of_numpy_make_no_objects(call):
    pickle = b"\x80\x02cnumpy._core.multiarray\nscalar\n(" + call + b"tR."
    with contextlib.suppress(DamagedError):
        assert type(Unpickler(pickle, None).load()) is Unusable


def refusal(path):
    """Return the error message for a file; it is one line."""
    with pytest.raises(UserError) as error:
        read_tensor_file(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def strided(size, stride, storage=1, dtype=torch.float32):
    return torch.zeros(storage, dtype=dtype).as_strided(size, stride)


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize(
    "tensor",
    [
        strided((50_000, 40_000), (0, 0)),
        strided((2,), (0,)),
        strided((1000, 100), (0, 1), 100),
        strided((3, 3), (1, 1), 5),
        torch.zeros(8)[:1].expand(9),
    ],
)
def test_tensor_of_more_numbers_than_its_file_is_refused(tmp_path, tensor, is_zip):
    torch.save({"w": tensor}, tmp_path / "a.pt", _use_new_zipfile_serialization=is_zip)
    assert "but holds only" in refusal(tmp_path / "a.pt")


def test_many_views_of_the_same_numbers_are_refused(tmp_path):
    numbers = torch.zeros(50_000)
    torch.save({n: numbers[n:] for n in range(4)}, tmp_path / "few.pt")
    assert len(read_tensor_file(tmp_path / "few.pt").content) == 4
    torch.save({n: numbers[n:] for n in range(10)}, tmp_path / "many.pt")
    assert "times the bytes" in refusal(tmp_path / "many.pt")


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: torch.zeros(3, 3).to("meta"), "a meta tensor"),
        (lambda: torch.eye(3).to_sparse(), "a sparse tensor"),
        (lambda: torch.eye(3).to_sparse_csr(), "a sparse tensor"),
        (lambda: torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8), "a quantised tensor"),
        (lambda: torch.quantize_per_channel(torch.eye(3), torch.ones(3), torch.zeros(3), 0, torch.quint8), "quantised"),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "a nested tensor"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensor_without_plain_numbers_is_unusable(tmp_path, make, words):
    for is_zip in (True, False):
        torch.save({"fine": torch.ones(2), "w": make()}, tmp_path / "a.pt", _use_new_zipfile_serialization=is_zip)
        content = read_tensor_file(tmp_path / "a.pt").content
        assert torch.equal(content["fine"], torch.ones(2))
        assert isinstance(content["w"], Unusable) and words in content["w"].problem("w")


PICKLES = {
    "a memo of gigabytes": b"\x80\x02K\x01r\x00\x00\x00\x10K\x02.",
    "text of gigabytes": b"\x80\x02X\xff\xff\xff\xffabc.",
    "text of exabytes": b"\x80\x04\x8d" + b"\xff" * 7 + b"\x00abc.",
    "bytes of exabytes": b"\x80\x05\x96" + b"\xff" * 7 + b"\x00abc.",
    "a frame of exabytes": b"\x80\x04\x95" + b"\xff" * 7 + b"\x00abc.",
    "a number of gigabytes": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "a bytearray by number": b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
    "a tensor by number": b"\x80\x02ctorch\nTensor\nJ\xff\xff\xff\x7f\x85R.",
    "a storage by number": b"\x80\x02ctorch.storage\nUntypedStorage\nJ\xff\xff\xff\x7f\x85R.",
    "an object": b"\x80\x02cos\nmkdir\nX\x01\x00\x00\x00m\x85R.",
    "an object with a state": b"\x80\x02ccollections\nOrderedDict\n}b.",
    "a state of a function": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x08\x00\x00\x00__code__K\x01s\x86b.",
    "nothing on the stack": b"\x80\x02R.",
    "no mark": b"\x80\x02t.",
    "no end": b"\x80\x02N",
    "a name without end": b"\x80\x02c" + b"a" * 5000,
    "an unhashable key": b"\x80\x02}]]s.",
    "a list in itself": b"\x80\x02]q\x00h\x00a.",
}


@pytest.mark.parametrize("name", PICKLES)
def test_crafted_pickle_is_refused_at_once(name, tmp_path):
    """In an archive, and in a file of the old format."""
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/data.pkl", PICKLES[name])
    (tmp_path / "b.pt").write_bytes(b"".join(PICKLE_START) + PICKLES[name])
    for file in ("a.pt", "b.pt"):
        with pytest.raises(UserError, match=rf"^[^\n]*{file}[^\n]*$"):
            read_weights(tmp_path / file)


PICKLE_START = (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", b"\x80\x02M\xe9\x03.", b"\x80\x02}.")


@pytest.mark.parametrize("part", [b"}", b"]q\x00", b"K\x01", b"h\x00"])
def test_pickle_of_too_many_parts_is_refused(part, monkeypatch):
    monkeypatch.setattr("clip_retrieval.models.unpickle.MOST_OPCODES", 10_000)
    with pytest.raises(DamagedError, match="more than 10,000 parts"):
        Unpickler(b"\x80\x02Nq\x00" + part * 20_000 + b".", None).load()


def test_deep_nesting_is_read_without_recursion():
    value = Unpickler(b"\x80\x02)" + b"\x85" * 100_000 + b".", None).load()
    for _ in range(100_000):
        (value,) = value
    assert value == ()


def test_names_in_pickles_are_never_imported(monkeypatch):
    """Every name outside the tables is an error, also existing ones and those that torch allows."""
    for name in (
        b"os\nsystem",
        b"builtins\neval",
        b"torch\nload",
        b"torch.jit\nload",
        b"__torch__\nA",
        b"collections\ndeque",
    ):
        with pytest.raises(PythonObjectError):
            Unpickler(b"\x80\x02c" + name + b"\n.", None).load()


def add_entries(path, *entries):
    """Save a tensor and add entries to its archive."""
    torch.save({"w": torch.arange(6.0)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return path


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["a/data.pkl", "a/Data.pkl", "A/data.pkl", "a/data/0", "a/DATA/0"])
def test_two_entries_of_a_name_are_refused(name, tmp_path):
    assert "two entries" in refusal(add_entries(tmp_path / "a.pt", (name, b"\x80\x02N.")))


def test_compressed_tensors_are_refused(tmp_path):
    torch.save({"w": torch.zeros(1_000_000)}, tmp_path / "a.pt")
    entries = zipfile.ZipFile(tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in entries.namelist():
            archive.writestr(name, entries.read(name))
    assert (tmp_path / "b.pt").stat().st_size < 20_000
    assert "compressed" in refusal(tmp_path / "b.pt")


def test_compressed_pickle_has_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("clip_retrieval.models.tensor_files.MOST_TEXT", 10_000)
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + b"N" * 20_000 + b".")
    assert "longer than 10,000 bytes" in refusal(tmp_path / "a.pt")


def test_entry_that_claims_more_than_the_file_is_refused(tmp_path):
    torch.save({"w": torch.arange(6.0)}, tmp_path / "a.pt")
    content = bytearray((tmp_path / "a.pt").read_bytes())
    at = content.rindex(b"PK\x01\x02", 0, content.rindex(b"a/data/0"))
    content[at + 20 : at + 28] = struct.pack("<II", 2**31, 2**31)
    (tmp_path / "a.pt").write_bytes(content)
    assert "longer than the file" in refusal(tmp_path / "a.pt")


def test_storage_that_claims_more_than_its_entry_is_refused(tmp_path):
    torch.save({"w": torch.arange(6.0)}, tmp_path / "a.pt")
    path = rewrite_archive(tmp_path / "a.pt", lambda name, content: content[:8] if name.endswith("data/0") else content)
    assert "longer than its entry" in refusal(path)


def test_special_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "fifo.pt")
    assert "not a regular file" in refusal(tmp_path / "fifo.pt")
    (tmp_path / "link.pt").symlink_to("/dev/zero")
    assert "not a regular file" in refusal(tmp_path / "link.pt")
    assert "folder" in refusal(tmp_path)
    assert "no such" in refusal(tmp_path / "absent.pt")
    (tmp_path / "empty.pt").touch()
    assert "empty" in refusal(tmp_path / "empty.pt")


def test_tar_of_the_first_torch_is_named(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"storages".ljust(257, b"\0") + b"ustar\x0000".ljust(300, b"\0"))
    assert "before 2017" in refusal(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "header",
    [
        b"{" * 50_000,
        b'{"a":{"dtype":"F32","shape":[1000000,1000000],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,400000000000]}}',
        b'{"a":{"dtype":"Q9","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
        b"[]",
    ],
)
@pytest.mark.parametrize("length", [None, 2**40, 2**63])
def test_bogus_safetensors_are_refused(tmp_path, header, length):
    content = struct.pack("<Q", length or len(header)) + header + b"\0" * 4
    (tmp_path / "a.safetensors").write_bytes(content)
    refusal(tmp_path / "a.safetensors")


@pytest.mark.slow
def test_hostile_files_need_little_memory(tmp_path):
    """Read all of them in a process limited to 1.5 GB of address space."""
    torch.save({"w": strided((50_000, 40_000), (0, 0), dtype=torch.float16)}, tmp_path / "a.pt")
    for number, content in enumerate(PICKLES.values()):
        (tmp_path / f"{number}.pt").write_bytes(b"".join(PICKLE_START) + content)
    program = f"""
import resource, pathlib
from clip_retrieval.errors import UserError
from clip_retrieval.models.weights import read_weights
from tests.models.small import small_clip
used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 3 * 2**29,) * 2)
for path in pathlib.Path({str(tmp_path)!r}).glob("*.pt"):
    try:
        read_weights(path)
    except UserError as error:
        assert "memory" not in str(error).lower().replace("a memo of", ""), error
    else:
        raise AssertionError(path)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
