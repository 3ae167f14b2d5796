"""Each benchmark runs at its smallest size and prints its table; see benchmarks/README.md for its results."""

import importlib
import importlib.util
import sys
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from clip_retrieval.models.pooled import BLOCK_FUNCTIONS, Packing, Positions
from tests.conftest import ROOT
from tests.models.small import small_clip

pytestmark = pytest.mark.slow


@pytest.fixture
def run_benchmark(monkeypatch, capsys):
    """run_benchmark(name, *arguments) runs a script of benchmarks/ in this process; returns its rows of cells."""
    threads = torch.get_num_threads()

    def run(name, *arguments):
        monkeypatch.syspath_prepend(ROOT / "benchmarks")
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        importlib.import_module(name).main()
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]

    yield run
    torch.set_num_threads(threads)


def test_ranks(run_benchmark):
    header, _, row = run_benchmark("ranks", "--sizes", "20/100", "--repeats", 1, "--peer_up_to", 0)
    assert header[:4] == ["images / captions", "ours (s)", "bare (s)", "ratio"]
    assert row[0] == "20 / 100" and float(row[3]) > 0


def test_knn(run_benchmark):
    header, _, row = run_benchmark("knn", "--sizes", "40/200", "--dim", 16, "--patience", 4)
    assert header[3] == "ours, both (s)" and float(row[3]) > 0
    same, _, queries = row[11].partition(" of ")
    assert same == queries and "NOT" not in "".join(row)
    assert (int(queries) > 0) == bool(importlib.util.find_spec("cn_clip"))


def test_input(run_benchmark, real_data):
    table = run_benchmark("input", real_data / "coco_mini", "--images", 2, "--repeats", 1, "--size", 32)
    assert table[0][:2] == ["evaluation", "ms / image"]
    assert [row for row in table if row[0] == "random crops"]


def test_train_step(run_benchmark, real_data):
    settings = ("--models", "tiny", "--batch_sizes", 4, "--repeats", 1, "--steps", 1, "--device", "cpu")
    rows = ("open_clip", "ours", "no_trim", "no_fused", "grad_cache")
    header, _, *found = run_benchmark("train_step", *settings, "--only", *rows, "--peak_tflops", 1)
    assert header[3:6] == ["pairs/s", "ratio to open_clip", "MFU (%)"]
    assert len(found) == len(rows) and all(float(row[3]) > 0 and float(row[5]) > 0 for row in found)


def test_evaluation(run_benchmark, real_data):
    rows = ["ours", "five_times"] + ["clip_benchmark"] * bool(importlib.util.find_spec("clip_benchmark"))
    settings = ("--vision_model", "tiny", "--images", 12, "--num_workers", 0, "--device", "cpu")
    header, _, *found = run_benchmark("evaluation", *settings, "--rows", *rows)
    assert header[1:4] == ["images / captions", "seconds", "ratio"]
    assert [row[0] for row in found] == rows
    recalls = [[float(cell) for cell in row[-2:]] for row in found]
    assert all(recall == pytest.approx(recalls[0], abs=9) for recall in recalls)  # equal up to a close score


def test_end_to_end(run_benchmark, real_data):
    rows = ("step", "fast")
    settings = ("--models", "tiny", "--batch_size", 4, "--steps", 25, "--num_workers", 1, "--device", "cpu")
    header, _, *found = run_benchmark("end_to_end", real_data / "flickr8k", *settings, "--rows", *rows)
    assert header[3:] == ["pairs/s", "of the step alone", "data (%)", "first 20 steps (s)"]
    assert [row[2] for row in found] == list(rows)
    assert all(float(row[3].replace(",", "")) > 0 for row in found) and float(found[1][6]) > 1


def test_html_report(run_benchmark, captioned, tmp_path):
    for path in captioned.glob("*.jpg"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    header, _, *found = run_benchmark("html_report", tmp_path, "--size", 40, "--threads", 1)
    assert header == ["runs", "images / captions", "seconds", "CPU seconds", "MB"]
    assert [row[:2] for row in found] == [["1", "40 / 200"], ["2", "40 / 200"]]
    assert all(0 < float(row[4]) < 10 for row in found)


def test_varlen_block_computes_a_packed_block(monkeypatch):
    """On a GPU, torch's varlen_attn takes the place of this loop over the captions."""

    def attend(q, k, v, starts, _, longest, __, window_size):
        assert window_size == (-1, 0) and int(starts.diff().max()) <= longest
        parts = []
        for begin, end in pairwise(starts):
            heads = (each[begin:end].transpose(0, 1) for each in (q, k, v))
            parts.append(F.scaled_dot_product_attention(*heads, is_causal=True).transpose(0, 1))
        return torch.cat(parts)

    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    train_step = importlib.import_module("train_step")
    monkeypatch.setattr(train_step, "varlen_attn", attend)
    lengths = torch.tensor([3, 1, 5, 2])
    pack = Packing.of(Positions.of(lengths, torch.device("cpu")), lengths - 1)
    block, x = small_clip().transformer.resblocks[0], torch.randn(11, 32)
    torch.testing.assert_close(train_step.varlen_block(block, x, pack), BLOCK_FUNCTIONS.packed_block(block, x, pack))
