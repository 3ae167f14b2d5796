"""Sweeps, with a stub for main.py, and one with main.py."""

import html
import json
import signal
import subprocess
import sys
import time

import pytest

from clip_retrieval.errors import UserError
from clip_retrieval.sweep import COMPLETE, METRICS, average_seeds, read_metrics, sweep
from clip_retrieval.sweeping.processes import failure_message, group_gpus
from tests.conftest import ROOT, read_json

STUB = """
import json, os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from clip_retrieval.command_line import parse
typed = parse()
folder = Path(typed["checkpoint_path"]) / typed["experiments"]
folder.mkdir(exist_ok=True)
(folder / "options.json").write_text(json.dumps({{"command_line": sys.argv}}))
with open(folder.parent / "calls.txt", "a") as file:
    print(typed["experiments"], os.environ.get("CUDA_VISIBLE_DEVICES"), file=file)
if typed["lr"] == 2:
    sys.exit("main.py: out of <memory>") if not (folder.parent / "mended").exists() else None
if typed["lr"] == 3 and not (folder / "saved").exists():
    def save(*_):
        (folder / "saved").touch()
        sys.exit(130)
    signal.signal(signal.SIGTERM, save)
    (folder / "started").touch()
    time.sleep(60)
block = lambda value: dict(
    {{d: {{"R@1": value, "R@5": value, "R@10": value}} for d in ("i2t", "t2i")}}, mean_recall=value, split="test"
)
value = typed["lr"]
(folder / "results.json").write_text(json.dumps(block(100 - value) | {{"val": block(value), "before": block(1.0)}}))
"""
SHARED = ["--dataset", "shapes", "--vision_model", "tiny"]


@pytest.fixture
def stub(tmp_path):
    path = tmp_path / "stub.py"
    path.write_text(STUB.format(root=str(ROOT)))
    return [sys.executable, str(path)]


def runs(*rates):
    return [{"lr": str(rate), "loss": "infonce"} for rate in rates]


def calls(output):
    return [line.split() for line in (output / "calls.txt").read_text().splitlines()]


def read_table(output):
    """The rows of table.md, without the rule."""
    lines = [line for line in (output / "table.md").read_text().splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(head, row)) for row in rows]


def test_table_is_sorted_by_val_unless_asked_and_says_so(tmp_path, stub):
    output = tmp_path / "sweep"
    sweep(runs(5, 7, 6), SHARED, output, program=stub)
    assert [row["lr"] for row in read_table(output)] == ["7", "6", "5"]
    assert read_table(output)[0]["val rsum"] == "42.00" and read_table(output)[0]["rsum"] == "558.00"
    assert (output / "table.md").read_text().startswith("Sorted by val rsum: choose options by the val split")
    sweep(runs(5, 7, 6), SHARED, output, program=stub, sort="rsum")
    assert [row["lr"] for row in read_table(output)] == ["5", "6", "7"]
    assert "looks better than it is" in (output / "table.md").read_text()


def test_runs_that_differ_by_seed_have_means_and_deviations(tmp_path, stub):
    output = tmp_path / "sweep"
    named = [{"seed": "1", "lr": "4"}, {"seed": "2", "lr": "4"}, {"seed": "1", "lr": "4", "ema": "0.9"}]
    sweep(named, [*SHARED, "--epochs", "1"], output, program=stub)
    text = (output / "table.md").read_text()
    means = [line for line in text.splitlines() if "±" in line]
    assert means == [
        "| 4 |  | 2 | 24.00 ± 0.00 | 4.00 ± 0.00 | 4.00 ± 0.00 | 4.00 ± 0.00 | 576.00 ± 0.00 | 6.00 ± 0.00 |"
    ]
    assert "| 4 | 0.9 | 1 | 24.00 |" in text and "24.00 ± 0.00" in (output / "sweep.html").read_text()


def test_means_and_deviations_are_those_of_complete_runs():
    rows = [
        {"lr": "1", "seed": str(seed), "val rsum": value, "rsum": None, "state": state}
        for seed, value, state in ((1, 10.0, COMPLETE), (2, 13.0, COMPLETE), (3, 16.0, COMPLETE), (4, None, "failed"))
    ]
    averaged = average_seeds(rows, ["lr", "seed"], ["val rsum", "rsum"], "val rsum")
    assert averaged == [{"lr": "1", "runs": "3", "val rsum": "13.00 ± 3.00", "rsum": None}]
    assert average_seeds(rows[:1], ["lr", "seed"], ["val rsum"], "val rsum") == []


def test_means_are_sorted_by_the_mean_not_by_the_best_run():
    values = {"1": (90.0, 10.0), "2": (60.0, 50.0), "3": (None, None)}
    rows = [
        {"lr": lr, "seed": str(seed), "val rsum": value, "state": COMPLETE}
        for lr, group in values.items()
        for seed, value in enumerate(group)
    ]
    averaged = average_seeds(rows, ["lr", "seed"], ["val rsum"], "val rsum")
    assert [row["lr"] for row in averaged] == ["2", "1", "3"]


