"""The GPU and the backend of each process that torchrun starts."""

import pytest
import torch
import torch.distributed as dist

from clip_retrieval import distributed
from clip_retrieval.distributed import process_group
from clip_retrieval.errors import UserError
from tests.conftest import read_lines
from tests.torchrun import Torchrun


@pytest.fixture
def join(monkeypatch):
    """join(rank, processes, gpus) joins a group on a machine with `gpus`; returns the group, GPU, backend and log."""

    def start(rank, processes, gpus, machines=1, device=None):
        chosen, messages = {}, []
        environment = {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": processes}
        for name, value in (environment | {"WORLD_SIZE": processes * machines}).items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "set_device", lambda number: chosen.update(gpu=number))
        monkeypatch.setattr(dist, "init_process_group", lambda backend, timeout: chosen.update(backend=backend))
        monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
        monkeypatch.setattr(distributed.log, "warning", messages.append)
        with process_group(device) as processes:
            return processes, chosen.get("gpu"), chosen["backend"], messages

    return start


def test_each_process_has_its_own_gpu_if_there_are_enough(join):
    for rank in range(2):
        processes, gpu, backend, messages = join(rank, 2, gpus=2)
        assert (gpu, backend, messages) == (rank, "cpu:gloo,cuda:nccl", [])
        assert processes.rank == rank and not processes.shares_gpus


@pytest.mark.parametrize("processes, gpus, expected", [(2, 1, [0, 0]), (4, 3, [0, 1, 2, 0])])
def test_more_processes_share_the_gpus_in_turn(join, processes, gpus, expected):
    found = [join(rank, processes, gpus) for rank in range(processes)]
    assert [gpu for _, gpu, _, _ in found] == expected
    for group, _, backend, messages in found:
        assert group.shares_gpus and backend == "gloo"
        assert len(messages) == 1 and f"{processes} processes share {gpus} GPU" in messages[0]


def test_too_few_gpus_on_one_of_several_machines_are_refused(join):
    with pytest.raises(UserError, match="2 processes on a machine with 1 GPU;"):
        join(0, 2, gpus=1, machines=2)


@pytest.mark.parametrize("gpus, device", [(0, None), (1, "cpu")])
def test_processes_on_cpus_choose_no_gpu(join, gpus, device):
    processes, gpu, backend, messages = join(1, 2, gpus, device=device)
    assert (gpu, backend, messages, processes.shares_gpus) == (None, "gloo", [], False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("extra", [(), ("--precision", "fp32"), ("--vision_model", "resnet.json"), ("--grad_cache", 2)])
def test_processes_that_share_a_gpu_train_as_one(run, arguments, captioned, tmp_path, extra):
    extra = [captioned / value if str(value).endswith(".json") else value for value in extra]
    command = [*arguments, "--device", "cuda", "--max_steps", 3, "--batch_size", 8, "--no_eval_first", *extra]
    command += ["--num_workers", 0, "--display", 1]
    code, _, err = run(*command, "--experiments", "one")
    assert code == 0, err
    processes = torch.cuda.device_count() + 1
    if 8 % processes:
        pytest.skip(f"{processes} processes do not divide the batch")
    start = Torchrun("main.py", *command, "--experiments", "all", processes=(processes,), marker=tmp_path)
    code, _, err = start.end()
    assert code == 0 and err.count("processes share") == 1, err
    losses = [
        [line["loss"] for line in read_lines(tmp_path / f"logs/{name}/metrics.jsonl") if line["kind"] == "train"]
        for name in ("one", "all")
    ]
    assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], rel=1e-2)
