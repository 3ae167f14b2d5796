"""Bad input to a run gives exit code 2 and one line with the cause and the remedy, and loses nothing."""

import os
import pickle
import shutil
import stat

import pytest
import torch

from tests.models.small import small_clip


def is_one_line(err):
    lines = [line for line in err.strip().splitlines() if not line.startswith("WARNING")]
    assert len(lines) == 1 and lines[0].startswith(("error:", "main.py: error:")), err
    return True


@pytest.mark.parametrize(
    "extra, words",
    [
        (("--dataset_root", "/nowhere"), ["/nowhere"]),
        (("--dataset", "coco", "--dataset_root", "/nowhere"), ["/nowhere"]),
        (("--dataset", "flickr30k", "--dataset_root", "/nowhere"), ["/nowhere"]),
        (("--dataset", "coca"), ["coca", "coco"]),
        (("--vision_model", "ViT-B/23"), ["ViT-B/23", "ViT-B/32"]),
        (("--vision_model", "ViT-B-32", "--pretrained", "openia"), ["openia", "openai"]),
        (("--pretrained", "/nowhere/weights.pt"), ["/nowhere/weights.pt"]),
        (("--resume", "/nowhere/last.pt"), ["/nowhere/last.pt"]),
        (("--device", "cuda:7"), ["cuda:7"]),
        (("--device", "gpu"), ["gpu", "cuda"]),
        (("--precision", "fp16"), ["fp16", "bf16"]),
        (("--caption_column", "text"), ["text", "caption"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_bad_option_is_named(run, arguments, extra, words):
    code, _, err = run(*arguments, *extra)
    assert code == 2 and is_one_line(err)
    assert all(word in err for word in words), err


def test_truncated_image_stops_the_run_and_is_named(run, arguments, captioned, tmp_path):
    for workers in ("0", "2"):
        broken = tmp_path / f"broken{workers}"
        broken.mkdir()
        for path in captioned.iterdir():
            (broken / path.name).write_bytes(path.read_bytes())
        (broken / "3.jpg").write_bytes((captioned / "3.jpg").read_bytes()[:300])
        command = [*arguments, "--dataset_root", broken, "--num_workers", workers, "--overwrite"]
        code, _, err = run(*command)
        assert code == 2 and is_one_line(err) and str(broken / "3.jpg") in err


def test_image_that_breaks_during_a_run_loses_no_steps(run, arguments, captioned, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(captioned, data)
    whole = (captioned / "3.jpg").read_bytes()
    (data / "3.jpg").write_bytes(whole[:300])
    command = [*arguments, "--dataset_root", data, "--no_eval_first", "--batch_size", "5"]
    code, _, err = run(*command, "--seed", "1")
    assert code == 2 and is_one_line(err) and "3.jpg" in err and "resume with --resume auto" in err
    (data / "3.jpg").write_bytes(whole)
    code, out, err = run(*command, "--seed", "1", "--resume", "auto")
    assert code == 0 and "resuming from" in out, err
    assert run(*command, "--seed", "1", "--name", "whole")[0] == 0
    files = (tmp_path / "logs" / name / "last.pt" for name in ("ex0", "whole"))
    resumed, undisturbed = (torch.load(file, weights_only=True)["model"] for file in files)
    assert all(torch.equal(resumed[name], undisturbed[name]) for name in undisturbed)


def test_missing_image_is_named_before_training(run, arguments, captioned, tmp_path):
    rows = (captioned / "captions.csv").read_text() + "gone.jpg,a thing,train\n"
    (tmp_path / "captions.csv").write_text(rows)
    command = [*arguments, "--annotations", tmp_path / "captions.csv", "--image_dir", captioned]
    code, out, err = run(*command)
    assert code == 2 and is_one_line(err) and "gone.jpg" in err and "step" not in out


def test_pickle_with_code_is_refused(run, arguments, tmp_path):
    marker = tmp_path / "marker"

    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    for number, save in enumerate((torch.save, lambda value, path: path.write_bytes(pickle.dumps(value)))):
        file = tmp_path / f"malicious{number}.pt"
        save({"state_dict": Malicious()}, file)
        for option in ("--resume", "--pretrained"):
            code, _, err = run(*arguments, option, file)
            assert code == 2 and is_one_line(err) and str(file) in err
    assert not marker.exists()


def test_weights_of_another_model_are_refused_with_the_mismatch(run, arguments, tmp_path):
    file = tmp_path / "resnet.pt"
    torch.save(small_clip(resnet=True).state_dict(), file)
    code, _, err = run(*arguments, "--pretrained", file)
    assert code == 2 and is_one_line(err)
    assert "missing" in err and "unexpected" in err and str(file) in err


def test_truncated_checkpoint_is_named(run, arguments, tmp_path):
    run(*arguments, "--max_steps", "1")
    last = tmp_path / "logs/ex0/last.pt"
    last.write_bytes(last.read_bytes()[:5000])
    code, _, err = run(*arguments, "--resume", "auto")
    assert code == 2 and is_one_line(err) and "last.pt" in err


def test_folder_with_a_run_is_refused_with_both_remedies(run, arguments, tmp_path):
    run(*arguments, "--max_steps", "1")
    folder = tmp_path / "logs" / "ex0"
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    code, _, err = run(*arguments)
    assert code == 2 and is_one_line(err) and "--resume auto" in err and "--overwrite" in err
    assert {path: path.read_bytes() for path in before} == before
    assert run(*arguments, "--overwrite", "--max_steps", "2")[0] == 0
    assert torch.load(folder / "last.pt", weights_only=True)["step"] == 2


def test_bad_input_with_overwrite_keeps_the_old_run(run, arguments, tmp_path):
    run(*arguments, "--max_steps", "1")
    before = (tmp_path / "logs/ex0/last.pt").read_bytes()
    code, _, _ = run(*arguments, "--overwrite", "--dataset_root", "/nowhere")
    assert code == 2
    assert (tmp_path / "logs/ex0/last.pt").read_bytes() == before


@pytest.mark.parametrize("option", ["--resume", "--pretrained"])
@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
def test_overwrite_does_not_delete_its_own_source(run, arguments, tmp_path, option, name):
    run(*arguments, "--max_steps", "1")
    folder = tmp_path / "logs" / "ex0"
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    code, _, err = run(*arguments, "--overwrite", option, folder / name)
    assert code == 2 and is_one_line(err) and "--overwrite" in err
    assert {path: path.read_bytes() for path in before} == before


def test_best_checkpoint_does_not_replace_its_own_run(run, arguments, tmp_path):
    run(*arguments, "--max_steps", "1")
    folder = tmp_path / "logs" / "ex0"
    code, _, err = run(*arguments, "--resume", folder / "best.pt")
    assert code == 2 and is_one_line(err) and "already holds a run" in err


@pytest.mark.parametrize("entry", ["options", "preprocess", "sampler", "model"])
def test_damaged_checkpoint_is_refused(run, arguments, tmp_path, entry):
    run(*arguments, "--max_steps", "1")
    last = tmp_path / "logs/ex0/last.pt"
    content = torch.load(last, weights_only=True)
    content[entry] = 1
    torch.save(content, last)
    for extra in ((), ("--eval",)):
        code, _, err = run(*arguments, *extra, "--resume", last)
        assert code == 2 and is_one_line(err) and entry in err


def test_half_written_files_of_a_killed_run_are_removed(run, arguments, tmp_path):
    folder = tmp_path / "logs" / "ex0"
    folder.mkdir(parents=True)
    (folder / ".last.pt.12345.tmp").write_bytes(b"half a checkpoint")
    run(*arguments, "--max_steps", "1")
    assert not list(folder.glob(".*"))


def test_root_that_is_a_file_is_not_used_as_cache_of_shapes(run, arguments, tmp_path, captioned):
    from clip_retrieval.data.readers import shapes
    from clip_retrieval.options import DataOptions

    (tmp_path / "file").write_text("")
    assert len(shapes.read(DataOptions(dataset_root=str(tmp_path / "file")), "test").images) == 500


def test_closed_stdout_does_not_end_the_run(start, arguments, tmp_path):
    process = start(*arguments)
    process.stdout.readline()
    process.stdout.close()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "Traceback" not in err and (tmp_path / "logs/ex0/results.json").is_file()


def test_lost_loader_process_is_exit_code_3(run, arguments, tmp_path, monkeypatch):
    from clip_retrieval.data.batches import loader

    monkeypatch.setattr(loader._FetchPixels, "__call__", lambda self, request: os.kill(os.getpid(), 9))
    code, _, err = run(*arguments, "--num_workers", "1", "--no_eval_first")
    assert code == 3 and is_one_line(err) and "--num_workers" in err and "--resume auto" in err


def test_unwritable_output_is_named(run, arguments, tmp_path):
    file = tmp_path / "a_file"
    file.write_text("")
    code, _, err = run(*arguments, "--checkpoint_path", file)
    assert code == 2 and is_one_line(err) and str(file) in err
    if os.geteuid() != 0:  # root can write everywhere
        locked = tmp_path / "locked"
        locked.mkdir()
        locked.chmod(stat.S_IREAD | stat.S_IEXEC)
        code, _, err = run(*arguments, "--checkpoint_path", locked)
        assert code == 2 and is_one_line(err) and str(locked) in err


def test_full_disk_is_exit_code_3_and_keeps_the_checkpoint(run, arguments, tmp_path, monkeypatch):
    import errno

    from clip_retrieval.models import checkpoint

    normal, calls = torch.save, []

    def save(content, file):
        calls.append(1)
        if len(calls) == 4:
            file.write(b"half a checkpoint")
            raise OSError(errno.ENOSPC, "No space left on device")
        return normal(content, file)

    monkeypatch.setattr(checkpoint.torch, "save", save)
    code, _, err = run(*arguments)
    assert code == 3 and is_one_line(err) and "No space left" in err and "--resume auto" in err
    folder = tmp_path / "logs" / "ex0"
    assert torch.load(folder / "last.pt", weights_only=True)["step"] == 3
    assert not [path for path in folder.iterdir() if ".tmp" in path.name]


def test_the_program_exits_with_code_2(start):
    process = start("--dataset_root", "/nowhere", "--vision_model", "tiny", "--dataset", "csv")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and is_one_line(err) and "Traceback" not in err
