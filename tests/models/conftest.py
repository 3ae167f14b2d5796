import urllib.error

import pytest


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """Refuse every connection and use empty caches."""

    def refuse(*args, **kwargs):
        raise OSError("no network in this test")

    def refuse_url(*args, **kwargs):
        raise urllib.error.URLError("no network in this test")

    monkeypatch.setattr("socket.create_connection", refuse)
    monkeypatch.setattr("urllib.request.urlopen", refuse_url)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HOME", str(tmp_path))
