"""The cache: the same pixels as without it, whoever builds it, however often it is interrupted."""

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
    return Counted([str(tmp_path / "images" / f"{i}.jpg") for i in range(IMAGES)])


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def said(caplog, monkeypatch):
    """said() is what was logged since it was last called."""
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.INFO, "clip_retrieval")

    def lines():
        messages = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return messages

    return lines


class Counted(ImageFiles):
    """Notes each image that is decoded, by whatever process, in a file; may wait, or kill its process, at one."""

    kill_at = None

    def __getitem__(self, index):
        if index == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        with Path(self.paths[0] + ".decoded").open("a") as file:
            file.write(f"{index}\n")
        return super().__getitem__(index)

    def decoded(self):
        """The images that were decoded since this was last asked."""
        path = Path(self.paths[0] + ".decoded")
        indices = [int(line) for line in path.read_text().split()] if path.exists() else []
        path.unlink(missing_ok=True)
        return indices


def build(images, folder, name="test_train", augment="none", decoder="pillow", num_workers=0, **settings):
    return open_cached_pixels(
        images,
        small_preprocess() | settings,
        folder,
        name,
        augment=augment,
        decoder=decoder,
        num_workers=num_workers,
    )


def all_of(pixels):
    return pixels.batch(range(IMAGES), range(IMAGES))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# What is read


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("size", [16, (16, 24)])
def test_pixels_are_those_without_a_cache(images, folder, decoder, mode, size):
    settings = {"resize_mode": mode, "size": size}
    cached = build(images, folder, decoder=decoder, **settings)
    expected = all_of(make_pixels(images, small_preprocess() | settings, decoder=decoder))
    assert cached.in_memory and len(cached) == IMAGES
    assert torch.equal(all_of(cached), expected)
    assert all(torch.equal(cached(i), expected[i]) for i in range(IMAGES))


def test_workers_change_nothing(images, folder, monkeypatch):
    monkeypatch.setattr(cache, "PART", 5)
    alone, helped = build(images, folder / "a"), build(images, folder / "b", num_workers=2)
    assert torch.equal(all_of(alone), all_of(helped))


def test_what_is_read_may_be_written_to(images, folder):
    cached = build(images, folder)
    before = all_of(cached)
    cached(0).zero_()
    all_of(cached).zero_()
    assert torch.equal(all_of(cached), before)


@pytest.mark.parametrize("augment", ["none", "crop"])
def test_another_process_opens_the_file_by_itself(images, folder, augment):
    cached = build(images, folder, augment=augment)
    pickled = pickle.dumps(cached)
    assert len(pickled) < 2000
    assert torch.equal(all_of(pickle.loads(pickled)), all_of(cached))


@pytest.mark.parametrize("decoder", DECODERS)
def test_crops_of_images_that_need_no_shrinking_are_those_without_a_cache(images, folder, decoder):
    settings = {"size": 64, "augment": "crop", "decoder": decoder}
    uncached = make_pixels(images, small_preprocess(64), augment="crop", decoder=decoder)
    assert torch.equal(all_of(build(images, folder, **settings)), all_of(uncached))


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("shape", [(480, 640), (640, 480), (300, 310), (100, 900)])
def test_crops_come_from_the_same_region_of_a_smaller_image(tmp_path, folder, decoder, shape):
    across, down = np.meshgrid(np.linspace(0, 255, shape[1]), np.linspace(0, 255, shape[0]))
    place = np.stack([across, down, 0 * down], axis=-1).round().astype(np.uint8)  # each pixel says where it is
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


def test_crops_leave_work_for_other_processes(images, folder):
    assert not build(images, folder, augment="crop").in_memory


# When it is built


