"""TorchScript archives are read without torch.jit.load: the same state dict, and no code runs."""

import io
import re
import warnings
import zipfile

import pytest
import torch
from torch import Tensor, nn

from clip_retrieval.errors import UserError
from clip_retrieval.models.tensor_files import read_tensor_file
from clip_retrieval.models.weights import read_weights
from tests.models.small import small_clip
from tests.models.test_tensor_files import is_equal, rewrite_archive
from tests.models.test_weights import jit_archive


class Leaf(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4).half().t())
        self.register_buffer("scalar", torch.tensor(4.0))
        self.register_buffer("fleeting", torch.arange(2), persistent=False)
        self.attribute = torch.ones(2)  # no part of a state dict
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.float() + self.scalar + self.attribute.sum()


class Tree(nn.Module):
    maybe: Tensor | None

    def __init__(self):
        super().__init__()
        self.leaf = Leaf()
        self.same_leaf = self.leaf
        self.layers = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Conv1d(3, 3, 1))
        self.leaves = nn.ModuleList([Leaf(), Leaf()])
        self.by_name = nn.ModuleDict({"Upper": nn.Linear(3, 1), "lower": nn.Linear(1, 1)})
        self.tied = self.layers[0].weight
        self.frozen = nn.Parameter(torch.randn(8)[2:6], requires_grad=False)
        self.register_buffer("strided", torch.randn(4, 6)[::2, 1:4])
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("vocab_size", torch.tensor(49408))
        self.maybe = torch.ones(3)
        self.listed = [torch.ones(1), torch.zeros(2)]
        self.counts = {"a": 1}
        self.sizes = [1, 2, 3]
        self.number, self.fraction, self.name, self.large, self.nothing = 3, 2.5, "x", 2**40, None

    def forward(self, x: Tensor) -> Tensor:
        maybe = self.maybe
        if maybe is not None:
            x = x + maybe
        for leaf in self.leaves:
            x = x + leaf(x).sum()
        x = self.layers[0](x) + self.listed[0] + self.counts["a"] + self.sizes[0] + self.number + self.fraction
        return self.leaf(x).sum() + self.same_leaf(x).sum() + self.strided.sum() + self.tied.sum()


class Traceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 3)))
        self.shared = self.layers[1][1]
        self.register_buffer("input_resolution", torch.tensor(16))
        self.register_buffer("mask", torch.eye(3, dtype=torch.bool))

    def forward(self, x):
        return self.shared(self.layers(x)).masked_fill(self.mask, 0) + torch.tensor([1.0, 2.0, 3.0])


@pytest.fixture(params=["scripted", "traced", "clip", "half precision"])
def archive(request, tmp_path):
    """A TorchScript archive that may be trusted."""
    torch.manual_seed(0)
    path = tmp_path / "model.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if request.param == "clip":
            jit_archive(small_clip(), path)
        elif request.param == "scripted":
            torch.jit.save(torch.jit.script(Tree()), str(path))
        else:
            traced = torch.jit.trace(Traceable(), torch.randn(3, 3), check_trace=False)
            torch.jit.save(traced.half() if request.param == "half precision" else traced, str(path))
    return path


def load_with_torch(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dict(torch.jit.load(str(path), map_location="cpu").state_dict())


def test_state_dict_equals_torch(archive):
    file = read_tensor_file(archive)
    assert file.is_torchscript
    assert is_equal(file.content, load_with_torch(archive))


def test_containers_of_older_torch_are_read_the_same(archive):
    expected = load_with_torch(archive)
    # torch 1.7 wrote neither the order of bytes nor an id.
    old = rewrite_archive(archive, drop=("byteorder", "serialization_id", ".debug_pkl"))
    assert is_equal(read_tensor_file(old).content, expected)
    other_root = rewrite_archive(old, rename=lambda name: name.replace("model/", "ViT-B-32/", 1))
    assert is_equal(read_tensor_file(other_root).content, expected) and is_equal(load_with_torch(other_root), expected)
    # Before torch 1.6 a class named its parameters alone.
    without = rewrite_archive(old, lambda name, content: re.sub(rb"  __buffers__ = [^\n]*\n", b"", content))
    assert is_equal(read_tensor_file(without).content, load_with_torch(without))


class OwnState(nn.Module):
    """TorchScript that writes a file when torch restores it."""

    def __init__(self):
        super().__init__()
        self.weight = torch.ones(3)

    def forward(self, x):
        return x + self.weight

    @torch.jit.export
    def __getstate__(self):
        return (self.weight, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, bool]):
        torch.save(state[0], "marker")
        self.weight = state[0]
        self.training = state[1]


def test_code_in_an_archive_never_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(OwnState()), "own.pt")
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), "plain.pt")
    with pytest.raises(UserError, match=r"own.pt .*its own code"):
        read_weights("own.pt")
    # A default argument that creates a file when torch.jit.load evaluates it.
    default = b'input: Tensor=torch.from_file("marker", True, 4))'
    evil = rewrite_archive(tmp_path / "plain.pt", lambda _, content: content.replace(b"input: Tensor)", default))
    assert set(read_weights(evil).state) == {"weight", "bias"}
    assert not (tmp_path / "marker").exists()


def test_code_in_a_folder_of_another_case_is_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(tmp_path / "a.pt"))
    path = rewrite_archive(tmp_path / "a.pt", rename=lambda name: name.replace("/code/", "/Code/"))
    with pytest.raises(UserError, match="declares no module"):
        read_tensor_file(path)


def make_pickle(*parts):
    return b"\x80\x02" + b"".join(parts) + b"."


@pytest.mark.parametrize(
    "content",
    [
        # A module in itself.
        make_pickle(b"c__torch__\nA\n)\x81q\x00}X\x01\x00\x00\x00ah\x00sb"),
        # Modules of which each holds the one before twice: 2 to the 40.
        make_pickle(
            b"c__torch__\nA\n)\x81}bq\x00",
            *(b"c__torch__\nA\n)\x81}(X\x01\x00\x00\x00ah\x00X\x01\x00\x00\x00bh\x00ubq\x00" for _ in range(40)),
        ),
    ],
)
def test_modules_without_end_are_refused(tmp_path, content):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/data.pkl", content)
        archive.writestr("a/constants.pkl", b"\x80\x02).")
        archive.writestr("a/code/__torch__.py", "class A(Module):\n  __parameters__ = []\n  __buffers__ = []\n")
    with pytest.raises(UserError, match="nested without end"):
        read_tensor_file(tmp_path / "a.pt")


def test_archive_of_other_objects_is_refused(tmp_path):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("a/data.pkl", make_pickle(b"cos\nmkdir\n)\x81"))
        archive.writestr("a/constants.pkl", b"\x80\x02).")
    (tmp_path / "a.pt").write_bytes(content.getvalue())
    with pytest.raises(UserError, match="Python objects"):
        read_tensor_file(tmp_path / "a.pt")
