"""A running server takes over an updated index, and keeps the old one if the new one cannot be used."""

import pytest

from clip_retrieval.search.query import Gallery
from clip_retrieval.search.source import INDEX_FOLDER
from clip_retrieval.search.watch import Watcher
from tests.search.conftest import paint

pytest.importorskip("flask")
LOCAL = {"base_url": "http://127.0.0.1:8000"}


@pytest.fixture
def watcher(indexed):
    return Watcher(Gallery(indexed, indexed / INDEX_FOLDER, {}))


def test_updated_index_is_served_with_the_same_model(watcher, index, indexed, capsys):
    from clip_retrieval.search.web import make_app

    client = make_app(lambda: watcher.gallery).test_client()
    shown = client.get("/search?q=a+house&k=6", **LOCAL).json["results"]
    encoder = watcher.gallery.encoder
    watcher.check()
    assert watcher.gallery.encoder is encoder and len(watcher.gallery.entries) == 6
    (indexed / "0.jpg").unlink()
    paint(indexed / "new.jpg", 99)
    assert index()[0] == 0
    capsys.readouterr()
    watcher.check()
    assert watcher.gallery.encoder is encoder and "the index was updated: 6 images" in capsys.readouterr().out
    names = [each["name"] for each in client.get("/search?q=a+house&k=9", **LOCAL).json["results"]]
    assert "new.jpg" in names and "0.jpg" not in names

    # a page of the old index shows its images or none, never others
    for each in shown:
        address = f"{each['row']}-{each['version']}"
        same = watcher.gallery.entries[each["row"]].name == each["name"]
        assert client.get(f"/image/{address}/small", **LOCAL).status_code == (200 if same else 404)
        reply = client.get(f"/search?like={address}&k=1", **LOCAL)
        assert reply.json["results"][0]["name"] == each["name"] if same else "search again" in reply.json["error"]
    assert not all(watcher.gallery.entries[each["row"]].name == each["name"] for each in shown)


def test_index_of_another_model_or_a_damaged_one_is_not_taken_over(watcher, script, indexed, models, capsys):
    old = watcher.gallery
    other = ("--vision_model", models / "small.json", "--pretrained", models / "b.pt", "--num_workers", 0)
    assert script("search", "index", indexed, *other, "--overwrite")[0] == 0
    watcher.check()
    assert watcher.gallery is old and "with other weights" in capsys.readouterr().err
    (indexed / INDEX_FOLDER / "index.jsonl").write_text("{}\n")
    watcher.check()
    assert watcher.gallery is old and "not an index" in capsys.readouterr().err
    (indexed / INDEX_FOLDER / "index.jsonl").unlink()
    watcher.check()
    assert watcher.gallery is old and "has no index" in capsys.readouterr().err


def test_thread_builds_faiss_and_sees_the_update(index, indexed):
    pytest.importorskip("faiss")
    watcher = Watcher(Gallery(indexed, indexed / INDEX_FOLDER, {}), faiss=True, seconds=0.01)
    first = watcher.gallery
    watcher.start()
    try:
        paint(indexed / "new.jpg", 99)
        assert index()[0] == 0
        for _ in range(1000):
            watcher.join(0.01)
            if len(watcher.gallery.entries) == 7:
                break
        assert len(watcher.gallery.entries) == 7 and len(first.entries) == 6
        assert "new.jpg" in [entry.name for entry in watcher.gallery.entries]
    finally:
        watcher.end()
        watcher.join(10)
    assert not watcher.is_alive() and first._propose is not None
