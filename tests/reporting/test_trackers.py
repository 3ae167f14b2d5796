"""TensorBoard's hyper-parameters, and the calls that wandb and trackio receive."""

import sys
from types import ModuleType

import pytest

from clip_retrieval.reporting import trackers
from tests.conftest import read_json, read_lines


class Recorder(ModuleType):
    """Replaces wandb or trackio, and records the calls."""

    def __init__(self, name, fails=()):
        super().__init__(name)
        self.__spec__ = object()  # "installed" for importlib.util.find_spec
        self.calls, self._fails = [], fails

    def _record(self, function, *arguments, **options):
        self.calls.append((function, arguments, options))
        if function in self._fails:
            raise RuntimeError(f"{function} failed\nand a traceback")

    def init(self, **options):
        self._record("init", **options)

    def log(self, values, step):
        self._record("log", values, step)

    def finish(self):
        self._record("finish")


@pytest.fixture
def install(monkeypatch):
    def install_recorder(name, **options):
        module = Recorder(name, **options)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return install_recorder


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_receive_options_and_all_metrics(run, arguments, tmp_path, install, name):
    module = install(name)
    command = [*arguments, "--report_to", f"{name},tensorboard", "--max_steps", "4"]
    code, _, err = run(*command)
    assert code == 0, err
    folder = tmp_path / "logs" / "ex0"
    (first, *logs, last) = module.calls
    assert first[0] == "init" and last[0] == "finish" and any((folder / "tensorboard").iterdir())
    settings = first[2]
    assert (settings["project"], settings["name"], settings["resume"]) == ("clip_retrieval", "ex0", "never")
    assert settings["config"]["lr"] == 1e-3 and settings["config"]["loss"] == "infonce"
    written = read_lines(folder / "metrics.jsonl")
    assert [call[1][1] for call in logs] == [line["step"] for line in written]
    losses = [call[1][0]["train/loss"] for call in logs if "train/loss" in call[1][0]]
    assert losses == [line["loss"] for line in written if line["kind"] == "train"]
    assert logs[-1][1][0]["test/rsum"] == read_json(folder / "results.json")["rsum"]


def test_resumed_run_continues_in_wandb_and_an_overwritten_one_is_new(run, run_killed, arguments, install):
    module = install("wandb")
    command = [*arguments, "--report_to", "wandb", "--save_every", "1"]
    run_killed(3, *command)
    code, _, err = run(*command, "--resume", "auto")
    assert code == 0, err
    code, _, err = run(*command, "--overwrite")
    assert code == 0, err
    first, resumed, new = (options for function, _, options in module.calls if function == "init")
    assert first["id"] == resumed["id"] != new["id"]
    assert [call["resume"] for call in (first, resumed, new)] == ["never", "allow", "never"]


@pytest.mark.parametrize(
    "value, words",
    [
        ("trackio", "--report_to trackio: is not installed; install it with: pip install trackio"),
        ("tensorboard,mlflow", "--report_to mlflow: choose from tensorboard, wandb, trackio"),
        ("wandb,", "--report_to"),
    ],
)
def test_missing_and_unknown_trackers_are_one_line(run, arguments, tmp_path, monkeypatch, install, value, words):
    install("wandb")
    find = trackers.importlib.util.find_spec
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None if name == "trackio" else find(name))
    code, _, err = run(*arguments, "--report_to", value)
    assert code == 2 and words in err and err.count("\n") == 1
    assert not (tmp_path / "logs").exists()


def test_refused_login_is_one_line(run, arguments, install):
    install("wandb", fails=("init",))
    code, _, err = run(*arguments, "--report_to", "wandb")
    assert code == 2 and "--report_to wandb: init failed; " in err and err.count("\n") == 1


def test_fault_of_a_service_does_not_end_the_run(run, arguments, tmp_path, install):
    module = install("wandb", fails=("log", "finish"))
    code, _, err = run(*arguments, "--report_to", "wandb")
    assert code == 0 and err.count("wandb receives no further metrics") == 1
    assert [function for function, *_ in module.calls] == ["init", "log"]
    assert len(read_lines(tmp_path / "logs" / "ex0" / "metrics.jsonl")) > 6


def test_none_writes_metrics_jsonl_only(run, arguments, tmp_path):
    code, _, err = run(*arguments, "--report_to", "none", "--max_steps", "2")
    assert code == 0, err
    assert not (tmp_path / "logs/ex0/tensorboard").exists() and (tmp_path / "logs/ex0/metrics.jsonl").exists()


def test_tensorboard_lists_hyper_parameters_of_resumed_runs(run, run_killed, arguments, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    run_killed(3, *arguments, "--save_every", "1")
    code, _, err = run(*arguments, "--save_every", "1", "--resume", "auto")
    assert code == 0, err
    events = EventAccumulator(str(tmp_path / "logs/ex0/tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    content = events.PluginTagToContent("hparams")
    start = HParamsPluginData.FromString(content["_hparams_/session_start_info"]).session_start_info
    assert start.hparams["lr"].number_value == 1e-3
    assert start.hparams["loss"].string_value == "infonce" and start.hparams["freeze_text"].bool_value is False
    shown = HParamsPluginData.FromString(content["_hparams_/experiment"]).experiment
    assert [info.name.tag for info in shown.metric_infos] == ["train/loss", "val/rsum", "test/rsum"]