def test_a_second_run_decodes_nothing(images, folder, said):
    built = build(images, folder)
    assert images.decoded() == list(range(IMAGES))
    path = next(folder.iterdir())
    assert path.name.startswith("test_train_") and path.suffix == ".pixels" and names(folder) == [path.name]
    assert said() == [
        f"image cache: building {path}: {IMAGES} images, 0.00 GB",
        f"image cache: {path} ({IMAGES} images, 0.00 GB)",
    ]
    again = build(images, folder)
    assert images.decoded() == [] and said() == [f"image cache: {path} ({IMAGES} images, 0.00 GB)"]
    assert torch.equal(all_of(again), all_of(built))


def test_its_size_is_said_beforehand(images, folder, said, monkeypatch):
    monkeypatch.setattr(cache, "_gb", lambda size: f"{size} bytes")
    build(images, folder)
    assert f"{IMAGES * 3 * 16 * 16} bytes" in said()[0]
    build(images, folder, augment="crop")
    before, after = (int(line.split()[-2].lstrip("(")) for line in said())
    assert after == pytest.approx(before, abs=1000)  # the records, and here all images are in the sample


def test_different_preprocessings_decoders_and_kinds_stand_side_by_side(images, folder):
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
    assert images.decoded() == []  # what happens on the device does not matter


def test_a_changed_source_is_decoded_again(images, folder, said):
    old = all_of(build(images, folder))
    images.decoded(), said()
    Image.fromarray(smooth(40, 40, 99)).save(images.paths[5])
    new = all_of(build(images, folder))
    assert images.decoded() == list(range(IMAGES)) and len(names(folder)) == 1
    assert "1 images have changed" in said()[0]
    assert torch.equal(new, all_of(make_pixels(images, small_preprocess())))
    assert not torch.equal(new[5], old[5])