def test_table_has_the_retention_and_zero_shot_of_the_runs(tmp_path):
    block = {d: {"R@1": 5.0, "R@5": 5.0, "R@10": 5.0} for d in ("i2t", "t2i")} | {"mean_recall": 5.0}
    results = {**block, "retention": block, "zero_shot": {"top1": 7.0}, "zero_shot_before": {"top1": "?"}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    row = read_metrics(tmp_path)
    assert (row["retention"], row["retention before"]) == (30.0, None)
    assert (row["zero-shot"], row["zero-shot before"]) == (7.0, None)


def test_failed_run_is_in_the_table_and_is_tried_again(tmp_path, stub):
    output = tmp_path / "sweep"
    sweep(runs(2, 4), SHARED, output, program=stub)
    rows = {row["lr"]: row["state"] for row in read_table(output)}
    assert rows == {"4": "complete", "2": "failed (exit code 1): main.py: out of <memory>"}
    page = (output / "sweep.html").read_text()
    assert "out of &lt;memory&gt;" in page and "<memory>" not in page
    (output / "mended").touch()
    sweep(runs(2, 4), SHARED, output, program=stub)
    assert [name for name, _ in calls(output)] == [f"lr={rate}_loss=infonce" for rate in (2, 4, 2)]
    assert {row["state"] for row in read_table(output)} == {"complete"}


def test_runs_with_other_options_are_refused_before_the_first_run(tmp_path, stub):
    output = tmp_path / "sweep"
    sweep(runs(4), SHARED, output, program=stub)
    sweep(runs(4), [*SHARED, "--num_workers", "0"], output, program=stub)  # of this machine only
    with pytest.raises(UserError, match="other options"):
        sweep(runs(5, 4), [*SHARED, "--epochs", "3"], output, program=stub)
    assert len(calls(output)) == 1


def test_sweep_may_start_from_the_best_checkpoint_of_ex0(tmp_path, stub, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs" / "ex0").mkdir(parents=True)
    for name in ("best.pt", "last.pt"):
        (tmp_path / "logs" / "ex0" / name).touch()
    sweep(runs(4), [*SHARED, "--pretrained", "logs/ex0/best.pt"], tmp_path / "logs" / "sweep", program=stub)
    assert read_table(tmp_path / "logs" / "sweep")[0]["state"] == "complete"


def test_damaged_options_of_a_run_are_refused(tmp_path, stub):
    output = tmp_path / "sweep"
    sweep(runs(4), SHARED, output, program=stub)
    for content in ("[]", '{"command_line": [1]}', "{"):
        (output / "lr=4_loss=infonce" / "options.json").write_text(content)
        with pytest.raises(UserError, match=r"options\.json"):
            sweep(runs(4), SHARED, output, program=stub)


@pytest.mark.parametrize(
    ("arguments", "values", "message"),
    [
        (["--experiments", "a"], {"lr": "1"}, "--experiments: a sweep sets it"),
        ([], {"lr": "-1"}, "--lr -1"),
        (["--grad_cache", "2"], {"accum_freq": "2"}, "--grad_cache and --accum_freq"),
    ],
)
def test_invalid_options_are_refused_before_the_first_run(tmp_path, stub, arguments, values, message):
    with pytest.raises(UserError, match=message):
        sweep([{"loss": "infonce"}, values], [*SHARED, *arguments], tmp_path / "sweep", program=stub)
    assert not (tmp_path / "sweep").exists()


def test_each_gpu_has_one_run_at_a_time(tmp_path, stub):
    output = tmp_path / "sweep"
    sweep(runs(4, 5, 6, 7), SHARED, output, program=stub, gpus=("0", "3"))
    assert {gpu for _, gpu in calls(output)} == {"0", "3"} and len(calls(output)) == 4


def test_stop_signal_reaches_the_run_and_the_sweep_resumes(tmp_path, stub):
    output = tmp_path / "sweep"
    code = f"""
import sys
from clip_retrieval.errors import run_with_exit_code
from clip_retrieval.sweep import sweep
from pathlib import Path
runs = [{{"lr": "3", "loss": "infonce"}}, {{"lr": "4", "loss": "infonce"}}]
sys.exit(run_with_exit_code(lambda: sweep(runs, {SHARED!r}, Path({str(output)!r}), program={stub!r})))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not (output / "lr=3_loss=infonce" / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    message = process.communicate(timeout=120)[1].decode()
    assert process.returncode == 130 and "repeat the command" in message
    assert (output / "lr=3_loss=infonce" / "saved").exists() and len(calls(output)) == 1
    assert read_table(output)[0]["state"] == "interrupted"
    sweep(runs(3, 4), SHARED, output, program=stub)
    assert {row["state"] for row in read_table(output)} == {"complete"}


def test_message_of_a_failure_is_that_of_the_last_attempt(tmp_path):
    path = tmp_path / "output.txt"
    path.write_text("$ main.py\nerror (process 1): a: interrupted at step 3\n\n$ main.py\nTraceback\nKilled\n")
    assert failure_message(path) == "Killed"
    path.write_text("$ main.py\nerror (process 0): --lr 5: too high\nRoot Cause\n======\n")
    assert failure_message(path) == "error (process 0): --lr 5: too high"
    path.write_text("$ main.py\n")
    assert failure_message(path) == ""


def test_gpus_are_divided_among_runs_of_several_processes(script):
    assert group_gpus(["0", "1", "2", "5"], 2) == ["0,1", "2,5"]
    assert group_gpus(["0", "1"], 1) == ["0", "1"] and group_gpus([], 4) == []
    command = ("sweep", "--values", "lr=1,2", "--nproc_per_node")
    code, _, err = script(*command, "2", "--gpus", "0,1,2")
    assert code == 2 and "--gpus 0,1,2: 3 GPUs for runs of 2 processes (--nproc_per_node); give a multiple of 2" in err
    code, _, err = script(*command, "0")
    assert code == 2 and "--nproc_per_node 0: must be at least 1" in err


@pytest.mark.slow
def test_runs_of_two_processes_fail_stop_resume_and_complete(tmp_path, arguments):
    shared = [str(word) for word in arguments[:-2] if word not in ("--lr", "1e-3")]
    options = ["--output", tmp_path / "sweep", "--nproc_per_node", "2"]
    command = [sys.executable, ROOT / "scripts/sweep.py", "--values", "batch_size=7,10", *options, "--", *shared]
    command += ["--epochs", "40", "--eval_every", "0", "--report_to", "none", "--lr", "1e-3"]

    # stop the second run; the first one cannot be split over two processes
    process = subprocess.Popen([str(word) for word in command], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    metrics = tmp_path / "sweep/batch_size=10/metrics.jsonl"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count('"train"') > 5):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    message = process.communicate(timeout=120)[1].decode()
    assert process.returncode == 130 and "repeat the command" in message
    states = {row["batch_size"]: row["state"] for row in read_table(tmp_path / "sweep")}
    assert states["10"] == "interrupted" and "--batch_size 7 cannot be split over 2 processes" in states["7"]

    # resume it
    command[3] = "batch_size=10"
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert [row["state"] for row in read_table(tmp_path / "sweep")] == ["complete"]
    log = (tmp_path / "sweep/batch_size=10/log.txt").read_text()
    assert "resuming from" in log and "of 10 = 2 x 5 pairs" in log


def test_page_is_self_contained_and_escaped(tmp_path, stub):
    output = tmp_path / "sweep"
    prefixes = ['a "<b>" style="x"', "&amp;"]
    sweep([{"lr": str(i + 4), "caption_prefix": p} for i, p in enumerate(prefixes)], SHARED, output, program=stub)
    page = (output / "sweep.html").read_text()
    policy = html.unescape(page[page.index("Content-Security-Policy") : page.index("<title>")])
    assert "default-src 'none'" in policy and "script-src 'none'" in policy and "<b>" not in page
    assert "<script" not in page and "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    svg = page[page.index("<svg") : page.index("</svg>")]
    assert "style=" not in svg.replace("style='", "") and "var(--series-2)" in svg and "&amp;amp;" in svg
    assert all(name in page for name in METRICS[:6])


@pytest.mark.slow
def test_sweep_of_two_runs_of_main(tmp_path, script, arguments):
    shared = [word for word in arguments[:-2] if word not in ("--lr", "1e-3")]
    command = ("--values", "lr=1e-3,1e-2", "--output", tmp_path / "sweep", "--", *shared, "--report_to", "none")
    code, out, err = script("sweep", *command)
    assert code == 0, err
    rows = read_table(tmp_path / "sweep")
    assert {row["lr"] for row in rows} == {"1e-3", "1e-2"} and {row["state"] for row in rows} == {"complete"}
    for row in rows:
        folder = tmp_path / "sweep" / f"lr={row['lr']}"
        assert read_json(folder / "options.json")["lr"] == float(row["lr"])
        assert float(row["val rsum"]) == pytest.approx(read_json(folder / "results.json")["val"]["rsum"], abs=0.01)
    code, out, err = script("sweep", *command)
    assert code == 0 and "2 runs, 2 complete" in out


def test_damaged_results_are_a_run_without_metrics(tmp_path, stub):
    output = tmp_path / "sweep"
    sweep(runs(4), SHARED, output, program=stub)
    for content in ({"i2t": 5}, [1], {"val": {"i2t": "x"}, "training_precision": 1}):
        (output / "lr=4_loss=infonce" / "results.json").write_text(json.dumps(content))
        sweep(runs(4), SHARED, output, program=stub)
        assert read_table(output)[0]["val rsum"] == ""
