"""The cache: the same pixels as without it, also after concurrent and interrupted builds."""

import errno
import logging
import math
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clip_retrieval.data.images.image_files import ImageFiles
from clip_retrieval.data.pixels import cache, cache_file
from clip_retrieval.data.pixels.cache import open_cached_pixels
from clip_retrieval.data.pixels.cache_file import read_records
from clip_retrieval.data.pixels.pixels import make_pixels
from clip_retrieval.errors import RunError, UserError
from clip_retrieval.log import log
from tests.data.pixels.test_pixels import DECODERS, difference, smooth
from tests.models.small import small_preprocess

IMAGES = 12
fork = multiprocessing.get_context("fork")


@pytest.fixture
def images(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(IMAGES):
        Image.fromarray(smooth(17 + 3 * i, 60 - 2 * i, i)).save(tmp_path / "images" / f"{i}.jpg")
    return CountingImages([str(tmp_path / "images" / f"{i}.jpg") for i in range(IMAGES)])


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def logged(caplog, monkeypatch):
    """logged() returns the messages logged since its last call."""
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.INFO, "clip_retrieval")

    def lines():
        messages = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return messages

    return lines


class CountingImages(ImageFiles):
    """Records each decoded image, of all processes, in a file; kills its process at image `kill_at`."""

    kill_at = None

    def __getitem__(self, index):
        if index == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        with Path(self.paths[0] + ".decoded").open("a") as file:
            file.write(f"{index}\n")
        return super().__getitem__(index)

    def decoded(self):
        """The images decoded since the last call."""
        path = Path(self.paths[0] + ".decoded")
        indices = [int(line) for line in path.read_text().split()] if path.exists() else []
        path.unlink(missing_ok=True)
        return indices


def build(
    images, folder, name="test_train", augment="none", crop_scale=0.9, decoder="pillow", num_workers=0, **settings
):
    return open_cached_pixels(
        images,
        small_preprocess() | settings,
        folder,
        name,
        augment=augment,
        crop_scale=crop_scale,
        decoder=decoder,
        num_workers=num_workers,
    )


def all_of(pixels):
    return pixels.batch(range(IMAGES), range(IMAGES))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# Reading


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [16, (16, 24)])
def test_pixels_equal_those_without_a_cache(images, folder, decoder, mode, size):
    settings = {"resize_mode": mode, "size": size}
    cached = build(images, folder, decoder=decoder, **settings)
    expected = all_of(make_pixels(images, small_preprocess() | settings, decoder=decoder))
    assert cached.in_memory and len(cached) == IMAGES
    assert torch.equal(all_of(cached), expected)
    assert all(torch.equal(cached(i), expected[i]) for i in range(IMAGES))


def test_workers_do_not_change_the_pixels(images, folder, monkeypatch):
    monkeypatch.setattr(cache, "IMAGES_PER_REQUEST", 5)
    single, parallel = build(images, folder / "a"), build(images, folder / "b", num_workers=2)
    assert torch.equal(all_of(single), all_of(parallel))


def test_returned_pixels_are_writable_copies(images, folder):
    cached = build(images, folder)
    before = all_of(cached)
    cached(0).zero_()
    all_of(cached).zero_()
    assert torch.equal(all_of(cached), before)


@pytest.mark.parametrize("augment", ["none", "crop"])
def test_unpickled_cache_opens_the_file_itself(images, folder, augment):
    cached = build(images, folder, augment=augment)
    pickled = pickle.dumps(cached)
    assert len(pickled) < 2000
    assert torch.equal(all_of(pickle.loads(pickled)), all_of(cached))


