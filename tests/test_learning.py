"""A few training steps on drawn shapes give a recall far above chance."""

import pytest

from tests.conftest import read_json


@pytest.mark.slow
def test_a_few_steps_from_scratch_beat_chance(run, tmp_path):
    data = ("--dataset", "shapes", "--dataset_root", tmp_path, "--vision_model", "tiny", "--device", "cpu")
    steps = ("--max_steps", "40", "--batch_size", "128", "--lr", "1e-3", "--warmup", "10")
    code, _, err = run(*data, *steps, "--checkpoint_path", tmp_path / "logs", "--eval_every", "0")
    assert code == 0, err
    results = read_json(tmp_path / "logs/ex0/results.json")
    assert results["images"] == 500
    # Chance is 2 percent.
    assert results["before"]["i2t"]["R@10"] < 4
    assert results["i2t"]["R@10"] > 20 and results["t2i"]["R@10"] > 20
