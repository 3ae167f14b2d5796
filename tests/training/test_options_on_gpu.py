"""The options of the training step on a GPU: finite losses in bf16, no wait for the GPU, and the weights of a CPU.

Each test also runs on a CPU as far as it can.
"""

import copy
from collections import Counter

import pytest
import timm.layers.patch_dropout
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from clip_retrieval.data.batches.loader import TrainBatch
from clip_retrieval.data.batches.word_dropout import WordDropout
from clip_retrieval.device import disable_tf32
from clip_retrieval.distributed import SINGLE_PROCESS
from clip_retrieval.models.drop_path import DropPathBlock
from clip_retrieval.models.towers import RetrievalModel
from clip_retrieval.run.merge import settle
from clip_retrieval.run.train_parts import make_trainer
from clip_retrieval.training.average import SWA
from clip_retrieval.training.distillation import Distillation
from tests.conftest import read_json, read_lines
from tests.models.small import small_clip, small_preprocess, token_ids

OPTIONS = {
    "plain": {},
    "lora": {"trainable": "lora", "lora_targets": "all", "lora_rank": 2},
    "lora_dropout": {"trainable": "lora", "lora_rank": 2, "lora_dropout": 0.2},
    "bitfit": {"trainable": "bitfit"},
    "layer_decay": {"layer_decay": 0.5, "lr_text": 0.01},
    "ema": {"ema": 0.9},
    "swa": {"swa_start": 1},
    "distill feature": {"distill_from": "start", "distill_kind": "feature"},
    "distill relational": {"distill_from": "start", "distill_kind": "relational", "grad_cache": 3},
    "drop_path": {"drop_path": 0.5},
    "patch_dropout": {"patch_dropout": 0.5},
    "word_dropout": {"word_dropout": 0.3},
    "label_smoothing": {"label_smoothing": 0.1, "i2t_weight": 0.7},
    "temperature": {"temperature": 0.05},
    "triplet": {"loss": "triplet"},
    "grad_checkpointing": {"grad_checkpointing": True, "drop_path": 0.5},
}
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
each_option = pytest.mark.parametrize("name", OPTIONS)
on_each_device = pytest.mark.parametrize("device", DEVICES)


class Batches:
    """A loader of batches on a device."""

    def __init__(self, device, number=4, pairs=8):
        lengths = torch.arange(pairs) % 5 + 4
        ids = token_ids(lengths.tolist())[:, : int(lengths.max())]
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (number, pairs, 3, 16, 16), dtype=torch.uint8, generator=generator)
        positives = torch.eye(pairs).nonzero()
        self.batches = [TrainBatch(*(t.to(device) for t in (each, ids, positives)), lengths) for each in images]

    def epoch(self, epoch, first_batch=0):
        return iter(self.batches[first_batch:])


def start(name, device, precision="bf16"):
    """step(number) trains one step with the option and returns its loss; and the trainer."""
    options = settle({"lr": 0.1, "eps": 1.0} | OPTIONS[name])
    device = torch.device(device)
    torch.manual_seed(0)
    model = RetrievalModel(small_clip(), small_preprocess()).to(device)
    trainer = make_trainer(options.train, options.loss, model, precision, device, SINGLE_PROCESS)
    if options.loss.distill_from:
        teacher = copy.deepcopy(model)
        for parameter in teacher.parameters():  # of another model: the first step has a loss too
            parameter.data.mul_(1.5)
        teacher = teacher if precision == "fp32" else teacher.copy_in(torch.bfloat16)
        trainer.distillation = Distillation(teacher, options.loss.distill_kind, 1.0, SINGLE_PROCESS)
    loader = Batches(device)
    if options.data.word_dropout:
        loader = WordDropout(loader, options.data.word_dropout, pad=0, seed=1)
    batches = loader.epoch(0)
    model.train()

    def step(number):
        result = trainer.step(next(batches), number, 0.1)
        if SWA in trainer.averages:
            trainer.averages[SWA].update()
        return result.loss

    return step, trainer


@each_option
@on_each_device
def test_three_steps_in_bf16_are_finite_and_change_the_weights(name, device):
    step, trainer = start(name, device)
    before = {key: value.clone() for key, value in trainer.model.weights().items()}
    losses = [step(number).item() for number in (1, 2, 3)]
    trainer.check_finite()
    trainer.check_weights_finite()
    assert all(0 < loss < 100 for loss in losses)
    after = trainer.model.weights()
    changed = [key for key, value in after.items() if not torch.equal(value, before[key])]
    assert changed and all(after[key].dtype == before[key].dtype for key in changed)
    for average in trainer.averages.values():
        assert average.updates == 3 and all(
            value.isfinite().all() for value in average.state_dict()["weights"].values()
        )


