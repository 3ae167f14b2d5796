"""Untrusted images: common formats are read, everything else is a one-line error, and no program is started."""

import io
import os
import socket
import struct
import threading
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from clip_retrieval.data.images.decode import FORMATS, LARGEST_FILE, decode_rgb, image_pixels_limit, limit_image_pixels
from clip_retrieval.data.images.image_files import ImageFiles, find_image_files
from clip_retrieval.data.pixels.augment import CropTransform
from clip_retrieval.data.pixels.transforms import evaluation_transform
from clip_retrieval.errors import RunError, UserError
from tests.conftest import read_json
from tests.models.small import small_preprocess

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)


@pytest.fixture
def pixels_limit():
    """limit_image_pixels, undone after the test."""
    before = image_pixels_limit()
    yield limit_image_pixels
    limit_image_pixels(before)


def encoded(format="PNG", pixels=PIXELS, **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


def decoded(content):
    return np.asarray(decode_rgb(io.BytesIO(content), "a.jpg"))


def fails(source, *parts):
    """Return the message for a path, or for the bytes of a file."""
    with pytest.raises(UserError) as error:
        decode_rgb(io.BytesIO(source) if isinstance(source, bytes) else str(source), str(source)[:300])
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    return message


# Formats


@pytest.mark.parametrize("format", FORMATS)
def test_each_format_is_read_under_any_name(format):
    content = encoded(format)
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    np.testing.assert_array_equal(decoded(content), expected)


@pytest.mark.parametrize("format", ["PCX", "TGA", "ICO", "SGI", "IM", "MSP", "DDS", "PDF", "SPIDER", "BLP", "ICNS"])
def test_other_formats_are_one_line_with_a_remedy(format):
    file = io.BytesIO()
    modes = {"MSP": "1", "SPIDER": "F", "BLP": "P"}
    Image.fromarray(PIXELS).resize((16, 16)).convert(modes.get(format, "RGB")).save(file, format)
    fails(file.getvalue(), "JPEG, PNG", "convert it to JPEG or PNG")


@pytest.mark.parametrize("name", ["a.eps", "a.jpg", "a.png", "a"])
@pytest.mark.parametrize("binary_header", [False, True])
def test_an_eps_under_any_name_starts_no_program(tmp_path, monkeypatch, name, binary_header):
    gs = tmp_path / "bin" / "gs"
    gs.parent.mkdir()
    gs.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", f"{gs.parent}:{os.environ['PATH']}")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n%%EOF\n"
    header = b"\xc5\xd0\xd3\xc6" + struct.pack("<6IH", 30, len(eps), 0, 0, 0, 0, 0xFFFF)
    path = tmp_path / name
    path.write_bytes(header + eps if binary_header else eps)
    fails(path, "convert it to JPEG or PNG")
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF", "MPO", "AVIF"])
def test_the_first_of_several_frames_is_read(format):
    frames = [np.full((12, 16, 3), value, np.uint8) for value in (10, 200, 90)]
    more = [Image.fromarray(frame) for frame in frames[1:]]
    assert abs(decoded(encoded(format, frames[0], save_all=True, append_images=more)).astype(int) - 10).max() <= 2


# Valid images that Pillow refuses by default


def text_png(kind, place="before", megabytes=2):
    """A PNG with long text before or after its pixels."""
    text = b"x" * (megabytes << 20)
    packed = zlib.compress(text)
    chunks = {
        "zTXt": [b"prompt\0\0" + packed],
        "iTXt": [b"prompt\0\1\0\0\0" + packed],
        "iTXt, not compressed": [b"XML:com.adobe.xmp\0\0\0\0\0" + text],
        "tEXt": [b"prompt\0" + text] * 40,
        "iCCP": [b"profile\0\0" + packed],
        "broken zTXt": [b"prompt\0\7" + packed[:50]],
    }[kind]
    content, kind = encoded(), kind.removeprefix("broken ")[:4].encode()
    body = b"".join(
        struct.pack(">I", len(chunk)) + kind + chunk + struct.pack(">I", zlib.crc32(kind + chunk)) for chunk in chunks
    )
    at = content.index(b"IDAT") - 4 if place == "before" else content.index(b"IEND") - 4
    return content[:at] + body + content[at:]


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "iTXt, not compressed", "tEXt", "iCCP", "broken zTXt"])
def test_text_in_a_png_is_skipped(kind, place):
    np.testing.assert_array_equal(decoded(text_png(kind, place)), PIXELS)


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "iCCP"])
def test_text_in_a_png_is_never_decompressed(kind, monkeypatch):
    content = text_png(kind, megabytes=20)

    def decompress(*arguments):
        raise AssertionError("decompressed")

    monkeypatch.setattr(PngImagePlugin, "_safe_zlib_decompress", decompress)
    assert len(content) < 50_000
    np.testing.assert_array_equal(decoded(content), PIXELS)


