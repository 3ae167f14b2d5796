"""A run of several processes equals that of one process: batches, gradients, weights, files and scores."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from clip_retrieval.command_line import parse
from clip_retrieval.data.batches.sampler import BatchSampler
from clip_retrieval.data.catalog import read_dataset
from clip_retrieval.distributed import SINGLE_PROCESS
from clip_retrieval.losses import LOSSES
from clip_retrieval.run.merge import settle
from tests import distributed_worker as worker
from tests.conftest import read_json, read_lines
from tests.test_resume import MANY, ending, results, wait_for_step
from tests.torchrun import MINUTE, Torchrun

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads processes from /proc"),
]

RESUMED_AT = 4  # step of the last save before the kill
NEGATIVE = "--annotations ../negated/captions.csv --negative_column wrong"
VARIANTS = {
    "averages": "--ema 0.5 --swa_start 1",
    "resnet": "--vision_model resnet.json --lr 0.01",
    "distilled": "--distill_from start --word_dropout 0.3 --augment rand --label_smoothing 0.1",
    "cached teacher": "--distill_from start --distill_kind feature",
    "start_image_size": "--start_image_size 8 --start_image_size_until 0.5 --grad_clip 0.1",
    "siglip grad_cache": "--loss siglip --grad_cache 5",
    "margin linear_projection": "--loss margin --trainable linear_projection",
    "freeze_text one caption": "--freeze_text --caption_sampling one --accum_freq 2 --grad_clip 0.1",
    "hard negatives": "--hard_negatives 0.5",
    "negatives": f"{NEGATIVE} --grad_cache 3 --word_dropout 0.2",
    "negatives distilled": f"{NEGATIVE} --distill_from start",
    "lora": "--trainable lora --lora_targets all --lora_rank 2",
}
EVALUATIONS = {
    "batches that do not divide": "--eval_batch_size 4",
    "batches of one": "--eval_batch_size 1 --eval_split val",
    "one batch for all": "--eval_batch_size 256",
    "bf16": "--eval_batch_size 4 --eval_precision bf16",
    "mAP": "--eval_batch_size 4 --map --protocols map_at_r --save_rankings 3",
    "re-ranked": "--eval_batch_size 4 --rerank dual_softmax qb_norm csls",
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On shared cores, threads that wait for each other cost more than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def torchrun(tmp_path):
    """torchrun(*arguments) starts processes; `arguments` follow --nproc_per_node."""
    started = []

    def start(*arguments, processes=(2,)):
        started.append(Torchrun(*arguments, processes=processes, marker=f"{tmp_path}/{len(started)}"))
        return started[-1]

    yield start
    for run in started:
        run.kill()


def finetune(captioned, folder, name, *extra, killed_in_step=None):
    """A finetune of 35 pairs, 6 steps of 10, into folder/name."""
    arguments = [
        *("--dataset", "csv", "--dataset_root", captioned, "--vision_model", captioned / "small.json"),
        # A large epsilon keeps AdamW from amplifying rounding errors of small gradients.
        *("--epochs", 2, "--batch_size", 10, "--lr", 0.1, "--warmup", 2, "--eps", 1, "--display", 1),
        *("--num_workers", 0, "--device", "cpu", "--checkpoint_path", folder, "--experiments", name),
        *(captioned / value if str(value).endswith((".json", ".csv")) else value for value in extra),
    ]
    return {"arguments": [str(argument) for argument in arguments], "killed_in_step": killed_in_step}


WHOLE = ("--augment", "crop", "--save_every", 2, "--keep_every", 1)
SHORT = ("--max_steps", 3, "--no_eval_first", "--eval_every", 0)


def commands(captioned, folder):
    """Commands by name, for one process and for two."""
    found = {
        "whole": finetune(captioned, folder, "whole", *WHOLE),
        "killed": finetune(captioned, folder, "killed", *WHOLE, killed_in_step=RESUMED_AT + 1),
        "resumed": finetune(captioned, folder, "resumed", *WHOLE, "--resume", folder / "killed/last.pt"),
        "does not divide": finetune(captioned, folder, "does not divide", *SHORT, "--batch_size", 11),
        "shrinks": finetune(captioned, folder, "shrinks", *SHORT, "--batch_size", 256),
    }
    found |= {name: finetune(captioned, folder, name, *SHORT, *extra.split()) for name, extra in VARIANTS.items()}
    for name, extra in EVALUATIONS.items():
        best = folder.parent / "one/whole/best.pt"
        place = ("--checkpoint_path", folder, "--experiments", name, "--device", "cpu", "--num_workers", 0)
        found[name] = {"arguments": [str(a) for a in ("--eval", "--resume", best, *place, *extra.split())]}
    return found


def many(captioned, folder):
    """Runs of two processes with many ingredients: undisturbed, killed and resumed."""
    return {
        "many whole": finetune(captioned, folder, "many whole", *MANY),
        "many killed": finetune(captioned, folder, "many killed", *MANY, killed_in_step=5),
        "many resumed": finetune(captioned, folder, "many resumed", *MANY, "--resume", folder / "many killed/last.pt"),
    }


def crossed(captioned, folder, other):
    """The run that resumes from the checkpoint of other processes."""
    return finetune(captioned, folder, "crossed", *WHOLE, "--resume", other / "killed/last.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    yield folder
    shutil.rmtree(folder)  # gigabytes of checkpoints


@pytest.fixture(scope="module")
def one(captioned, negated, folder):
    """Exit code and output of each command in one process; its files are in folder/one."""
    return {name: run_alone(c) for name, c in commands(captioned, folder / "one").items()}


def run_alone(command):
    return worker.run_main(*command["arguments"], killed_in_step=command.get("killed_in_step"))


@pytest.fixture(scope="module")
def two(captioned, folder, one):
    """The content of {rank}.pt of each of two processes; their files are in folder/two."""
    todo = commands(captioned, folder / "two") | many(captioned, folder / "two")
    todo["crossed"] = crossed(captioned, folder / "two", folder / "one")
    (folder / "commands.json").write_text(json.dumps(todo))
    run = Torchrun("-m", "tests.distributed_worker", folder, folder / "commands.json", marker=folder)
    try:
        code, _, err = run.end()
    finally:
        run.kill()
    assert code == 0, err
    assert "deprecated" not in err
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def assert_close(a, b, tolerance):
    """Assert that two dicts of tensors agree to `tolerance` of each tensor's largest entry."""
    assert a.keys() == b.keys()
    for name, value in b.items():
        largest = value.abs().max().item()
        torch.testing.assert_close(a[name], value, rtol=0, atol=tolerance * largest + 1e-15, msg=name)


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def last(folder):
    return torch.load(folder / "last.pt", weights_only=True)


