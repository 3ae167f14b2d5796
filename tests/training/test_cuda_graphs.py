"""Replayed graphs give the weights of plain steps; on a CPU, a function that is called again replaces a graph."""

import pytest
import torch
from open_clip.transformer import PatchDropout

from clip_retrieval.data.batches.loader import TrainBatch
from clip_retrieval.device import disable_tf32
from clip_retrieval.distributed import SINGLE_PROCESS
from clip_retrieval.errors import RunError
from clip_retrieval.models.simple_clip_model import SimpleCLIP
from clip_retrieval.models.towers import RetrievalModel
from clip_retrieval.run import train_parts
from clip_retrieval.run.merge import settle
from clip_retrieval.training import cuda_graphs, trainer
from clip_retrieval.training.cuda_graphs import pad_captions
from tests.conftest import read_lines
from tests.models.small import small_clip, small_preprocess, small_simple_config, token_ids

OPTIONS = {
    "plain": {},
    "grad_cache": {"grad_cache": 4},
    "accum_freq": {"accum_freq": 2, "grad_clip": 0.1},
    "freeze_vision": {"freeze_vision": True, "no_feature_cache": True},
    "freeze_text": {"freeze_text": True, "no_feature_cache": True},
    "last layer": {"trainable": "linear_projection"},
    "adaptor": {"trainable": "adaptor"},
    "lora": {"trainable": "lora", "lora_rank": 2},
    "patch_dropout": {"patch_dropout": 0.5},
    "siglip": {"loss": "siglip"},
    "ema": {"ema": 0.9, "lr_text": 0.01},
}
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
PAIRS = 8


class Calls:
    """Calls a function again, in place of a CUDA graph; `made` functions."""

    made = 0
    free = 1 << 40  # bytes

    def __init__(self, device):
        pass

    def __call__(self, function):
        Calls.made += 1
        function()
        return function

    def free_memory(self):
        return self.free


@pytest.fixture
def calls(monkeypatch):
    """Calls functions again instead of CUDA graphs, and compiles nothing."""
    monkeypatch.setattr(Calls, "made", 0)
    monkeypatch.setattr(trainer, "Recorder", Calls)
    monkeypatch.setattr(trainer, "can_compile", lambda _: False)
    monkeypatch.setattr(trainer.Trainer, "replay_graphs", replay_graphs)
    return Calls


def replay_graphs(self):
    self._graphs = cuda_graphs.GraphedTowers(self.towers, self.model, trainer.Recorder(self.device))


