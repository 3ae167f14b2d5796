"""The web application: results, and requests of other sites, traversal, and content that is no image."""

import io
import json
import socket
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import waitress
from PIL import Image

from clip_retrieval.data.images.decode import image_pixels_limit, limit_image_pixels
from clip_retrieval.search.query import Gallery
from clip_retrieval.search.serve import LIMITS, is_loopback
from clip_retrieval.search.source import INDEX_FOLDER
from clip_retrieval.search.thumbnails import Thumbnails
from clip_retrieval.search.web import HEADERS, MAX_BODY, make_app
from tests.conftest import ROOT
from tests.faults.hostile.images import _black
from tests.search.conftest import paint

LOCAL = {"base_url": "http://127.0.0.1:8000"}


@pytest.fixture
def gallery(indexed):
    limit = image_pixels_limit()
    yield Gallery(indexed, indexed / INDEX_FOLDER, {"max_image_pixels": 10**6})
    limit_image_pixels(limit)


@pytest.fixture
def client(gallery):
    return make_app(lambda: gallery).test_client()


@pytest.fixture
def port(gallery):
    """The port of a real server with the limits of search.py."""
    server = waitress.create_server(make_app(lambda: gallery), host="127.0.0.1", port=0, threads=2, **LIMITS)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    yield server.effective_port
    server.close()