# Single parts.


@pytest.mark.parametrize("case", worker.cases())
def test_steps_equal_those_of_one_process(two, case):
    expected = worker.train_small(SINGLE_PROCESS, **worker.cases()[case])
    exact, close = (1e-12, 1e-10) if "bf16" not in case else (1e-6, 1e-5)
    for found, other, step in zip(two[0]["steps"][case], two[1]["steps"][case], expected, strict=True):
        assert found["loss"].item() == pytest.approx(step["loss"].item(), rel=exact)
        assert found["accuracy"] == other["accuracy"] == step["accuracy"]
        assert_close(found["gradients"], step["gradients"], close)
        assert_close(found["after"], step["after"], close)
        assert_equal(found["gradients"], other["gradients"])
        assert_equal(found["after"], other["after"])
    learns_scale = not any(name in case for name in ("margin", "triplet", "smoothing"))  # its case fixes the scale
    learning = {name: value for name, value in expected[0]["gradients"].items() if value.abs().max() > 0}
    assert len(learning) >= 2 and ("clip.logit_scale" in learning) == learns_scale


def test_bfloat16_batch_norm_equals_that_of_one_process(two):
    expected = worker.normalise_bfloat16(SINGLE_PROCESS)
    found = torch.cat([found["normalised"]["values"] for found in two])
    torch.testing.assert_close(found, expected["values"], rtol=2**-7, atol=0)
    for name in ("mean", "var"):
        torch.testing.assert_close(two[0]["normalised"][name], expected[name])


def test_all_gather_rows_of_uneven_length(two):
    expected = {
        "uneven": [[0, 1], [2, 3], [4, 5], [100, 101]],
        "empty": [[100, 101], [102, 103]],
        "last is empty": [[0, 1], [2, 3], [4, 5], [6, 7]],
        "none": [],
    }
    for found in two:
        assert {name: rows.tolist() for name, rows in found["rows"].items()} == expected
        assert all(rows.shape[1:] == (2,) for rows in found["rows"].values())


