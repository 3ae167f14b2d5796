import importlib.util
import json
import sys

import pytest

from clip_retrieval.errors import run_and_exit
from tests.conftest import ROOT


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
            code = run_and_exit(module.main)
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return run


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