def make_batches(device, number):
    """Batches of random images and captions, whose longest caption has the same length."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(number):
        lengths = torch.randint(3, 9, (PAIRS,), generator=generator)
        lengths[0] = 9
        images = torch.randint(0, 256, (PAIRS, 3, 16, 16), dtype=torch.uint8, generator=generator)
        ids = token_ids(lengths.tolist())[:, :9]
        positives = torch.cat([torch.eye(PAIRS).nonzero(), torch.tensor([[0, 1]])])
        yield TrainBatch(*(tensor.to(device) for tensor in (images, ids, positives)), lengths)


def start(device, options, precision):
    """A trainer of a small model."""
    options = settle({"lr": 0.1, "eps": 1.0} | options)
    torch.manual_seed(0)
    adaptor = options.train.trainable == "adaptor"
    bias = -10.0 if options.loss.loss == "siglip" else None
    model = RetrievalModel(small_clip(init_logit_bias=bias), small_preprocess(), adaptor=adaptor).to(device)
    made = train_parts.make_trainer(options.train, options.loss, model, precision, torch.device(device), SINGLE_PROCESS)
    model.train()
    return made


def train(device, options, precision="fp32", steps=6):
    """The losses and the weights after some steps, on the CPU."""
    made = start(device, options, precision)
    with disable_tf32():
        losses = [made.step(batch, n, 0.1).loss.item() for n, batch in enumerate(make_batches(device, steps), 1)]
    averages = [value.cpu() for each in made.averages.values() for value in each.state_dict()["weights"].values()]
    return losses, [*averages, *(value.cpu() for value in made.model.weights().values())]


@pytest.mark.parametrize("name", OPTIONS)
@on_each_device
def test_replayed_steps_give_the_weights_of_plain_ones(name, device, request):
    if device == "cpu":
        request.getfixturevalue("calls")
    plain = train(device, OPTIONS[name])
    replayed = train(device, OPTIONS[name] | {"compile": True})
    assert device != "cpu" or Calls.made > 0
    assert replayed[0] == pytest.approx(plain[0], rel=1e-4)
    for expected, value in zip(plain[1], replayed[1], strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


@on_each_device
def test_replayed_steps_draw_the_masks_of_computed_ones(device, request, monkeypatch):
    if device == "cpu":
        request.getfixturevalue("calls")
    options = {"drop_path": 0.5, "grad_cache": 4, "compile": True}
    replayed = train(device, options)
    monkeypatch.setattr(cuda_graphs.GraphedTowers, "_capture", lambda *_: False)
    computed = train(device, options)
    assert replayed[0] == pytest.approx(computed[0], rel=1e-4)
    for expected, value in zip(computed[1], replayed[1], strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


@on_each_device
def test_replayed_steps_in_bf16_give_the_losses_of_plain_ones(device, request):
    if device == "cpu":
        request.getfixturevalue("calls")
    plain, _ = train(device, {}, "bf16")
    replayed, _ = train(device, {"compile": True}, "bf16")
    assert replayed == pytest.approx(plain, rel=0.02) and plain[-1] != pytest.approx(plain[0], rel=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_are_replayed_on_a_gpu(monkeypatch):
    replays = []
    normal = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda self: (replays.append(self), normal(self)))
    train("cuda", {"compile": True}, "bf16", steps=8)
    assert len(replays) >= 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_replayed_steps_do_not_synchronize_with_the_gpu():
    made = start("cuda", {"compile": True}, "bf16")
    batch = next(make_batches("cuda", 1))
    for number in range(1, 7):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if number > 3 else "default")  # after a capture in the second step
        try:
            made.step(batch, number, 0.1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    made.check_finite()


def test_only_repeated_shapes_are_captured(calls, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MAX_SHAPES", 1)
    one, two = (next(make_batches("cpu", 1)) for _ in range(2))
    two = TrainBatch(two.images[:6], two.texts[:6], two.positives[:6], two.lengths[:6])
    towers = RetrievalModel(small_clip(), small_preprocess())
    graphs = cuda_graphs.GraphedTowers(towers, towers, calls("cpu"))
    made = []
    for batch in (one, two, one, two, two, one):
        features = graphs(batch.images, batch.texts, batch.lengths)
        made.append(calls.made)
        for found, expected in zip(features, towers(batch.images, batch.texts, batch.lengths), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert made == [0, 0, 2, 2, 2, 2]


def test_without_free_memory_the_run_goes_on_without_graphs(calls, monkeypatch):
    monkeypatch.setattr(calls, "free", 0)
    plain = train("cpu", {})
    warnings = []
    monkeypatch.setattr(cuda_graphs.log, "warning", warnings.append)
    losses, weights = train("cpu", {"compile": True})
    assert losses == pytest.approx(plain[0], rel=1e-4)
    for expected, value in zip(plain[1], weights, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    assert len(warnings) == 1 and "not enough memory" in warnings[0] and calls.made == 2


def test_failed_capture_stops_the_run_in_one_line(run, arguments, calls, monkeypatch):
    def fail(self, function):
        function()
        raise RuntimeError("operation not permitted when stream is capturing\nSearch for cudaError")

    monkeypatch.setattr(calls, "__call__", fail)
    code, _, err = run(*arguments, "--compile", "--context_length", "16")
    lines = [line for line in err.splitlines() if not line.startswith("WARNING")]
    assert code == 3 and len(lines) == 1, err
    assert all(words in lines[0] for words in ("--compile", "not permitted when stream is capturing", "drop it"))


@pytest.mark.parametrize("replayed", ["nothing", "other memory"])
def test_wrong_replay_is_noticed(calls, monkeypatch, replayed):
    towers = RetrievalModel(small_clip(), small_preprocess())
    graphs = cuda_graphs.GraphedTowers(towers, towers, calls("cpu"))
    batch = next(make_batches("cpu", 1))
    graphs(batch.images, batch.texts, batch.lengths)

    def record(self, function):
        function()

        def replay():
            if replayed != "nothing":
                with torch.no_grad():
                    towers.clip.visual.proj.mul_(-1)
                function()

        return replay

    monkeypatch.setattr(calls, "__call__", record)
    with pytest.raises(RunError, match="differ"):
        graphs(batch.images, batch.texts, batch.lengths)


def test_models_that_can_be_replayed():
    clip = RetrievalModel(small_clip(), small_preprocess())
    siglip = RetrievalModel(small_clip(custom_text=True), small_preprocess())
    assert cuda_graphs.can_replay(clip) and cuda_graphs.can_replay(siglip)
    dropping = small_clip()
    dropping.visual.patch_dropout = PatchDropout(0.5)  # open_clip's
    for other in (small_clip(resnet=True), dropping, SimpleCLIP(**small_simple_config())):
        assert not cuda_graphs.can_replay(RetrievalModel(other, small_preprocess()))


@pytest.mark.parametrize("longest, captions", [(2, 8), (9, 1), (9, 8), (20, 256), (77, 256), (77, 1024)])
def test_padded_captions_have_few_numbers_of_tokens(longest, captions):
    generator = torch.Generator().manual_seed(0)
    shapes, totals = set(), set()
    for _ in range(20):
        lengths = torch.randint(1, longest + 1, (captions,), generator=generator)
        tokens = torch.randint(1, 100, (captions, longest), generator=generator)
        padded, filled = pad_captions(tokens, lengths)
        assert torch.equal(padded[:captions], tokens) and torch.equal(filled[:captions], lengths)
        assert len(padded) == len(filled) and filled.min() >= 1 and filled.max() <= longest
        multiple = max(16, captions // 2)
        assert filled.sum() % multiple == 0 and filled.sum() - lengths.sum() < multiple + len(padded) - captions
        shapes.add(padded.shape)
        totals.add(int(filled.sum()))
    assert len(shapes) == 1 and len(totals) < 20


def test_captions_of_one_token_are_not_padded():
    tokens, lengths = torch.ones(3, 1), torch.ones(3, dtype=torch.int64)
    assert pad_captions(tokens, lengths) == (tokens, lengths)


def test_whole_run_with_graphs_resumes(run, run_killed, arguments, tmp_path, calls):
    """Of two epochs with --grad_cache, killed in the second one: the weights of a run without graphs."""
    options = ("--eps", "1e-3", "--grad_cache", "5", "--precision", "fp32", "--context_length", "16")
    assert run(*arguments, *options, "--experiments", "plain")[0] == 0
    command = (*arguments, *options, "--compile")
    run_killed(5, *command, "--save_every", "2")
    code, _, err = run(*command, "--resume", "auto")
    assert code == 0 and calls.made > 0, err
    weights = [torch.load(tmp_path / f"logs/{name}/last.pt", weights_only=True)["model"] for name in ("plain", "ex0")]
    for name, plain in weights[0].items():
        torch.testing.assert_close(weights[1][name], plain, rtol=1e-3, atol=1e-5, msg=name)
    losses = []
    for name in ("plain", "ex0"):
        lines = read_lines(tmp_path / f"logs/{name}/metrics.jsonl")
        losses.append([line["loss"] for line in lines if line["kind"] == "train"])
    assert len(losses[0]) == 6 and losses[1] == pytest.approx(losses[0], rel=1e-3)