def test_processes_on_one_gpu_gather_through_the_cpu(two):
    for rank, found in enumerate(two):
        direct, through_cpu = found["through_cpu"]
        assert torch.equal(direct[0], through_cpu[0]) and torch.equal(direct[1], through_cpu[1])
        assert torch.equal(direct[0][3 * rank :][:3], torch.arange(6.0).view(3, 2) + 10 * rank)
        assert direct[1].abs().sum() > 0


def test_no_process_stores_the_logits_of_the_batch(two):
    for found in two:
        assert found["largest"] == dict.fromkeys(LOSSES, 300 * 300)


def assert_shares_make_the_batches_of_one(found, expected):
    """Assert that the slices of the processes, with their positives, are the batches of one process."""
    for batch, *shares in zip(expected, *found, strict=True):
        for name in ("images", "texts"):
            assert torch.equal(getattr(batch, name), torch.cat([share[name] for share in shares]))
        rows = len(batch.images) // len(shares)
        positives = [share["positives"] + torch.tensor([rank * rows, 0]) for rank, share in enumerate(shares)]
        assert torch.equal(batch.positives, torch.cat(positives))


def test_replaced_samples_equal_those_of_one_process(two):
    expected = worker.batches_with_replaced_images(SINGLE_PROCESS)
    assert_shares_make_the_batches_of_one([found["replaced"] for found in two], expected)
    assert any(len(batch.positives) > 8 for batch in expected)


def test_skipped_samples_of_one_process_are_logged_by_all(two):
    message = "epoch 1, batch 1: 1 sample could not be used, replaced by others: 0.tar, sample é"
    assert [found["warnings"] for found in two] == [[message], [message]]


def test_duplicate_images_of_other_processes_are_positives(two, folder):
    expected = worker.batches_with_duplicate_images(SINGLE_PROCESS, folder)
    assert_shares_make_the_batches_of_one([found["duplicates"] for found in two], expected)
    for batch in expected:
        content = [image.numpy().tobytes() for image in batch.images]
        expected_pairs = [[i, j] for i in range(8) for j in range(8) if content[i] == content[j]]
        assert batch.positives.tolist() == expected_pairs


def test_ranks_equal_those_of_one_process(two):
    expected = worker.ranks_of_many_tiles(SINGLE_PROCESS)
    assert two[0]["ranks"] == two[1]["ranks"] == expected


# The command line.


def test_finetune_ends_with_the_weights_of_one_process(one, two, folder):
    assert one["whole"][0] == two[0]["runs"]["whole"][0] == two[1]["runs"]["whole"][0] == 0
    for name in ("last.pt", "best.pt", "epoch_1.pt", "epoch_2.pt"):
        a, b = (torch.load(folder / n / "whole" / name, weights_only=True) for n in ("two", "one"))
        assert a.keys() == b.keys() and a["step"] == b["step"]
        assert_close(a["model"], b["model"], 1e-5)
    start = torch.load(folder / "one/whole/epoch_1.pt", weights_only=True)["model"]
    moved = max((last(folder / "one/whole")["model"][name] - value).abs().max() for name, value in start.items())
    assert moved > 1e-3


def test_finetune_metrics_equal_those_of_one_process(two, folder):
    lines = [read_lines(folder / n / "whole/metrics.jsonl") for n in ("two", "one")]
    assert len(lines[0]) == 10
    for a, b in zip(*lines, strict=True):
        assert a.keys() == b.keys()
        for name, value in b.items():
            assert a[name] == (pytest.approx(value, rel=1e-5) if name in ("loss", "logit_scale") else value)
    a, b = (read_json(folder / n / "whole/results.json") for n in ("two", "one"))
    assert a.keys() == b.keys()
    for name in ("i2t", "t2i", "rsum", "mean_recall", "step", "steps", "images", "captions"):
        assert a[name] == b[name]


def test_finetune_writes_the_same_files_once(two, folder):
    files = [{path.name for path in (folder / n / "whole").iterdir()} for n in ("two", "one")]
    assert files[0] == files[1]
    assert len(list((folder / "two/whole/tensorboard").iterdir())) == 1