class Waits(TorchDispatchMode):
    """Counts operations that would wait for a GPU, because a value or a shape depends on the data."""

    OPERATIONS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount", "equal")

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.overloadpacket.__name__
        if name in self.OPERATIONS:
            self.found[name] += 1
        if name.startswith("index") and any(t is not None and t.dtype == torch.bool for t in _indices(arguments)):
            self.found["index by a mask"] += 1
        return function(*arguments, **(keywords or {}))


def _indices(arguments):
    return [t for t in arguments[1] if isinstance(t, torch.Tensor)] if isinstance(arguments[1], (list, tuple)) else []


def count_waits(name):
    step, _ = start(name, "cpu")
    step(1)
    with Waits() as waits:
        step(2)
    return waits.found


def test_waits_are_counted():
    with Waits() as waits:
        values = torch.ones(3)
        values[values > 0].sum().item()
        values.nonzero()
    assert waits.found == {"index by a mask": 1, "_local_scalar_dense": 1, "nonzero": 1}


@each_option
def test_option_adds_no_operation_that_waits_for_a_gpu(name, monkeypatch):
    found = count_waits(name)
    # packing captions needs their lengths, which are on the CPU; a teacher packs them again
    monkeypatch.setitem(OPTIONS, name, {key: value for key, value in OPTIONS[name].items() if key == "grad_cache"})
    allowed = count_waits(name)
    factor = 2 if name.startswith("distill") else 1
    assert all(number <= factor * allowed[operation] for operation, number in found.items()), (found, allowed)


# (checkpointing saves the state of the GPU's generator)
@pytest.mark.parametrize("name", sorted(OPTIONS.keys() - {"grad_checkpointing"}))
@pytest.mark.parametrize("device", DEVICES[1:])
def test_step_does_not_synchronize_with_the_gpu(name, device):
    step, trainer = start(name, device)
    step(1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in (2, 3, 4):
            step(number)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    trainer.check_finite()


@pytest.fixture
def draws_of_the_cpu(monkeypatch):
    """Random numbers that do not depend on the device."""

    def draw(*shape, device, dtype=None):
        return torch.rand(*shape, generator=torch.Generator().manual_seed(3)).to(device, dtype)

    keep = torch.tensor([1.0, 0, 1, 1, 0, 1, 0, 1])
    monkeypatch.setattr(DropPathBlock, "draw_factors", lambda block, like, items: keep[:items].to(like) * 2)
    fake = type("Torch", (), {"__getattr__": lambda self, name: getattr(torch, name), "randn": staticmethod(draw)})()
    monkeypatch.setattr(timm.layers.patch_dropout, "torch", fake)


@each_option
@on_each_device
def test_weights_in_float32_are_those_of_a_cpu(name, device, draws_of_the_cpu):
    if name == "lora_dropout":
        pytest.skip("a GPU draws other numbers")
    found = []
    for each in ("cpu", device):
        with disable_tf32():
            step, trainer = start(name, each, "fp32")
            losses = torch.stack([step(number) for number in (1, 2, 3)]).cpu()
        averages = [value.cpu() for a in trainer.averages.values() for value in a.state_dict()["weights"].values()]
        found.append([losses, *averages, *(value.cpu() for value in trainer.model.weights().values())])
    for expected, value in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


@on_each_device
@pytest.mark.parametrize("extra", [("--retention_dataset", "csv", "--retention_weight", "1"), ("--swa_start", "1")])
def test_whole_run_of_options_outside_the_step(run, arguments, tmp_path, device, extra):
    code, _, err = run(*arguments, "--device", device, *extra)
    assert code == 0, err
    assert len([line for line in read_lines(tmp_path / "logs/ex0/metrics.jsonl") if line["kind"] == "train"]) == 6
    assert read_json(tmp_path / "logs/ex0/results.json")["rsum"] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("extra", [(), ("--augment", "crop", "--num_workers", "1", "--skip_broken")])
def test_whole_run_with_images_decoded_on_the_gpu(run, arguments, tmp_path, extra):
    losses = []
    for decoder in ("fast", "gpu"):
        name = ("--decoder", decoder, "--experiments", decoder)
        code, _, err = run(*arguments, "--device", "cuda", "--precision", "fp32", *extra, *name)
        assert code == 0 and "only the CPU decodes" not in err, err
        lines = read_lines(tmp_path / f"logs/{decoder}/metrics.jsonl")
        losses.append([line["loss"] for line in lines if line["kind"] == "train"])
    assert len(losses[0]) == 6 and losses[1] == pytest.approx(losses[0], rel=0.05)