@pytest.mark.parametrize("augment", ["crop", "auto", "auto_flip", "rand"])
@pytest.mark.parametrize("decoder", DECODERS)
def test_crops_of_small_images_equal_those_without_a_cache(images, folder, decoder, augment):
    settings = {"size": 64, "augment": augment, "crop_scale": 0.5, "decoder": decoder}
    uncached = make_pixels(images, small_preprocess(64), augment=augment, crop_scale=0.5, decoder=decoder)
    assert torch.equal(all_of(build(images, folder, **settings)), all_of(uncached))


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("shape", [(480, 640), (640, 480), (300, 310), (100, 900)])
def test_crops_of_shrunk_images_have_the_same_region(tmp_path, folder, decoder, shape):
    across, down = np.meshgrid(np.linspace(0, 255, shape[1]), np.linspace(0, 255, shape[0]))
    place = np.stack([across, down, 0 * down], axis=-1).round().astype(np.uint8)  # each pixel encodes its position
    Image.fromarray(place).save(tmp_path / "place.png")
    images = ImageFiles([str(tmp_path / "place.png")])
    cached = build(images, folder, augment="crop", decoder=decoder, size=56)
    uncached = make_pixels(images, small_preprocess(56), augment="crop", decoder=decoder)
    record = read_records(next(folder.glob("*.pixels")), 1)[0]
    assert min(record["height"], record["width"]) == math.ceil(56 * 8 / 7)
    assert record["height"] / record["width"] == pytest.approx(shape[0] / shape[1], rel=0.01)
    a_pixel = 255 / min(record["height"], record["width"])
    for seed in range(8):
        assert difference(cached(0, seed), uncached(0, seed)) <= a_pixel


def test_crops_need_worker_processes(images, folder):
    assert not build(images, folder, augment="crop").in_memory


# Building


def test_second_run_decodes_nothing(images, folder, logged):
    built = build(images, folder)
    assert images.decoded() == list(range(IMAGES))
    path = next(folder.iterdir())
    assert path.name.startswith("test_train_") and path.suffix == ".pixels" and names(folder) == [path.name]
    assert logged() == [
        f"image cache: building {path}: {IMAGES} images, 0.00 GB",
        f"image cache: {path} ({IMAGES} images, 0.00 GB)",
    ]
    again = build(images, folder)
    assert images.decoded() == [] and logged() == [f"image cache: {path} ({IMAGES} images, 0.00 GB)"]
    assert torch.equal(all_of(again), all_of(built))


def test_size_is_logged_before_building(images, folder, logged, monkeypatch):
    monkeypatch.setattr(cache, "_format_gb", lambda size: f"{size} bytes")
    build(images, folder)
    assert f"{IMAGES * 3 * 16 * 16} bytes" in logged()[0]
    build(images, folder, augment="crop")
    before, after = (int(line.split()[-2].lstrip("(")) for line in logged())
    assert after == pytest.approx(before, abs=1000)  # differs by the records only: all images are in the sample


def test_each_preprocessing_and_decoder_has_its_own_file(images, folder):
    kinds = [
        {"size": 16},
        {"size": 18},
        {"resize_mode": "squash"},
        {"interpolation": "bilinear"},
        {"decoder": "fast"},
        {"augment": "crop"},
    ]
    first = [all_of(build(images, folder, **kind)) for kind in kinds]
    assert len(names(folder)) == len(kinds)
    images.decoded()
    for kind, pixels in zip(kinds, first):
        assert torch.equal(all_of(build(images, folder, **kind)), pixels)
    assert images.decoded() == []
    build(images, folder, mean=[0.5] * 3, std=[0.5] * 3)
    assert images.decoded() == []  # normalisation happens on the device


def test_changed_source_is_decoded_again(images, folder, logged):
    old = all_of(build(images, folder))
    images.decoded(), logged()
    Image.fromarray(smooth(40, 40, 99)).save(images.paths[5])
    new = all_of(build(images, folder))
    assert images.decoded() == list(range(IMAGES)) and len(names(folder)) == 1
    assert "1 image changed since" in logged()[0]
    assert torch.equal(new, all_of(make_pixels(images, small_preprocess())))
    assert not torch.equal(new[5], old[5])


