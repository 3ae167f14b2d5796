"""scripts/evaluate_features.py from the command line."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from clip_retrieval.errors import run_with_exit_code
from clip_retrieval.evaluation.metrics import report
from clip_retrieval.evaluation.ranks import retrieval_ranks

SCRIPT = Path(__file__).parents[2] / "scripts" / "evaluate_features.py"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run the script in this process, in its own folder: (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(SCRIPT.parent)
    spec = importlib.util.spec_from_file_location("evaluate_features", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["evaluate_features.py", *arguments])
        try:
            code = run_with_exit_code(script.main)
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def files(tmp_path):
    """a.npy, b.npy, m.npy (text to image) and p.npy (text, image); text 3 has two images."""
    rng = np.random.default_rng(0)
    np.save(tmp_path / "a.npy", rng.normal(size=(6, 8)).astype(np.float32))
    np.save(tmp_path / "b.npy", rng.normal(size=(10, 8)).astype(np.float32))
    np.save(tmp_path / "m.npy", np.arange(10) % 6)
    np.save(tmp_path / "p.npy", np.array([[text, text % 6] for text in range(10)] + [[3, 5]]))
    return tmp_path


BOTH = ("--image_features", "a.npy", "--text_features", "b.npy", "--results", "out.json")


def expected(folder, pairs, scale=False):
    images, texts = np.load(folder / "a.npy").astype(np.float64), np.load(folder / "b.npy").astype(np.float64)
    if scale:
        images /= np.linalg.norm(images, axis=1, keepdims=True)
        texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    return {"images": 6, "captions": 10, **report(*retrieval_ranks(images, texts, pairs))}


def test_text_to_image(run, files):
    code, out, err = run(*BOTH, "--text_to_image", "m.npy")
    assert (code, err) == (0, "")
    results = json.loads((files / "out.json").read_text())
    assert results == expected(files, [[text % 6, text] for text in range(10)])
    assert "R@10" in out and f"{results['rsum']:.2f}" in out and "out.json" in out
    assert sorted(path.name for path in files.iterdir()) == ["a.npy", "b.npy", "m.npy", "out.json", "p.npy"]


def test_pairs_take_precedence_with_the_text_row_first(run, files):
    assert run(*BOTH, "--text_to_image", "m.npy", "--pairs", "p.npy")[0] == 0
    pairs = [[text % 6, text] for text in range(10)] + [[5, 3]]
    assert json.loads((files / "out.json").read_text()) == expected(files, pairs)


def test_normalize_option(run, files):
    pairs = [[text % 6, text] for text in range(10)]
    normalized = expected(files, pairs, scale=True)
    np.save(files / "a.npy", np.load(files / "a.npy") * 2.0 ** np.array([[0], [9], [664], [-3], [-664], [1]]))
    assert run(*BOTH, "--text-to-image", "m.npy", "--normalize")[0] == 0
    assert json.loads((files / "out.json").read_text()) == normalized
    assert run(*BOTH, "--text-to-image", "m.npy")[0] == 0
    assert json.loads((files / "out.json").read_text()) == expected(files, pairs) != normalized


def test_further_k_and_device(run, files):
    assert run(*BOTH, "--text_to_image", "m.npy", "--recall-k", "3", "7", "--device", "cpu")[0] == 0
    assert "R@3" in (block := json.loads((files / "out.json").read_text())["i2t"]) and "R@7" in block
    code, _, err = run(*BOTH, "--text_to_image", "m.npy", "--device", "abacus")
    assert code == 2 and "abacus" in err


class Malice:
    def __reduce__(self):
        return Path.touch, (Path("unpickled"),)


def npy(name, array):
    return lambda folder: np.save(folder / name, array, allow_pickle=True)


def poison(folder):
    features = np.load(folder / "a.npy")
    features[4, 2] = np.nan
    np.save(folder / "a.npy", features)


@pytest.mark.parametrize(
    "spoil, names",
    [
        (lambda folder: (folder / "a.npy").unlink(), ["a.npy", "cannot be read"]),
        (lambda folder: (folder / "a.npy").write_text("not an array"), ["a.npy", "numpy.save"]),
        (lambda folder: (folder / "a.npy").write_bytes(b""), ["a.npy", "numpy.save"]),
        (lambda folder: (folder / "a.npy").write_bytes((folder / "a.npy").read_bytes()[:-9]), ["a.npy", "numpy.save"]),
        (npy("a.npy", np.array([Malice()])), ["a.npy", "numpy.save"]),
        (npy("a.npy", np.ones(6)), ["a.npy", "(6,)"]),
        (npy("a.npy", np.ones((0, 8))), ["a.npy", "(0, 8)"]),
        (npy("a.npy", np.ones((6, 8), int)), ["a.npy", "int64"]),
        (npy("b.npy", np.ones((10, 7))), ["a.npy", "b.npy", "8", "7"]),
        (npy("m.npy", np.zeros(9, int)), ["m.npy", "(9,)", "(10,)"]),
        (npy("m.npy", np.zeros(10)), ["m.npy", "float64"]),
        (npy("m.npy", np.arange(10)), ["m.npy", "row 6", "image row 6", "there are 6"]),
        (npy("p.npy", np.zeros((4, 3), int)), ["p.npy", "(4, 3)"]),
        (npy("p.npy", np.zeros((0, 2), int)), ["p.npy", "(0, 2)"]),
        (npy("p.npy", np.array([[0, 0], [10, 0]])), ["p.npy", "row 1", "text row 10"]),
        (npy("p.npy", np.array([[0, -1]])), ["p.npy", "row 0", "image row -1"]),
        (poison, ["row 4 of a.npy", "not finite"]),
        (lambda folder: (folder / "out.json").mkdir(), ["out.json", "folder"]),
    ],
)
@pytest.mark.filterwarnings("error")
def test_bad_input_is_one_line_and_writes_nothing(run, files, spoil, names):
    spoil(files)
    before = sorted(path.name for path in files.iterdir())
    which = ("--pairs", "p.npy") if "p.npy" in names else ("--text_to_image", "m.npy")
    for options in ((), ("--normalize",)):
        code, out, err = run(*BOTH, *which, *options)
        assert (code, out) == (2, "") and err.count("\n") == 1 and all(name in err for name in names), err
    assert sorted(path.name for path in files.iterdir()) == before


@pytest.mark.parametrize(
    "arguments, names",
    [
        (BOTH, ["--text_to_image", "--pairs"]),
        (BOTH[2:], ["--image_features"]),
        ((*BOTH[:-1], "no/such/folder/out.json", "--text_to_image", "m.npy"), ["no/such/folder/out.json"]),
        ((*BOTH, "--text_to_image", "m.npy", "--recall_k", "0"), ["recall", "0"]),
    ],
)
def test_bad_usage_is_one_line(run, files, arguments, names):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "") and err.count("\n") == 1 and all(name in err for name in names), err


def test_zero_feature_cannot_be_normalized(run, files):
    np.save(files / "b.npy", np.eye(10, 8))
    code, _, err = run(*BOTH, "--text_to_image", "m.npy", "--normalize")
    assert code == 2 and "b.npy" in err and "row 8" in err
    assert run(*BOTH, "--text_to_image", "m.npy")[0] == 0


def test_runs_from_a_bare_clone(files):
    run = subprocess.run([sys.executable, SCRIPT, "--help"], cwd=files, capture_output=True, text=True)
    assert run.returncode == 0 and "--image_features" in run.stdout
