"""Runs with --decoder gpu, on a CPU in place of the GPU."""

import shutil

import pytest
import torch

from clip_retrieval.data.pixels import jpeg
from clip_retrieval.data.pixels.jpeg import JpegTransform
from clip_retrieval.data.pixels.pixels import ImageTransform
from clip_retrieval.data.shards.lanes import LaneReader
from clip_retrieval.data.shards.order import ShardOrder, Shards
from clip_retrieval.data.shards.stream import StreamLoader
from tests.conftest import read_json, read_lines
from tests.data.make_shards import jpeg as make_jpeg
from tests.data.make_shards import write_shard
from tests.data.pixels.test_jpeg import break_tables
from tests.data.shards.test_stream import tokenizer  # noqa: F401
from tests.models.small import small_preprocess
from tests.test_resume import assert_same_ending

CPU = torch.device("cpu")


@pytest.fixture
def cpu_decodes(monkeypatch):
    monkeypatch.setattr(jpeg, "DEVICES", ("cuda", "cpu"))


def losses(folder):
    return [line["loss"] for line in read_lines(folder / "metrics.jsonl") if line["kind"] == "train"]


@pytest.mark.parametrize("extra", [(), ("--augment", "crop", "--num_workers", "1"), ("--freeze_vision",)], ids=str)
def test_run_is_that_of_the_fast_decoder_up_to_pixels(run, arguments, tmp_path, cpu_decodes, extra):
    for decoder in ("fast", "gpu"):
        code, _, err = run(*arguments, *extra, "--decoder", decoder, "--experiments", decoder)
        assert code == 0, err
        assert read_json(tmp_path / f"logs/{decoder}/options.json")["decoder"] == decoder
        assert read_json(tmp_path / f"logs/{decoder}/results.json")["decoder"] == decoder
    fast, gpu = (losses(tmp_path / "logs" / decoder) for decoder in ("fast", "gpu"))
    assert gpu != fast and gpu == pytest.approx(fast, rel=1e-2)
    code, _, err = run("--eval", "--resume", tmp_path / "logs/gpu/best.pt")
    assert code == 0, err
    assert read_json(tmp_path / "logs/gpu/eval_csv_test/results.json")["decoder"] == "gpu"


def test_resume_is_bit_identical(run, run_killed, arguments, tmp_path, cpu_decodes):
    command = [*arguments, "--decoder", "gpu", "--augment", "crop", "--save_every", "2", "--resume", "auto"]
    assert run(*command, "--experiments", "whole")[0] == 0
    run_killed(4, *command)
    assert run(*command)[0] == 0
    assert_same_ending(tmp_path / "logs/whole", tmp_path / "logs/ex0")


@pytest.fixture
def broken(captioned, tmp_path):
    """The data set with an image that is no image, and one that only its decoder finds broken."""
    shutil.copytree(captioned, tmp_path / "broken")
    (tmp_path / "broken/2.jpg").write_bytes(b"no image")
    break_tables(tmp_path / "broken/5.jpg")
    return tmp_path / "broken"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_broken_images_are_replaced_or_stop_the_run(run, arguments, broken, cpu_decodes, num_workers):
    command = [*arguments, "--dataset_root", broken, "--decoder", "gpu", "--num_workers", num_workers]
    code, _, err = run(*command, "--no_eval_first")
    errors = [line for line in err.splitlines() if line.startswith("error")]
    assert code == 2 and len(errors) == 1 and ": not a readable image" in errors[0]
    code, _, err = run(*command, "--skip_broken", "--overwrite")
    assert code == 0, err
    for epoch in (1, 2):  # 35 pairs in 3 batches of 10: nearly all of the five pairs of the two images
        (line,) = [line for line in err.splitlines() if f"epoch {epoch}, batches" in line]
        assert "could not be used, replaced by others" in line and int(line.split(": ")[2].split()[0]) >= 2


def test_gpu_is_refused_without_one(run, arguments, tmp_path, monkeypatch):
    code, _, err = run(*arguments, "--decoder", "gpu")
    assert code == 2 and err == "error: --decoder gpu needs a CUDA device, not cpu; use --decoder fast\n"
    monkeypatch.setattr(jpeg, "DEVICES", ("cpu",))
    assert run(*arguments, "--decoder", "gpu", "--max_steps", "1")[0] == 0
    monkeypatch.setattr(jpeg, "DEVICES", ("cuda",))
    code, _, err = run("--eval", "--resume", tmp_path / "logs/ex0/last.pt")
    assert code == 2 and "--decoder gpu needs a CUDA device" in err
    code, _, err = run("--eval", "--resume", tmp_path / "logs/ex0/last.pt", "--decoder", "fast")
    assert code == 0, err


@pytest.mark.parametrize("extra", [("--augment", "rand"), ("--augment", "auto_flip"), ("--image_cache", "cache")])
def test_options_that_need_pixels_in_the_loader_are_refused(run, arguments, extra):
    code, _, err = run(*arguments, "--decoder", "gpu", *extra)
    assert code == 2 and err.startswith("error: --decoder gpu is not for ") and err.count("\n") == 1


# Shards


@pytest.mark.parametrize("num_workers", [0, 2])
def test_stream_has_the_pairs_and_crops_of_the_fast_decoder(tmp_path, tokenizer, num_workers):  # noqa: F811
    samples = [(f"{i:05}", {"jpg": make_jpeg(i), "txt": f"thing {i}"}) for i in range(24)]
    shards = [write_shard(tmp_path / f"{i}.tar", samples[12 * i :][:12]) for i in range(2)]
    found = []
    for transform in (
        ImageTransform(small_preprocess(), augment="crop", decoder="fast"),
        JpegTransform(small_preprocess(), augment="crop"),
    ):
        order = ShardOrder(Shards(shards), 8, shuffle_buffer=8, seed=3)
        settings = {"trim": True, "num_workers": num_workers, "device": CPU}
        loader = StreamLoader(LaneReader(order, transform), tokenizer, **settings)
        found.append([*loader.epoch(0, 1), *loader.epoch(1)])
    assert len(found[0]) == 5
    for fast, gpu in zip(*found, strict=True):
        assert torch.equal(gpu.texts, fast.texts) and torch.equal(gpu.positives, fast.positives)
        assert (gpu.images.int() - fast.images.int()).abs().max() <= 16 and not torch.equal(gpu.images, fast.images)


def test_stream_replaces_samples_that_prove_unusable(tmp_path, tokenizer, caplog):  # noqa: F811
    (tmp_path / "5.jpg").write_bytes(make_jpeg(5))
    contents = [make_jpeg(i) if i != 5 else break_tables(tmp_path / "5.jpg").read_bytes() for i in range(16)]
    samples = [(f"{i:05}", {"jpg": content, "txt": f"thing {i}"}) for i, content in enumerate(contents)]
    order = ShardOrder(Shards([write_shard(tmp_path / "0.tar", samples)]), 8, shuffle_buffer=4, seed=3)
    reader = LaneReader(order, JpegTransform(small_preprocess()))
    with caplog.at_level("WARNING", "clip_retrieval"):
        batches = list(StreamLoader(reader, tokenizer, trim=False, num_workers=0, device=CPU).epoch(0))
    ids = [tuple(row.tolist()) for batch in batches for row in batch.texts]
    assert len(ids) == 16 and len(set(ids)) == 15
    assert [len(batch.positives) for batch in batches] in ([8, 10], [10, 8])  # the other sample is there twice
    assert "1 sample could not be used, replaced by others" in caplog.messages[-1]