def test_changed_source_of_the_same_size_is_decoded_again(images, folder):
    build(images, folder)
    images.decoded()
    stat = Path(images.paths[5]).stat()
    os.utime(images.paths[5], ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    build(images, folder)
    assert images.decoded() == list(range(IMAGES))


def test_another_list_of_images_has_its_own_file(images, folder):
    build(images, folder)
    build(ImageFiles(images.paths[::-1]), folder)
    assert len(names(folder)) == 2


@pytest.mark.parametrize("cut", [1, 100, 5000])
def test_truncated_file_is_rebuilt(images, folder, logged, cut):
    pixels = all_of(build(images, folder))
    path = next(folder.iterdir())
    os.truncate(path, path.stat().st_size - cut)
    images.decoded(), logged()
    assert torch.equal(all_of(build(images, folder)), pixels)
    assert "is incomplete" in logged()[0] and len(images.decoded()) == IMAGES


# Damaged or hostile files


def with_end(records, images=None, magic=b"PIXELS01", pixels=0):
    """A file with `pixels` zero bytes, these records, and an end that gives `images` as their number."""
    end = np.array((len(records) if images is None else images, magic), cache_file._END)
    return bytes(pixels) + np.array(records, cache_file.RECORD).tobytes() + end.tobytes()


BIG = 2**31 - 1
DAMAGED = {
    "nothing": b"",
    "only an end": with_end([]),
    "fewer images": with_end([(16, 16, 9, 9, 1, 1)], pixels=768),
    "a negative number": with_end([(16, 16, 9, 9, 1, 1)] * IMAGES, images=-1, pixels=768 * IMAGES),
    "a huge number": with_end([(16, 16, 9, 9, 1, 1)] * IMAGES, images=2**62, pixels=768 * IMAGES),
    "sides of 0": with_end([(0, 0, 9, 9, 1, 1)] * IMAGES),
    "negative sides": with_end([(-16, -16, 9, 9, 1, 1)] * IMAGES, pixels=768 * IMAGES),
    "sides that overflow": with_end([(BIG, BIG, 9, 9, 1, 1)] * IMAGES),
    "a sum that overflows": with_end([(BIG, BIG - i, 9, 9, 1, 1) for i in range(IMAGES)], pixels=768),
    "sources of 0": with_end([(16, 16, 0, 0, 1, 1)] * IMAGES, pixels=768 * IMAGES),
    "another magic": with_end([(16, 16, 9, 9, 1, 1)] * IMAGES, magic=b"PIXELS02", pixels=768 * IMAGES),
}


@pytest.mark.parametrize("augment", ["none", "crop"])
@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_cache_is_rebuilt(images, folder, logged, name, augment):
    expected = all_of(build(images, folder / "other", augment=augment))
    build(images, folder, augment=augment)
    path = next(folder.glob("*.pixels"))
    path.write_bytes(DAMAGED[name])
    logged()
    assert torch.equal(all_of(build(images, folder, augment=augment)), expected)
    assert "is incomplete or damaged; rebuilding it" in logged()[0]


@pytest.mark.parametrize("augment", ["none", "crop"])
@pytest.mark.parametrize("field", ["height", "width", "source_height", "source_width"])
def test_records_of_other_sizes_are_rebuilt(images, folder, logged, field, augment):
    """The sum of the sizes may be right: swapped images, or invented source sizes."""
    expected = all_of(build(images, folder, augment=augment))
    path = next(folder.glob("*.pixels"))
    content = path.read_bytes()
    records = read_records(path, IMAGES).copy()
    if field.startswith("source") and augment == "none":
        return  # not used there
    for sides in ((2, 3), (3, 4)):
        records[field][list(sides)] = records[field][list(sides)][::-1] * 3 - 17
    path.write_bytes(content[: -32 * IMAGES - 16] + records.tobytes() + content[-16:])
    assert torch.equal(all_of(build(images, folder, augment=augment)), expected)


@pytest.mark.parametrize("suffix", ["journal", "partial"])
def test_damaged_files_of_a_killed_run_do_not_change_the_result(images, folder, flush_often, suffix):
    kill_build_at(7, images, folder, "none")
    expected = all_of(make_pixels(images, small_preprocess()))
    kept = {path: path.read_bytes() for path in folder.iterdir()}
    draw = np.random.default_rng(0)
    for _ in range(60):
        for path, content in kept.items():
            damaged = np.frombuffer(content, np.uint8).copy()
            if path.suffix == f".{suffix}":
                damaged[draw.integers(0, len(damaged), 5)] = draw.choice([0, 1, 127, 128, 255], 5)
                damaged = np.concatenate([damaged] * int(draw.choice([1, 1, 3])))[: draw.integers(1, 3 * len(damaged))]
            path.write_bytes(damaged.tobytes())
        cached = all_of(build(images, folder))
        if suffix == "journal":  # pixels have no checksums: a flipped bit changes a shade
            assert torch.equal(cached, expected)
        next(folder.glob("*.pixels")).unlink()


@pytest.mark.parametrize("ending", ["", ".partial", ".journal"])
@pytest.mark.parametrize("kind", ["link", "dangling", "fifo", "folder"])
def test_links_are_not_followed_and_fifos_not_waited_for(images, folder, tmp_path, ending, kind):
    expected = all_of(build(images, folder))
    path = next(folder.glob("*.pixels"))
    place = path.with_name(path.name + ending)
    path.unlink()
    (tmp_path / "precious").write_text("precious")
    if kind == "fifo":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    else:
        place.symlink_to(tmp_path / ("precious" if kind == "link" else "gone"))
    try:
        assert torch.equal(all_of(build(images, folder)), expected)
    except (UserError, RunError) as error:
        assert str(folder) in str(error) and "\n" not in str(error)
        assert ending == ".partial" or kind == "folder"
    assert (tmp_path / "precious").read_text() == "precious" and not (tmp_path / "gone").exists()


@pytest.mark.parametrize("augment", ["none", "crop"])
def test_file_truncated_while_reading_is_a_one_line_error(images, folder, augment):
    cached = build(images, folder, augment=augment)
    path = next(folder.iterdir())
    all_of(cached)
    os.truncate(path, 1000)
    with pytest.raises(UserError, match=rf"{path}: cannot be read .it has become shorter"):
        all_of(cached)
    with pytest.raises(UserError, match=rf"{path}: cannot be read .it has changed"):
        pickle.loads(pickle.dumps(cached))


def test_names_that_are_not_utf8_have_a_cache(tmp_path, folder):
    names = [f"caf\udce9{number}\n.png" for number in range(3)]
    for number, name in enumerate(names):
        Image.fromarray(smooth(20, 20, number)).save(tmp_path / "a.png")
        (tmp_path / "a.png").rename(tmp_path / name)
    images = ImageFiles([f"{tmp_path}/{name}" for name in names])
    cached = build(images, folder)
    assert torch.equal(cached(2), make_pixels(images, small_preprocess())(2))
    surrogate = ImageFiles([f"{tmp_path}/\ud83d.png"])
    with pytest.raises(UserError, match="not a readable image"):
        build(surrogate, folder)


# Interrupted or concurrent builds


@pytest.fixture
def flush_often(monkeypatch):
    monkeypatch.setattr(cache_file, "FLUSH_BYTES", 1)
    monkeypatch.setattr(cache, "IMAGES_PER_REQUEST", 1)


def kill_build_at(index, images, folder, augment):
    images.kill_at = index
    process = fork.Process(target=build, args=(images, folder), kwargs={"augment": augment})
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    images.kill_at = None
    images.decoded()


@pytest.mark.parametrize("augment", ["none", "crop"])
def test_next_run_resumes_a_killed_build(images, folder, logged, flush_often, augment, monkeypatch):
    monkeypatch.setattr(cache, "SAMPLE", 1)
    kill_build_at(7, images, folder, augment)
    assert [name.rpartition(".")[2] for name in names(folder)] == ["journal", "partial"]
    cached = build(images, folder, augment=augment)
    sampled = [0] if augment == "crop" else []
    assert images.decoded() == sampled + list(range(7, IMAGES)), "seven images were on the disk"
    assert "7 of them are done" in logged()[0]
    assert torch.equal(all_of(cached), all_of(build(images, folder / "whole", augment=augment)))
    assert [name.rpartition(".")[2] for name in names(folder)] == ["pixels", "whole"]


IMAGE_BYTES = 3 * 16 * 16


@pytest.mark.parametrize(
    ("suffix", "change", "kept"),
    [
        ("partial", lambda data: data + b"half an image", 7),
        ("partial", lambda data: data[: 5 * IMAGE_BYTES + 30], 5),
        ("partial", lambda data: b"", 0),
        ("journal", lambda data: data + data[:9], 7),
        ("journal", lambda data: data[: 4 * 32 + 31], 4),
        ("journal", lambda data: data + bytes(500), 7),
        ("journal", lambda data: data[: 3 * 32] + bytes(4 * 32), 3),
    ],
)
def test_half_written_images_are_not_kept(images, folder, flush_often, suffix, change, kept):
    kill_build_at(7, images, folder, "none")
    path = next(folder.glob(f"*.{suffix}"))
    path.write_bytes(change(path.read_bytes()))
    cached = build(images, folder)
    assert images.decoded() == list(range(kept, IMAGES))
    assert torch.equal(all_of(cached), all_of(make_pixels(images, small_preprocess())))


def test_source_changed_after_an_interrupted_build_is_decoded_again(images, folder, flush_often):
    kill_build_at(7, images, folder, "none")
    Image.fromarray(smooth(40, 40, 99)).save(images.paths[4])
    cached = build(images, folder)
    assert images.decoded() == list(range(4, IMAGES))
    assert torch.equal(all_of(cached), all_of(make_pixels(images, small_preprocess())))


def test_two_runs_build_one_file_together(images, folder, logged):
    started, results = fork.Barrier(2), fork.Queue()

    def run():
        started.wait()
        results.put(all_of(build(images, folder)).numpy())

    processes = [fork.Process(target=run) for _ in range(2)]
    for process in processes:
        process.start()
    pixels = [results.get(timeout=30) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(images.decoded()) == list(range(IMAGES)) and len(names(folder)) == 1
    expected = all_of(make_pixels(images, small_preprocess())).numpy()
    assert all(np.array_equal(each, expected) for each in pixels)


@pytest.mark.parametrize("killed", [False, True])
def test_run_waits_for_a_build_and_resumes_it_if_killed(images, folder, logged, flush_often, killed):
    at_seven, resume = fork.Event(), fork.Event()

    class Slow(CountingImages):
        def __getitem__(self, index):
            if index == 7:
                at_seven.set()
                resume.wait()
            return super().__getitem__(index)

    first = fork.Process(target=build, args=(Slow(images.paths), folder))
    first.start()
    at_seven.wait()
    images.decoded()

    def let_go():
        os.kill(first.pid, signal.SIGKILL) if killed else resume.set()

    log.addHandler(handler := OnMessage("another run is building", let_go))
    try:
        cached = build(images, folder)
    finally:
        log.removeHandler(handler)
    first.join()
    assert "waiting for it" in logged()[0]
    assert images.decoded() == list(range(7, IMAGES))
    assert torch.equal(all_of(cached), all_of(make_pixels(images, small_preprocess())))


class OnMessage(logging.Handler):
    """Calls `react` on each message that contains `text`."""

    def __init__(self, text, react):
        super().__init__()
        self.text, self.react = text, react

    def emit(self, record):
        if self.text in record.getMessage():
            self.react()


# Errors


def test_damaged_image_is_named_and_decoded_ones_are_kept(images, folder, monkeypatch):
    monkeypatch.setattr(cache, "IMAGES_PER_REQUEST", 2)
    path = Path(images.paths[8])
    whole = path.read_bytes()
    path.write_bytes(whole[:-50])
    with pytest.raises(UserError, match=f"{path}: not a readable image") as error:
        build(images, folder)
    assert "\n" not in str(error.value)
    path.write_bytes(whole)
    images.decoded()
    cached = build(images, folder)
    assert images.decoded() == list(range(8, IMAGES))
    assert torch.equal(all_of(cached), all_of(make_pixels(images, small_preprocess())))


def test_missing_image_is_named(images, folder):
    Path(images.paths[3]).unlink()
    with pytest.raises(UserError, match=f"{images.paths[3]}: no such image"):
        build(images, folder)


def test_full_disk_keeps_the_finished_images(images, folder, flush_often):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6 * IMAGE_BYTES + 100, limits[1]))
    try:
        with pytest.raises(RunError, match=r"File too large; 6 of 12 images are kept") as error:
            build(images, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    images.decoded()
    cached = build(images, folder)
    assert images.decoded() == list(range(6, IMAGES))
    assert torch.equal(all_of(cached), all_of(make_pixels(images, small_preprocess())))


@pytest.mark.parametrize("augment", ["none", "crop"])
def test_too_small_disk_is_refused_before_writing(images, folder, monkeypatch, augment):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2000))
    with pytest.raises(UserError, match=r"--image_cache .*: needs .*, and 0.00 GB are free"):
        build(images, folder, augment=augment)
    assert names(folder) == []


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_unwritable_folder_is_named(images, tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"--image_cache {tmp_path / place}: cannot be used"):
        build(images, tmp_path / place)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder_is_named_unless_the_cache_exists(images, folder):
    build(images, folder)
    folder.chmod(0o555)
    assert len(build(images, folder)) == IMAGES
    with pytest.raises(UserError, match=f"--image_cache {folder}: cannot be used"):
        build(images, folder, decoder="fast")


def test_file_system_without_locks_is_refused(images, folder, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(cache_file.fcntl, "flock", flock)
    with pytest.raises(UserError, match="No locks available"):
        build(images, folder)
