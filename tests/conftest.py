import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

# Small models on shared cores: threads that wait for each other cost more than they gain.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from PIL import Image

from clip_retrieval.command_line import parse
from clip_retrieval.errors import run_with_exit_code
from clip_retrieval.log import log
from tests.models.small import small_config, small_simple_config

ROOT = Path(__file__).parent.parent
WORDS = ("red", "green", "blue", "dark", "light", "small", "large", "round", "old", "new")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """Escape text that is not UTF-8: pytest-xdist sends reports as UTF-8."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(autouse=True)
def default_signals():
    """Restore the default signal handlers before each test, after the fixtures of its module.

    A stopped program, and a background job of a shell, ignore signals, and all processes that they start inherit that.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def skip_fsync(monkeypatch):
    """Skip fsync: no file of a test has to survive a power failure."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(autouse=True)
def close_log_files():
    """Close log.txt after each test, so the next one does not write to it."""
    yield
    for handler in [handler for handler in log.handlers if hasattr(handler, "path")]:
        log.removeHandler(handler)
        handler.close()


@pytest.fixture
def real_data() -> Path:
    """The folder of real datasets."""
    if not (folder := os.environ.get("CLIP_RETRIEVAL_DATA")):
        pytest.skip("CLIP_RETRIEVAL_DATA is not set")
    return Path(folder)


@pytest.fixture(scope="session")
def captioned(tmp_path_factory):
    """A folder with a CSV of 26 small images in three splits, two or three captions each, and three model configs."""
    folder = tmp_path_factory.mktemp("captioned")
    rng = np.random.default_rng(0)
    lines = ["image,caption,split"]
    for number, split in enumerate(["train"] * 14 + ["val"] * 6 + ["test"] * 6):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{number}.jpg")
        for _ in range(2 + number % 2):
            lines.append(f"{number}.jpg,a {' '.join(rng.choice(WORDS, 4))} thing,{split}")
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")
    (folder / "small.json").write_text(json.dumps(small_config()))
    (folder / "resnet.json").write_text(json.dumps(small_config(resnet=True)))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "thing", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "simple.json").write_text(json.dumps(small_simple_config(len(words), vocab=words)))
    return folder


@pytest.fixture(scope="session")
def negated(captioned, tmp_path_factory):
    """The captions of `captioned` with a column `wrong`: two negative captions, one, or none."""
    folder = tmp_path_factory.mktemp("negated", numbered=False)
    lines = []
    for number, line in enumerate((captioned / "captions.csv").read_text().splitlines()):
        image, caption, split = line.split(",")
        wrong = ["", caption.replace("thing", "ghost"), f"['{caption} not', '{caption} never']"][number % 3]
        place = f"{captioned / image}" if number else image
        lines.append(f"{place},{caption},{split}," + (f'"{wrong}"' if number else "wrong"))
    path = folder / "captions.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def arguments(captioned, tmp_path):
    """Arguments of a small finetune into tmp_path/logs: 35 pairs, 6 steps of 10 pairs in two epochs."""
    return [
        *("--dataset", "csv", "--dataset_root", captioned, "--vision_model", captioned / "small.json"),
        *("--epochs", "2", "--batch_size", "10", "--lr", "1e-3", "--warmup", "2", "--display", "1"),
        *("--num_workers", "0", "--device", "cpu", "--checkpoint_path", tmp_path / "logs"),
    ]


@pytest.fixture
def run(capsys):
    """run(*arguments) runs main.py in this process: (exit code, standard output, standard error)."""

    def run_main(*arguments):
        def main():
            typed = parse([str(argument) for argument in arguments])
            if typed.get("eval"):
                from clip_retrieval.evaluate import evaluate as program
            else:
                from clip_retrieval.finetune import finetune as program
            return program(typed)

        capsys.readouterr()
        try:
            code = run_with_exit_code(main)
        except SystemExit as exit:
            code = exit.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_main


class Killed(BaseException):
    """Replaces SIGKILL: no code of the run handles it."""


@pytest.fixture
def run_killed(run, monkeypatch):
    """run_killed(number, *arguments) runs main.py and kills it before the training step with this number."""

    def run_until_step(number, *arguments):
        from clip_retrieval.training.trainer import Trainer

        normal = Trainer.step

        def step(self, batch, at, rate):
            if at == number:
                raise Killed
            return normal(self, batch, at, rate)

        with monkeypatch.context() as patched:
            patched.setattr(Trainer, "step", step)
            with pytest.raises(Killed):
                run(*arguments)

    return run_until_step


@pytest.fixture
def start():
    """start(*arguments) starts main.py as a separate process."""
    started = []

    def start_main(*arguments):
        command = [sys.executable, str(ROOT / "main.py"), *map(str, arguments)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
        started.append(process)
        return process

    yield start_main
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def script(tmp_path, monkeypatch, capsys):
    """script(name, *arguments) runs scripts/{name}.py in this process, in tmp_path: (exit code, output, errors)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "scripts")

    def run(name, *arguments):
        spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        capsys.readouterr()
        try:
            code = run_with_exit_code(module.main)
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return run


def read_json(path):
    return json.loads(Path(path).read_text())


def read_lines(path):
    """Read metrics.jsonl, without measured times."""
    clock = ("pairs_per_second", "data_percent")
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in clock} for line in lines]


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