def send(port, data, wait=5.0):
    """Send bytes to the server and return the status of its answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=wait) as connection:
        connection.sendall(data)
        return int(connection.recv(4096).split(b" ")[1])


def names(response):
    assert response.status_code == 200, response.text
    return [each["name"] for each in response.json["results"]]


def test_results_equal_the_command_line(client, indexed, script):
    code, out, err = script("search", "a house", indexed, "--not", "people", "--top_k", 4, "--json")
    assert code == 0, err
    expected = json.loads(out)["results"]
    found = client.get("/search?q=a+house&not=people&k=4", **LOCAL).json["results"]
    assert [each["name"] for each in found] == [each["name"] for each in expected]
    np.testing.assert_allclose([each["score"] for each in found], [each["score"] for each in expected], atol=1e-6)


def test_similar_and_uploaded_images_find_themselves(client, gallery, indexed):
    for row, entry in enumerate(gallery.entries):
        assert names(client.get(f"/search?like={row}&k=1", **LOCAL)) == [entry.name]
        content = (indexed / entry.name).read_bytes()
        assert names(client.post("/search?k=1", data=content, **LOCAL)) == [entry.name]


def test_text_and_image_are_combined(client, gallery):
    query = gallery.encode_query(["a house"], rows=[2])
    expected = [gallery.entries[row].name for row in gallery.search(query, 6)[0]]
    assert names(client.get("/search?q=a+house&like=2&k=6", **LOCAL)) == expected


def test_without_a_query_some_images_are_shown(client):
    results = client.get("/search?k=3", **LOCAL).json["results"]
    assert [each["row"] for each in results] == [0, 2, 5] and results[0]["score"] is None


def test_images_are_reduced_jpegs_without_metadata(photos, index):
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "secret place"
    Image.new("RGB", (3000, 1000), "red").save(photos / "large.jpg", exif=exif)
    assert index()[0] == 0
    gallery = Gallery(photos, photos / INDEX_FOLDER, {})
    row = next(row for row, entry in enumerate(gallery.entries) if entry.name == "large.jpg")
    client = make_app(lambda: gallery).test_client()
    for size, shape in (("small", (160, 480)), ("large", (533, 1600))):
        response = client.get(f"/image/{row}/{size}", **LOCAL)
        image = Image.open(io.BytesIO(response.data))
        assert response.mimetype == "image/jpeg" and image.size == shape and b"secret" not in response.data


def test_thumbnail_cache_is_bounded(indexed):
    paths = [str(path) for path in sorted(indexed.glob("*.jpg"))]
    size = len(Thumbnails().get(paths[0], "small"))
    thumbnails = Thumbnails(max_bytes=int(2.5 * size))
    for path in paths:
        thumbnails.get(path, "small")
    assert list(thumbnails._cache) == paths[-2:] and sum(map(len, thumbnails._cache.values())) <= 2.5 * size
    thumbnails.get(paths[-2], "small")
    thumbnails.get(paths[0], "small")
    assert list(thumbnails._cache) == [paths[-2], paths[0]]


@pytest.mark.parametrize(
    "path",
    [
        "/image/6/small",
        "/image/-1/small",
        "/image/1e0/small",
        "/image/99999999999999999999/small",
        "/image/٣/small",
        "/image/0/../../etc/passwd",
        "/image/..%2f..%2fetc%2fpasswd/small",
        "/image/0.jpg/small",
        "/image/0/huge",
        "/static/../web.py",
        "/static/..%2fweb.py",
        "/static/%2e%2e/web.py",
        "/static//etc/passwd",
        "/.clip_search/index.jsonl",
        "/search?like=6",
        "/search?like=../0.jpg",
    ],
)
def test_only_indexed_images_are_served(client, path):
    response = client.get(path, **LOCAL)
    assert response.status_code == 404 and list(response.json) == ["error"]


def test_every_answer_has_the_security_headers(client):
    for path in ("/", "/info", "/search", "/image/0/small", "/static/app.js", "/none"):
        response = client.get(path, **LOCAL)
        assert HEADERS.items() <= dict(response.headers).items(), path
    assert "default-src 'none'" in HEADERS["Content-Security-Policy"]
    assert client.get("/", headers={"Host": "evil.example"}).headers["X-Content-Type-Options"] == "nosniff"


FOREIGN = ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "192.168.0.7")


@pytest.mark.parametrize("host", [*FOREIGN, "[::1", "127.0.0.1@evil.example", ""])
def test_foreign_hosts_are_refused(client, host):
    for path in ("/", "/info", "/search?q=a", "/image/0/small", "/static/app.js"):
        assert client.get(path, headers={"Host": host}).status_code in (400, 403), path


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost", "LOCALHOST:8000", "[::1]:8000"])
def test_names_of_this_machine_are_accepted(client, host):
    assert client.get("/info", headers={"Host": host}).status_code == 200


def test_an_open_server_accepts_addresses_but_no_foreign_names(gallery):
    client = make_app(lambda: gallery, {"box", "0.0.0.0"}, any_address=True).test_client()
    for host, status in (("192.168.0.7:80", 200), ("[fe80::1]:80", 200), ("box", 200), ("evil.example", 403)):
        assert client.get("/info", headers={"Host": host}).status_code == status, host
    assert is_loopback("127.0.0.1") and is_loopback("::1") and is_loopback("localhost")
    assert not is_loopback("0.0.0.0") and not is_loopback("192.168.0.7") and not is_loopback("box")


def test_requests_of_other_sites_are_refused(client, indexed):
    content = (indexed / "0.jpg").read_bytes()
    for origin in ("http://evil.example", "null", "http://127.0.0.1:9000", "https://127.0.0.1:8000"):
        assert client.post("/search", data=content, headers={"Origin": origin}, **LOCAL).status_code == 403
        assert client.get("/search?q=a", headers={"Origin": origin}, **LOCAL).status_code == 403
    for site in ("cross-site", "same-site"):
        headers = {"Sec-Fetch-Site": site}
        assert client.get("/image/0/small", headers=headers, **LOCAL).status_code == 403
        assert client.get("/", headers=headers, **LOCAL).status_code == 200  # a link to the page
    same = {"Origin": "http://127.0.0.1:8000", "Sec-Fetch-Site": "same-origin"}
    assert client.post("/search", data=content, headers=same, **LOCAL).status_code == 200


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "TRACE"])
def test_other_methods_are_refused(client, method):
    for path in ("/", "/search", "/image/0/small"):
        assert client.open(path, method=method, **LOCAL).status_code == 405


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no image",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"\xff\xd8\xff\xe0" + bytes(1000),
        _black(3000, 3000),
        struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 99, 0, 0, 54, 40, 2**30, 2**30, 1, 24, 0, 0, 0, 0, 0, 0),
    ],
    ids=["empty", "text", "svg", "eps", "jpeg", "bomb", "bmp"],
)
def test_uploads_that_are_no_image_are_refused(client, content):
    response = client.post("/search", data=content, **LOCAL)
    assert response.status_code == 400 and "the image" in response.json["error"]
    assert names(client.get("/search?q=a&k=1", **LOCAL))


def test_long_texts_and_strange_numbers(client):
    assert client.get("/search?q=" + "a" * 1001, **LOCAL).status_code == 400
    for text in ("%00", "%ff%fe", "%F0%9F%90%95", "&lt;script&gt;", "'\"><img src=x>", "\u202e"):
        assert len(names(client.get(f"/search?q=a{text}&not={text}", **LOCAL))) == 6, text
    for k, count in (("0", 1), ("-5", 1), ("x", 6), ("999999999999", 6), ("1e9", 6)):
        assert len(names(client.get(f"/search?q=a&k={k}", **LOCAL))) == count, k


def test_image_that_vanished_or_changed_is_not_found(client, gallery, indexed):
    gallery.path(0).unlink()
    gallery.path(1).write_text("no image")
    for row in (0, 1):
        response = client.get(f"/image/{row}/small", **LOCAL)
        assert response.status_code == 404 and str(indexed) not in response.text


def test_large_bodies_are_refused_before_they_are_read(port):
    head = b"POST /search HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    assert send(port, head + b"Content-Length: %d\r\n\r\n" % (MAX_BODY + 1)) == 413
    assert send(port, head + b"Content-Length: -1\r\n\r\n") == 400
    assert send(port, head + b"Content-Length: x\r\n\r\n") == 400
    assert send(port, b"GET /" + b"a" * 2**15 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n") in (414, 431)
    assert send(port, b"GET /../../etc/passwd HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n") == 404
    assert send(port, b"GET /info HTTP/1.1\r\nHost: evil.example\r\n\r\n") == 403


def test_silent_connections_do_not_block_others(port):
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(50)]
    for connection in silent[::2]:
        connection.sendall(b"POST /search HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\n")
    assert send(port, b"GET /search?q=a HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", wait=30) == 200
    for connection in silent:
        connection.close()


def test_simultaneous_searches_give_the_same_results(gallery):
    app = make_app(lambda: gallery)
    texts = [f"a {word} house" for word in ("red", "green", "blue", "old")]
    expected = [names(app.test_client().get(f"/search?q={text}", **LOCAL)) for text in texts]
    found = {}

    def search(number):
        found[number] = names(app.test_client().get(f"/search?q={texts[number % 4]}", **LOCAL))

    threads = [threading.Thread(target=search, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(16)] == expected * 4


def test_searches_in_chinese(script, real_data, tmp_path, gallery):
    weights = real_data / "chinese_clip_tiny"
    photos = tmp_path / "照片"
    for number in range(3):
        paint(photos / f"图{number}.jpg", number, (64, 48))
    model = ("--pretrained", weights / "clip_cn_tiny.pt", "--tokenizer", weights / "vocab.txt", "--device", "cpu")
    code, _, err = script("search", "index", photos, *model, "--num_workers", 0)
    assert code == 0, err
    gallery = Gallery(photos, photos / INDEX_FOLDER, {"device": "cpu"})
    client = make_app(lambda: gallery).test_client()
    scores = [client.get(f"/search?q={text}", **LOCAL).json["results"][0]["score"] for text in ("一只狗", "海滩上的人")]
    assert scores[0] != scores[1]
    assert set(names(client.get("/search?q=一只狗&not=人", **LOCAL))) == {f"图{number}.jpg" for number in range(3)}


def test_missing_packages_are_asked_for(indexed, monkeypatch, script):
    for name in [name for name in sys.modules if name.startswith("clip_retrieval.search.serve")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "waitress", None)
    code, _, err = script("search", "serve", indexed)
    assert code == 2 and "pip install flask waitress" in err and err.count("\n") == 1


@pytest.mark.slow
def test_serve_prints_its_address_and_ends_with_ctrl_c(indexed):
    command = [sys.executable, ROOT / "scripts" / "search.py", "serve", indexed, "--port", 0]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = next(line for line in process.stdout if "http://" in line)
        port = int(line.split("http://127.0.0.1:")[1].split()[0])
        assert "6 images" in line and send(port, b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n") == 200
        command[-1] = port
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert done.returncode == 2 and "choose another --port" in done.stderr and done.stderr.count("\n") == 1
        # thumbnails that wait for a thread are no warning
        connections = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(40)]
        for row, connection in enumerate(connections):
            connection.sendall(f"GET /image/{row % 6}/large HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        for connection in connections:
            assert connection.recv(12).endswith(b"200")
            connection.close()
        time.sleep(0.2)
        process.send_signal(2)
        assert process.wait(timeout=60) == 0 and process.stderr.read() == ""
    finally:
        process.kill()