def test_a_source_that_changed_without_changing_its_size_is_noticed(images, folder):
    build(images, folder)
    images.decoded()
    stat = Path(images.paths[5]).stat()
    os.utime(images.paths[5], ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    build(images, folder)
    assert images.decoded() == list(range(IMAGES))


def test_another_list_of_images_has_a_file_of_its_own(images, folder):
    build(images, folder)
    build(ImageFiles(images.paths[::-1]), folder)
    assert len(names(folder)) == 2


@pytest.mark.parametrize("cut", [1, 100, 5000])
def test_a_file_that_is_not_whole_is_built_anew(images, folder, said, cut):
    pixels = all_of(build(images, folder))
    path = next(folder.iterdir())
    os.truncate(path, path.stat().st_size - cut)
    images.decoded(), said()
    assert torch.equal(all_of(build(images, folder)), pixels)
    assert "is not whole" in said()[0] and len(images.decoded()) == IMAGES


# Damaged, or hostile


def with_end(records, images=None, magic=b"PIXELS01", pixels=0):
    """A file of so many bytes of pixels, these records, and the number of images that is said."""
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
def test_a_damaged_cache_is_built_anew(images, folder, said, name, augment):
    expected = all_of(build(images, folder / "other", augment=augment))
    build(images, folder, augment=augment)
    path = next(folder.glob("*.pixels"))
    path.write_bytes(DAMAGED[name])
    said()
    assert torch.equal(all_of(build(images, folder, augment=augment)), expected)
    assert "is not whole: it is built anew" in said()[0]


@pytest.mark.parametrize("augment", ["none", "crop"])
@pytest.mark.parametrize("field", ["height", "width", "source_height", "source_width"])
def test_records_of_other_sizes_are_built_anew(images, folder, said, field, augment):
    """Their sum may be right: two images that changed places, a source that never was."""
    expected = all_of(build(images, folder, augment=augment))
    path = next(folder.glob("*.pixels"))
    content = path.read_bytes()
    records = read_records(path, IMAGES).copy()
    if field.startswith("source") and augment == "none":
        return  # of no use there
    for sides in ((2, 3), (3, 4)):
        records[field][list(sides)] = records[field][list(sides)][::-1] * 3 - 17
    path.write_bytes(content[: -32 * IMAGES - 16] + records.tobytes() + content[-16:])
    assert torch.equal(all_of(build(images, folder, augment=augment)), expected)


@pytest.mark.parametrize("suffix", ["journal", "partial"])
def test_damaged_leftovers_of_a_killed_run_cost_nothing_but_time(images, folder, flushed_often, suffix):
    killed_at(7, images, folder, "none")
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
        if suffix == "journal":  # pixels carry no sums: a bit that flips there is another shade
            assert torch.equal(cached, expected)
        next(folder.glob("*.pixels")).unlink()


@pytest.mark.parametrize("ending", ["", ".partial", ".journal"])
@pytest.mark.parametrize("kind", ["link", "dangling", "fifo", "folder"])
def test_a_link_is_not_followed_and_a_fifo_not_waited_for(images, folder, tmp_path, ending, kind):
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
def test_a_file_that_becomes_shorter_while_it_is_read_is_one_line(images, folder, augment):
    cached = build(images, folder, augment=augment)
    path = next(folder.iterdir())
    all_of(cached)
    os.truncate(path, 1000)
    with pytest.raises(UserError, match=rf"{path}: cannot be read .it has become shorter"):
        all_of(cached)
    with pytest.raises(UserError, match=rf"{path}: cannot be read .it has changed"):
        pickle.loads(pickle.dumps(cached))


def test_names_that_are_not_utf8_have_a_cache_too(tmp_path, folder):
    names = [f"caf\udce9{number}\n.png" for number in range(3)]
    for number, name in enumerate(names):
        Image.fromarray(smooth(20, 20, number)).save(tmp_path / "a.png")
        (tmp_path / "a.png").rename(tmp_path / name)
    images = ImageFiles([f"{tmp_path}/{name}" for name in names])
    cached = build(images, folder)
    assert torch.equal(cached(2), make_pixels(images, small_preprocess())(2))
    lone = ImageFiles([f"{tmp_path}/\ud83d.png"])
    with pytest.raises(UserError, match="not a readable image"):
        build(lone, folder)


# Interrupted, or shared


@pytest.fixture
def flushed_often(monkeypatch):
    monkeypatch.setattr(cache_file, "FLUSH_BYTES", 1)
    monkeypatch.setattr(cache, "PART", 1)


def killed_at(index, images, folder, augment):
    images.kill_at = index
    process = fork.Process(target=build, args=(images, folder), kwargs={"augment": augment})
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    images.kill_at = None
    images.decoded()


@pytest.mark.parametrize("augment", ["none", "crop"])
def test_a_killed_run_is_gone_on_with(images, folder, said, flushed_often, augment, monkeypatch):
    monkeypatch.setattr(cache, "SAMPLE", 1)
    killed_at(7, images, folder, augment)
    assert [name.rpartition(".")[2] for name in names(folder)] == ["journal", "partial"]
    cached = build(images, folder, augment=augment)
    sampled = [0] if augment == "crop" else []
    assert images.decoded() == sampled + list(range(7, IMAGES)), "seven images were on the disk"
    assert "7 of them are there" in said()[0]
    assert torch.equal(all_of(cached), all_of(build(images, folder / "whole", augment=augment)))
    assert [name.rpartition(".")[2] for name in names(folder)] == ["pixels", "whole"]


ONE = 3 * 16 * 16


@pytest.mark.parametrize(
    ("suffix", "change", "kept"),
    [
        ("partial", lambda data: data + b"half an image", 7),
        ("partial", lambda data: data[: 5 * ONE + 30], 5),
        ("partial", lambda data: b"", 0),
        ("journal", lambda data: data + data[:9], 7),
        ("journal", lambda data: data[: 4 * 32 + 31], 4),
        ("journal", lambda data: data + bytes(500), 7),
        ("journal", lambda data: data[: 3 * 32] + bytes(4 * 32), 3),
    ],
)
def test_what_is_half_written_is_not_taken_for_whole(images, folder, flushed_often, suffix, change, kept):
    killed_at(7, images, folder, "none")
    path = next(folder.glob(f"*.{suffix}"))
    path.write_bytes(change(path.read_bytes()))
    cached = build(images, folder)
    assert images.decoded() == list(range(kept, IMAGES))
    assert torch.equal(all_of(cached), all_of(make_pixels(images, small_preprocess())))


def test_a_source_that_changed_since_an_interrupted_run_is_decoded_again(images, folder, flushed_often):
    killed_at(7, images, folder, "none")
    Image.fromarray(smooth(40, 40, 99)).save(images.paths[4])
    cached = build(images, folder)
    assert images.decoded() == list(range(4, IMAGES))
    assert torch.equal(all_of(cached), all_of(make_pixels(images, small_preprocess())))


def test_two_runs_build_one_file(images, folder, said):
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
def test_a_run_waits_for_the_one_that_builds_and_goes_on_if_that_dies(images, folder, said, flushed_often, killed):
    at_seven, go_on = fork.Event(), fork.Event()

    class Slow(Counted):
        def __getitem__(self, index):
            if index == 7:
                at_seven.set()
                go_on.wait()
            return super().__getitem__(index)

    first = fork.Process(target=build, args=(Slow(images.paths), folder))
    first.start()
    at_seven.wait()
    images.decoded()

    def let_go():
        os.kill(first.pid, signal.SIGKILL) if killed else go_on.set()

    log.addHandler(handler := OnMessage("another run builds", let_go))
    try:
        cached = build(images, folder)
    finally:
        log.removeHandler(handler)
    first.join()
    assert "waiting for it" in said()[0]
    assert images.decoded() == list(range(7, IMAGES))
    assert torch.equal(all_of(cached), all_of(make_pixels(images, small_preprocess())))


class OnMessage(logging.Handler):
    """Calls `react` once the log says `text`."""

    def __init__(self, text, react):
        super().__init__()
        self.text, self.react = text, react

    def emit(self, record):
        if self.text in record.getMessage():
            self.react()


# What goes wrong


def test_a_broken_image_is_named_and_what_was_decoded_is_kept(images, folder, monkeypatch):
    monkeypatch.setattr(cache, "PART", 2)
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


def test_a_missing_image_is_named(images, folder):
    Path(images.paths[3]).unlink()
    with pytest.raises(UserError, match=f"{images.paths[3]}: no such image"):
        build(images, folder)


def test_a_file_that_cannot_grow_keeps_what_is_there(images, folder, flushed_often):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6 * ONE + 100, limits[1]))
    try:
        with pytest.raises(RunError, match=r"File too large; 6 of its 12 images are kept") as error:
            build(images, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    images.decoded()
    cached = build(images, folder)
    assert images.decoded() == list(range(6, IMAGES))
    assert torch.equal(all_of(cached), all_of(make_pixels(images, small_preprocess())))


@pytest.mark.parametrize("augment", ["none", "crop"])
def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(images, folder, monkeypatch, augment):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2000))
    with pytest.raises(UserError, match=r"--image_cache .* are needed and 0.00 GB are free"):
        build(images, folder, augment=augment)
    assert names(folder) == []


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_folder_that_cannot_be_written_is_named(images, tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"--image_cache {tmp_path / place}: cannot be used"):
        build(images, tmp_path / place)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_named_unless_the_cache_is_there(images, folder):
    build(images, folder)
    folder.chmod(0o555)
    assert len(build(images, folder)) == IMAGES
    with pytest.raises(UserError, match=f"--image_cache {folder}: cannot be used"):
        build(images, folder, decoder="fast")


def test_a_file_system_without_locks_is_refused(images, folder, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(cache_file.fcntl, "flock", flock)
    with pytest.raises(UserError, match="No locks available"):
        build(images, folder)
