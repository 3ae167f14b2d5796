"""Training steps are bit-identical from run to run with several CPU threads."""

import json
import os
import subprocess
import sys

import open_clip
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from clip_retrieval.data.batches.loader import TrainBatch
from clip_retrieval.device import deterministic_algorithms
from clip_retrieval.models.towers import RetrievalModel
from clip_retrieval.models.trainable import set_trainable
from clip_retrieval.options import LossOptions, TrainOptions
from clip_retrieval.training.trainer import Trainer
from tests.conftest import ROOT, read_json
from tests.models.small import TEXT, small_clip, small_preprocess, small_towers, token_ids

CPU = torch.device("cpu")
FAMILIES = ["vit", "custom text", "resnet", "timm", "timm swin", "hugging face", "simple-clip", "coca", "siglip text"]
# timm's relative positions and patch dropout index with repetition; only torch's deterministic mode orders their sums.
ACCUMULATING_FAMILIES = ("timm swin",)


def build(family):
    """Build a small model of a family; return it and the side of its images in pixels."""
    if family == "timm swin":
        vision = {"timm_model_name": "swin_tiny_patch4_window7_224", "timm_model_pretrained": False, "image_size": 32}
        vision |= {"timm_pool": "avg", "timm_proj": "linear"}
        timm_clip = open_clip.CustomTextCLIP(embed_dim=24, vision_cfg=vision, text_cfg=TEXT)
        timm_clip.visual.set_input_size(32)
        return timm_clip, 32
    if family == "siglip text":
        text = TEXT | {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}
        return small_clip(custom_text=True, text_cfg=text), 16
    return small_towers(family)


def take_step(family, loss, **options):
    """Train one step on a batch with duplicate images and captions; return the weights."""
    torch.manual_seed(0)
    clip, size = build(family)
    if loss == "siglip" and clip.logit_bias is None:
        clip.logit_bias = torch.nn.Parameter(torch.tensor(-10.0))
    model = RetrievalModel(clip, small_preprocess(size))
    set_trainable(model, learn_scale=loss != "margin", learn_bias=loss == "siglip")
    trainer = Trainer(model.train(), LossOptions(loss=loss), TrainOptions(**options), precision="fp32", device=CPU)
    pairs = 96
    images = torch.randint(0, 256, (pairs, 3, size, size), dtype=torch.uint8)
    lengths = 4 + torch.arange(pairs) % 12
    positives = (torch.arange(pairs)[:, None] // 8 == torch.arange(pairs) // 8).nonzero()
    result = trainer.step(TrainBatch(images, token_ids(lengths.tolist()), positives, lengths), 1, 1e-3)
    return {"loss": result.loss, **{name: value.clone() for name, value in model.weights().items()}}


class AccumulatingIndexPuts(TorchDispatchMode):
    """Counts accumulating index_put_, whose sums depend on the threads."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        accumulates = (args[3] if len(args) > 3 else (kwargs or {}).get("accumulate", False)) is True
        self.count += "index_put" in name and accumulates
        return function(*args, **(kwargs or {}))


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("loss", ["infonce", "siglip", "margin"])
@pytest.mark.parametrize("family", FAMILIES)
def test_step_of_each_family_and_loss_is_deterministic(family, loss, two_threads):
    with deterministic_algorithms(CPU), AccumulatingIndexPuts() as accumulating:
        assert torch.are_deterministic_algorithms_enabled()
        first, second = take_step(family, loss), take_step(family, loss)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert family in ACCUMULATING_FAMILIES or accumulating.count == 0


@pytest.mark.parametrize("options", [{"grad_cache": 32}, {"grad_clip": 0.1}])
def test_step_in_chunks_or_clipped_is_deterministic(options, two_threads):
    with deterministic_algorithms(CPU):
        first, second = take_step("vit", "infonce", **options), take_step("vit", "infonce", **options)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_settings_are_restored_after_the_block():
    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic_algorithms(CPU):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_gpu_is_deterministic_only_on_request(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    cuda = torch.device("cuda")
    with deterministic_algorithms(cuda):
        assert not torch.are_deterministic_algorithms_enabled() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    with deterministic_algorithms(cuda, on_gpu=True):
        assert torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic
        assert not torch.backends.cudnn.benchmark and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.backends.cudnn.deterministic


@pytest.fixture
def busy_cores():
    """Two processes that never sleep, to interrupt other threads at any moment."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    yield
    for process in busy:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_runs_with_two_threads_on_busy_cores_are_bit_identical(arguments, captioned, tmp_path, busy_cores):
    config = json.loads((captioned / "small.json").read_text())
    config["text_cfg"] |= {"width": 128, "heads": 4}
    (tmp_path / "wide.json").write_text(json.dumps(config))
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    checkpoints = []
    for name in ("first", "second"):
        command = [*arguments, "--vision_model", tmp_path / "wide.json", "--batch_size", "35", "--epochs", "12"]
        command += ["--no_eval_first", "--eval_every", "0", "--experiments", name]
        process = [sys.executable, "-c", THREADS.format(root=str(ROOT)), *map(str, command)]
        done = subprocess.run(process, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        checkpoints.append(torch.load(tmp_path / "logs" / name / "last.pt", weights_only=True))
    first, second = checkpoints
    assert first["step"] == 12
    differing = [name for name, value in first["model"].items() if not torch.equal(value, second["model"][name])]
    assert not differing
    moments = zip(first["optimizer"]["state"].values(), second["optimizer"]["state"].values(), strict=True)
    assert all(torch.equal(a[name], b[name]) for a, b in moments for name in a)


# main.py with two threads, for any number of cores
THREADS = """
import sys; sys.path.insert(0, {root!r})
import torch; torch.set_num_threads(2)
import main
from clip_retrieval.errors import run_with_exit_code
sys.exit(run_with_exit_code(main.main))
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("model", ["small.json", "resnet.json"])
def test_deterministic_runs_on_a_gpu_are_bit_identical(run, arguments, captioned, tmp_path, model):
    weights = []
    for name in ("first", "second"):
        command = [*arguments, "--device", "cuda", "--deterministic", "--vision_model", captioned / model]
        code, _, err = run(*command, "--no_eval_first", "--experiments", name)
        assert code == 0, err
        weights.append(torch.load(tmp_path / "logs" / name / "last.pt", weights_only=True)["model"])
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_deterministic_is_recorded(run, arguments, tmp_path):
    code, _, err = run(*arguments, "--deterministic", "--max_steps", "1", "--no_eval_first")
    assert code == 0, err
    assert read_json(tmp_path / "logs/ex0/options.json")["deterministic"] is True
    assert torch.load(tmp_path / "logs/ex0/last.pt", weights_only=True)["options"]["deterministic"] is True