@pytest.mark.parametrize("size", [(20000, 9000), (23000, 21700), (500_000, 1000)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_scans_and_maps_are_within_the_default_limit(size):
    assert image_pixels_limit() == 500_000_000
    Image._decompression_bomb_check(size)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("format", FORMATS)
def test_an_image_above_the_limit_names_the_option(pixels_limit, format):
    content = encoded(format)
    pixels_limit(16 * 12 - 1)
    fails(content, "192 pixels are more than --max_image_pixels 191", "raise it")
    pixels_limit(16 * 12)
    assert decoded(content).shape == (12, 16, 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_limit_reaches_loaders_and_is_recorded(run, arguments, tmp_path, workers, pixels_limit):
    command = [*arguments, "--max_steps", "1", "--no_eval_first", "--num_workers", workers, "--max_image_pixels"]
    code, _, err = run(*command, "479")  # they have 24 x 20
    assert code == 2 and "480 pixels are more than --max_image_pixels 479" in err, err
    assert run(*command, "480", "--overwrite")[0] == 0
    assert read_json(tmp_path / "logs/ex0/options.json")["max_image_pixels"] == 480
    last = tmp_path / "logs/ex0/last.pt"
    assert run("--eval", "--resume", last, "--device", "cpu")[0] == 0 and image_pixels_limit() == 480


def png_header(width, height):
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return encoded()[:8] + chunk + encoded()[33:]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_small_file_that_unpacks_to_gigabytes_is_refused():
    fails(png_header(100_000, 100_000), "10,000,000,000 pixels", "--max_image_pixels 500000000")
    fails(png_header(1, 2**28), "268,435,456 pixels are too long for an image")  # its rows alone would take 2 GB
    fails(b"BM" + struct.pack("<IIIIiiHHIIiiII", 0, 0, 54, 40, 60000, 60000, 1, 24, 0, 0, 0, 0, 0, 0), "3,600,000,000")
    fails(b"P6 70000 70000 255\n", "4,900,000,000")
    gif = encoded("GIF")
    fails(gif[:6] + struct.pack("<HH", 65535, 65535) + gif[10:], "4,294,836,225 pixels")


def test_a_progressive_jpeg_of_thousands_of_scans_is_refused():
    content = encoded("JPEG", progressive=True)
    first, second = [at for at in range(len(content)) if content[at : at + 2] == b"\xff\xda"][1:3]
    scan = content[first:second]
    fails(content[:-2] + scan * 2000 + content[-2:], "scans")
    assert decoded(content[:-2] + scan * 20 + content[-2:]).shape == (12, 16, 3)


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (3, 20000), (1, 1), (1, 2)])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("decoder", ["pillow", "fast"])
def test_long_thin_images_are_read_and_resized(size, mode, decoder):
    image = decode_rgb(io.BytesIO(encoded(pixels=np.full((*size[::-1], 3), 77, np.uint8))), "a.png")
    assert max(image.size) <= 256 * min(image.size)
    for preprocess in (small_preprocess(16), small_preprocess((16, 24)), small_preprocess(64)):
        pixels = evaluation_transform(preprocess | {"resize_mode": mode}, decoder)(image)
        assert pixels.shape == (
            3,
            *(preprocess["size"] if isinstance(preprocess["size"], tuple) else (pixels.shape[1],) * 2),
        )
        assert 77 in pixels
    assert (CropTransform(small_preprocess(), decoder)(image, 5) == 77).all()


def test_long_images_are_cropped_to_their_middle():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 2000, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decoded(encoded(pixels=pixels)), pixels[:, 744:1256])
    np.testing.assert_array_equal(decoded(encoded(pixels=pixels[:, :512])), pixels[:, :512])


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "jpeg", "group4"])
def test_a_damaged_tiff_prints_nothing(capfd, caplog, compression):
    file = io.BytesIO()
    image = Image.fromarray(PIXELS)
    (image.convert("1") if compression == "group4" else image).save(file, "tiff", compression=compression)
    content = file.getvalue()
    refused = 0
    for at in range(8, len(content) - 1, max(1, len(content) // 60)):
        damaged = content[:at] + bytes([content[at] ^ 0xFF, content[at + 1] ^ 0x10]) + content[at + 2 :]
        try:
            decoded(damaged)
        except UserError:
            refused += 1
    assert refused > 5 and capfd.readouterr() == ("", "") and not caplog.records


# Paths that are not files


@pytest.fixture
def odd_paths(tmp_path):
    """Paths of no regular file, and invalid paths."""
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "gone")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    (tmp_path / "to_fifo.jpg").symlink_to(tmp_path / "fifo.jpg")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket.jpg"))
    names = ["fifo.jpg", "to_fifo.jpg", "folder.jpg", "dangling.jpg", "loop.jpg", "socket.jpg", "a\0.jpg", "\ud800.jpg"]
    yield [f"{tmp_path}/{name}" for name in names] + ["/dev/zero", "/dev/tty", "/dev/stdin", "x" * 300]
    listener.close()


def test_only_regular_files_are_read_without_waiting(odd_paths):
    images = ImageFiles(odd_paths)
    failed = []

    def read_all():
        for index in range(len(images)):
            for read in (images.__getitem__, images.encoded):
                with pytest.raises(UserError, match=r"not a readable image|no such image"):
                    read(index)
            failed.append(index)

    thread = threading.Thread(target=read_all, daemon=True)
    thread.start()
    thread.join(20)
    assert failed == list(range(len(odd_paths)))


def test_a_file_name_that_is_not_utf8_is_read(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9\n.png")
    with open(path, "wb") as file:  # noqa: PTH123
        file.write(encoded())
    images = find_image_files([(tmp_path, [os.path.basename(path)])], "captions.csv")  # noqa: PTH119
    assert images[0].size == (16, 12) and images.encoded(0) == encoded()


@pytest.mark.parametrize("name", ["a\0b.jpg", "sub\0dir/a.jpg", "\ud800/a.jpg", "x" * 5000 + "/a.jpg", "loop/a.jpg"])
def test_invalid_names_are_missing_images(tmp_path, name):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError, match="1 of 1 image is missing"):
        find_image_files([(tmp_path, [name])], "captions.csv")


def test_a_file_too_large_for_an_image_is_not_read(tmp_path):
    with (tmp_path / "a.jpg").open("wb") as file:
        file.truncate(LARGEST_FILE + 1)  # a hole
    with pytest.raises(UserError, match="more than 2 GiB"):
        ImageFiles([str(tmp_path / "a.jpg")]).encoded(0)
    fails(tmp_path / "a.jpg", "not a readable image")


def test_an_image_larger_than_the_memory_is_code_3(monkeypatch):
    def convert(image):
        raise MemoryError

    with pytest.raises(RunError, match=r"a\.jpg: the memory is too small to decode this image"):
        decode_rgb(io.BytesIO(encoded()), "a.jpg", convert)


@pytest.mark.parametrize(
    ("name", "size"), [("large.jpg", (500, 250)), ("small.jpg", (220, 210)), ("large.png", (2000, 1000))]
)
def test_min_side_reduces_a_jpeg_to_no_less(tmp_path, name, size):
    Image.new("RGB", (220, 210) if name == "small.jpg" else (2000, 1000), "red").save(tmp_path / name)
    assert decode_rgb(str(tmp_path / name), name, min_side=200).size == size
    assert decode_rgb(str(tmp_path / name), name).size in ((2000, 1000), (220, 210))