def test_only_the_main_process_prints(one, two, folder):
    (_, out, err), (_, *other_output) = (found["runs"]["whole"] for found in two)
    assert other_output == ["", ""]
    assert "of 10 = 2 x 5 pairs" in out
    found, expected = ([line.split("  ")[1:3] for line in step_lines(o)] for o in (out, one["whole"][1]))
    assert found == expected
    assert len(step_lines(out)) == 6
    assert out.count("before, test") == 1 and out.count("wrote ") == 1
    assert err == one["whole"][2]
    assert (folder / "two/whole/log.txt").read_text().count("step 6/6") == 1


def step_lines(out):
    return [line for line in out.splitlines() if "pairs/s" in line]


@pytest.mark.parametrize("name", VARIANTS)
def test_each_variant_ends_with_the_weights_of_one_process(one, two, folder, name):
    assert one[name][0] == two[0]["runs"][name][0] == 0, two[0]["runs"][name][2]
    # Batch normalisation over ten values amplifies rounding.
    tolerance = 1e-4 if name == "resnet" else 1e-5
    assert_close(last(folder / "two" / name)["model"], last(folder / "one" / name)["model"], tolerance)
    for average, state in (last(folder / "two" / name).get("averages") or {}).items():
        expected = last(folder / "one" / name)["averages"][average]
        assert state["updates"] == expected["updates"] > 0
        assert_close(state["weights"], expected["weights"], tolerance)
    losses = [
        [line["loss"] for line in read_lines(folder / n / name / "metrics.jsonl") if line["kind"] == "train"]
        for n in ("two", "one")
    ]
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluation_equals_that_of_one_process(one, two, folder, name):
    assert one[name][0] == two[0]["runs"][name][0] == two[1]["runs"][name][0] == 0, two[0]["runs"][name][2]
    a, b = (read_json(folder / n / name / "results.json") for n in ("two", "one"))
    assert a.keys() == b.keys()
    assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}
    tables = 3 if name == "re-ranked" else 1
    assert two[0]["runs"][name][1].count("R@5") == tables and two[1]["runs"][name][1:] == ("", "")
    for file in ("ranks.npz", *(["test_t2i.run", "test_tr_predictions.jsonl"] if name == "mAP" else [])):
        assert len({(folder / n / name / file).read_bytes() for n in ("two", "one")}) == 1


def test_evaluation_on_two_nodes_equals_that_of_one_process(torchrun, one, folder):
    place = ("--checkpoint_path", folder / "three", "--device", "cpu", "--experiments", "eval")
    extra = EVALUATIONS["batches that do not divide"].split()
    run = torchrun("main.py", "--eval", "--resume", folder / "one/whole/best.pt", *place, *extra, processes=(2, 1))
    code, out, err = run.end()
    assert code == 0, err
    assert out.count("R@5") == 1
    a, b = (
        read_json(path)
        for path in (folder / "three/eval/results.json", folder / "one/batches that do not divide/results.json")
    )
    assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}


def test_batch_that_does_not_divide_is_refused_in_one_line(two):
    runs = [found["runs"]["does not divide"] for found in two]
    assert all(code == 2 and "step" not in out for code, out, _ in runs)
    (line,) = "".join(err for *_, err in runs).splitlines()  # the first process that fails speaks for all
    assert line.startswith("error (process ")
    assert line.endswith("--batch_size 11 cannot be split over 2 processes; choose a multiple of it")


def test_small_split_shrinks_the_batch_to_a_multiple(one, two):
    assert "--batch_size 256 becomes 35" in one["shrinks"][2]
    code, out, err = two[0]["runs"]["shrinks"]
    assert code == 0 and "--batch_size 256 becomes 34" in err and "34 = 2 x 17" in out


# Stop and resume.


@pytest.mark.parametrize("kind", ["", "many "])
def test_resume_after_kill_is_bit_identical(two, folder, kind):
    assert [two[0]["runs"][f"{kind}{name}"][0] for name in ("whole", "killed", "resumed")] == [0, None, 0]
    assert last(folder / f"two/{kind}killed")["step"] == RESUMED_AT
    (weights, moments, lines, result), (weights_b, moments_b, lines_b, result_b) = (
        ending(folder / "two" / f"{kind}{name}") for name in ("whole", "resumed")
    )
    assert_equal(weights, weights_b)
    for key, state in moments.items():
        assert_equal(state, moments_b[key])
    assert [line for line in lines if line["step"] > RESUMED_AT] == [
        line for line in lines_b if line["step"] > RESUMED_AT
    ]
    assert result == result_b


