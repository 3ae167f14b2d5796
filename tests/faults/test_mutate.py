"""Mutations are reproducible, differ from their document, and pass checksums."""

import gzip
import io
import json
import random
import tarfile
import zipfile

import pytest
import torch
from PIL import Image

from tests.faults import containers, structures
from tests.faults.mutate import LONGEST, mutate
from tests.faults.readers.reader import encoded_image

DOCUMENT = json.dumps({"id": 12, "caption": "a red thing", "sizes": [1, 2, 3]}).encode()
OTHERS = (b'{"id": 7}', b"[1, 2]")
TOKENS = (b"null", b"[", b"\0")


def mutations(count, seed=0):
    return [mutate(DOCUMENT, random.Random(f"{seed} {n}"), others=OTHERS, tokens=TOKENS) for n in range(count)]


def test_the_same_seed_gives_the_same_bytes():
    assert mutations(300) == mutations(300)
    assert mutations(300) != mutations(300, seed=1)


def test_most_mutations_differ():
    made = mutations(1000)
    assert sum(each != DOCUMENT for each in made) > 900
    assert len(set(made)) > 800
    assert max(map(len, made)) <= len(DOCUMENT) + LONGEST


def test_each_kind_of_change_is_made():
    made = mutations(2000)
    assert any(len(each) < len(DOCUMENT) and DOCUMENT.startswith(each) for each in made)  # truncated
    assert any(len(each) == len(DOCUMENT) and each != DOCUMENT for each in made)  # bits, bytes, integers
    assert any(b"9223372036854775808" in each for each in made)  # a number
    assert any(b"[" * 40 in each for each in made)  # a token, many times
    assert any(each.startswith(DOCUMENT[:20]) and each.endswith(OTHERS[0][4:]) for each in made)  # spliced


@pytest.mark.parametrize("document", [b"", b"a", b"\0" * 3])
def test_tiny_documents_can_be_changed(document):
    for n in range(500):
        assert isinstance(mutate(document, random.Random(n), tokens=TOKENS), bytes)


def a_tar():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in (("0.txt", b"x" * 700), ("1.txt", b"y")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def a_checkpoint(legacy=False):
    file = io.BytesIO()
    torch.save({"a": torch.arange(5.0), "b": {"c": 1}}, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def safetensors():
    from safetensors.torch import save

    return save({"a": torch.arange(5.0)})


def read_zip(document):
    with zipfile.ZipFile(io.BytesIO(document)) as archive:
        assert archive.testzip() is None  # the checksums are right
        return [archive.read(info) for info in archive.infolist()]


def read_tar(document):
    with tarfile.open(fileobj=io.BytesIO(document)) as tar:
        return [tar.extractfile(info).read() for info in tar]


CONTAINERS = {
    "gzip": (containers.change_gzip, lambda: gzip.compress(b"text " * 9), gzip.decompress),
    "zip": (containers.change_zip, a_checkpoint, read_zip),
    "png": (containers.change_png, lambda: encoded_image(0, "png"), lambda d: Image.open(io.BytesIO(d)).tobytes()),
    "tar": (containers.change_tar, a_tar, read_tar),
    "safetensors": (containers.change_safetensors, safetensors, lambda d: json.loads(d[8 : 8 + d[0]])),
    "base64": (containers.change_base64_lines, lambda: b"1\tYWJj\n2\tZGVm\n", lambda d: d.split(b"\n")),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_container_of_an_unchanged_part_is_unchanged(name):
    container, make, read = CONTAINERS[name]
    document = make()
    for n in range(20):
        assert read(container(document, random.Random(n), bytes)) == read(document)


@pytest.mark.parametrize("name", CONTAINERS)
def test_container_has_the_changed_part(name):
    container, make, _ = CONTAINERS[name]
    document = make()
    unchanged = {container(document, random.Random(n), bytes) for n in range(20)}
    changed = {container(document, random.Random(n), lambda part: b"#" + part[1:]) for n in range(20)}
    assert len(changed - unchanged) > len(unchanged) / 2


def test_value_of_an_lmdb_is_changed(tmp_path):
    document = containers.write_lmdb(tmp_path / "a", [(b"1", b"one"), (b"2", b"two")])
    changed = containers.change_lmdb(document, random.Random(3), lambda part: b"other")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "data.mdb").write_bytes(changed)
    values = [value for _, value in containers._lmdb_items(tmp_path / "b")]
    assert len(values) == 2 and b"other" in values


def test_json_stays_json_and_lines_stay_lines():
    for n in range(200):
        changed = structures.change_json(DOCUMENT, random.Random(n), bytes)
        if b"[[[[" not in changed and b"1000000000000" not in changed:  # too deep, or too long, for Python
            json.loads(changed.decode("utf-8", "surrogatepass"))
        lines = structures.change_json(DOCUMENT + b"\n" + DOCUMENT, random.Random(n), bytes).splitlines()
        assert len(lines) == 2 and DOCUMENT in lines


@pytest.mark.parametrize("legacy", [False, True])
def test_changed_checkpoint_can_be_read(legacy):
    document = a_checkpoint(legacy)
    made = [structures.change_checkpoint(document, random.Random(n), bytes) for n in range(60)]
    read = [torch.load(io.BytesIO(each), weights_only=True) for each in made]
    assert len({repr(each) for each in read}) > 30