def test_resume_with_another_number_of_processes(captioned, two, folder):
    assert two[0]["runs"]["crossed"][0] == 0, two[0]["runs"]["crossed"][2]
    code, _, err = run_alone(crossed(captioned, folder / "one", folder / "two"))
    assert code == 0, err
    for number in ("one", "two"):
        content, whole = last(folder / number / "crossed"), last(folder / "one/whole")
        assert content["step"] == whole["step"] == 6
        assert_close(content["model"], whole["model"], 1e-5)
        a, b = results(folder / number / "crossed"), results(folder / "one/whole")
        assert a == b


def test_sigterm_to_torchrun_saves_and_one_process_resumes(torchrun, captioned, tmp_path):
    long = ("--batch_size", 4, "--epochs", 8, "--eval_every", 0)
    run = torchrun("main.py", *finetune(captioned, tmp_path, "stopped", *long)["arguments"])
    wait_for_step(tmp_path / "stopped", 5, run.agents[0])
    run.agents[0].send_signal(signal.SIGTERM)
    code, _, err = run.end(timeout=MINUTE)
    assert code != 0 and run.alive() == {}
    step = last(tmp_path / "stopped")["step"]
    assert 5 <= step < 64
    assert err.count(f": interrupted at step {step} of 64, saved; ") == err.count("error (process ") == 1
    assert f"repeat the command with --resume {tmp_path / 'stopped/last.pt'}" in err

    resumed = finetune(captioned, tmp_path, "stopped", *long, "--resume", "auto")
    whole = finetune(captioned, tmp_path, "whole", *long)
    for command in (resumed, whole):
        code, _, err = run_alone(command)
        assert code == 0, err
    assert_close(last(tmp_path / "stopped")["model"], last(tmp_path / "whole")["model"], 1e-4)
    steps = [line["step"] for line in read_lines(tmp_path / "stopped/metrics.jsonl") if line["kind"] == "train"]
    assert steps == list(range(1, 65))


def test_killed_process_ends_all_and_keeps_the_checkpoint(torchrun, captioned, tmp_path):
    long = ("--epochs", 20, "--eval_every", 0, "--save_every", 1)
    run = torchrun("main.py", *finetune(captioned, tmp_path, "killed", *long)["arguments"])
    wait_for_step(tmp_path / "killed", 5, run.agents[0])
    os.kill(run.alive()["0"], signal.SIGKILL)  # the process that writes the files
    code, _, err = run.end(timeout=MINUTE)
    assert code != 0 and run.alive() == {}
    assert "error (process 1): another process of this run was lost" in err and "--resume auto" in err
    step = last(tmp_path / "killed")["step"]
    assert 4 <= step < 60
    resumed = finetune(captioned, tmp_path, "killed", *long, "--resume", "auto", "--max_steps", step + 2)
    code, out, err = run_alone(resumed)
    assert code == 0 and f"resuming from {tmp_path / 'killed/last.pt'}, step {step}" in out, err
    assert not list((tmp_path / "killed").glob(".*"))


def test_unreadable_image_in_one_process_ends_all_and_is_named(torchrun, captioned, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(captioned, broken)
    command = finetune(broken, tmp_path / "logs", "ex0", *SHORT)["arguments"]
    dataset = read_dataset(settle(parse(command)).data, "train")
    first_half, second_half = next(BatchSampler(dataset, 10, seed=99).epoch(0)).images.reshape(2, 5)
    image = Path(dataset.images.name(next(i for i in second_half if i not in first_half)))
    image.write_bytes(image.read_bytes()[:300])

    code, out, err = torchrun("main.py", *command).end(timeout=MINUTE)
    assert code != 0 and not step_lines(out)
    errors = [line for line in err.splitlines() if line.startswith("error")]
    assert [line for line in errors if str(image) in line] == [e for e in errors if e.startswith("error (process 1): ")]
    assert sum(str(image) in line for line in errors) == 1
    assert all("another process of this run was lost" in e for e in errors if e.startswith("error (process 0)"))
