"""`--decoder gpu`, on the CPU: close to Pillow's pixels, the same crops, and other decoders for other files."""

import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from clip_retrieval.data.images.decode import baseline_jpeg_size
from clip_retrieval.data.images.image_files import ImageArray, ImageFiles
from clip_retrieval.data.pixels import jpeg
from clip_retrieval.data.pixels.jpeg import JpegBatch, check_decoder, decode_ahead
from clip_retrieval.data.pixels.pixels import MixedPixels, make_pixels
from clip_retrieval.data.shared_memory import share
from clip_retrieval.errors import UserError
from tests.data.pixels.test_pixels import SETTINGS, smooth
from tests.models.small import small_preprocess

CPU = torch.device("cpu")
SIZES = [(64, 90), (61, 43), (16, 16), (64, 90), (40, 17), (12, 300)]


def save(path, image=None, **options):
    (Image.fromarray(smooth(40, 52)) if image is None else image).save(path, **options)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("jpegs")
    for i, (height, width) in enumerate(SIZES):
        save(folder / f"{i}.jpg", Image.fromarray(smooth(height, width, i)), quality=95)
    return ImageFiles([str(folder / f"{i}.jpg") for i in range(len(SIZES))])


def differences(a, b):
    """The largest and the mean difference of two batches, in grey levels."""
    assert a.dtype == b.dtype == torch.uint8 and a.shape == b.shape
    difference = (a.int() - b.int()).abs()
    return int(difference.max()), float(difference.float().mean())


@pytest.fixture
def fails_to_decode(monkeypatch):
    """Make the device refuse files of these sizes in bytes; returns the sizes of the batches that it got."""

    def refuse(*sizes, error=RuntimeError):
        import torchvision.io

        decode, batches = torchvision.io.decode_jpeg, []

        def decode_others(files, **options):
            batches.append(len(files))
            if any(len(file) in sizes for file in files):
                raise error("Failed to decode jpeg stream: 5")
            return decode(files, **options)

        monkeypatch.setattr(torchvision.io, "decode_jpeg", decode_others)
        return batches

    jpeg._warn_of_failure.cache_clear()
    return refuse


# Pixels


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("augment", ["none", "crop"])
def test_pixels_are_close_to_those_of_pillow(images, settings, augment):
    reference, gpu = (
        make_pixels(images, small_preprocess() | settings, augment=augment, decoder=decoder)
        for decoder in ("pillow", "gpu")
    )
    rows, seeds = [5, 0, 3, 1, 2, 4, 0], [3, 1, 4, 1, 5, 9, 2]
    largest, mean = differences(gpu.batch(rows, seeds).to(CPU), reference.batch(rows, seeds))
    assert largest <= 2 and mean < 0.3


@pytest.mark.parametrize("augment", ["none", "crop"])
def test_pixels_of_photographs_are_close_to_those_of_pillow(real_data, augment):
    paths = sorted((real_data / "coco_mini" / "images").rglob("*.jpg"))[:40]
    images, preprocess = ImageFiles([str(path) for path in paths]), small_preprocess(112)
    pillow, fast, gpu = (
        make_pixels(images, preprocess, augment=augment, decoder=decoder).batch(range(40), range(40))
        for decoder in ("pillow", "fast", "gpu")
    )
    assert len(gpu.files) >= 38
    for reference in (pillow, fast):
        largest, mean = differences(gpu.to(CPU), reference)
        assert largest <= 16 and mean < 0.25  # 12 and 0.18 at 224 pixels, where Pillow clips between its two passes


def test_batch_equals_its_images_also_in_shared_memory(images):
    pixels = make_pixels(images, small_preprocess(), augment="crop", decoder="gpu")
    rows, seeds = np.array([3, 0, 3]), np.array([1, 2**62, 5])
    expected = torch.cat([pixels.batch([row], [seed]).to(CPU) for row, seed in zip(rows, seeds)])
    batch = pixels.batch(rows, seeds)
    assert torch.equal(batch.to(CPU), expected) and not torch.equal(expected[0], expected[2])
    assert torch.equal(share(pickle.loads(pickle.dumps(batch))).to(CPU), expected)


def test_images_are_decoded_a_few_at_a_time(images, monkeypatch, fails_to_decode):
    batches = fails_to_decode()
    batch = make_pixels(images, small_preprocess(), decoder="gpu").batch(range(5), [0] * 5)
    expected = batch.to(CPU)
    monkeypatch.setattr(jpeg, "PIXELS_AT_A_TIME", 64 * 90)
    assert torch.equal(batch.to(CPU), expected)
    assert batches == [5, 1, 2, 1, 1]


# Files that the device does not decode


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.png", {}),
        ("a.webp", {}),
        ("progressive.jpg", {"progressive": True}),
        ("cmyk.jpg", {"image": Image.fromarray(smooth(40, 52)).convert("CMYK")}),
        ("rgb.jpg", {"keep_rgb": True}),
        ("long.jpg", {"image": Image.fromarray(smooth(3, 200))}),
    ],
)
def test_other_files_are_read_as_by_the_fast_decoder(tmp_path, name, options):
    images = ImageFiles([str(save(tmp_path / name, **options)), str(save(tmp_path / "plain.jpg"))])
    for augment in ("none", "crop"):
        fast, gpu = (make_pixels(images, small_preprocess(), augment=augment, decoder=d) for d in ("fast", "gpu"))
        alone = gpu.batch([0], [7])
        assert torch.equal(alone, fast.batch([0], [7]))
        mixed = gpu.batch([1, 0, 1], [3, 7, 4])
        assert list(mixed.files) == [0, 2] and torch.equal(mixed.to(CPU)[1], alone[0])


def test_grey_jpeg_is_decoded_on_the_device(tmp_path):
    images = ImageFiles([str(save(tmp_path / "grey.jpg", Image.fromarray(smooth(40, 52)).convert("L")))])
    fast, gpu = (
        make_pixels(images, small_preprocess(), decoder=decoder).batch([0], [0]) for decoder in ("fast", "gpu")
    )
    assert isinstance(gpu, JpegBatch) and differences(gpu.to(CPU), fast)[0] <= 1


def test_images_in_memory_are_resized_as_by_the_fast_decoder():
    images = ImageArray(np.stack([smooth(40, 52)]), "test")
    fast, gpu = (
        make_pixels(images, small_preprocess(), decoder=decoder).batch([0], [0]) for decoder in ("fast", "gpu")
    )
    assert torch.equal(fast, gpu)


def test_a_mixture_has_files_and_pixels(images):
    array = ImageArray(np.stack([smooth(40, 52, 7)]), "test")
    parts = [make_pixels(each, small_preprocess(), decoder="gpu") for each in (array, images)]
    batch = MixedPixels(parts).batch([2, 0, 1], [0, 0, 0])
    assert list(batch.files) == [0, 2]
    expected = [parts[1].batch([1], [0]).to(CPU), parts[0].batch([0], [0]), parts[1].batch([0], [0]).to(CPU)]
    assert torch.equal(batch.to(CPU), torch.cat(expected))


# Broken files


@pytest.mark.parametrize("content", [b"", b"no image", b"\xff\xd8\xff\xd9", b"\xff\xd8\xff\xe0\0\x10JFIF\xff\xd9"])
def test_broken_file_is_the_error_of_the_other_decoders(tmp_path, content):
    path = tmp_path / "broken.jpg"
    path.write_bytes(content)
    messages = []
    for decoder in ("fast", "gpu"):
        with pytest.raises(UserError) as error:
            make_pixels(ImageFiles([str(path)]), small_preprocess(), decoder=decoder).batch([0], [0])
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_truncated_and_huge_files_are_left_to_the_usual_reader():
    file = io.BytesIO()
    Image.fromarray(smooth(40, 52)).save(file, "JPEG")
    content = file.getvalue()
    assert baseline_jpeg_size(content) == (52, 40) == baseline_jpeg_size(content + b"\0\0")
    assert baseline_jpeg_size(content[:-100]) is None
    start = content.index(b"\xff\xc0") + 5  # height and width in the header
    assert baseline_jpeg_size(content[:start] + b"\xff\xff\xff\xff" + content[start + 4 :]) is None


def test_file_that_the_device_refuses_is_decoded_by_pillow(images, fails_to_decode, caplog):
    pixels = make_pixels(images, small_preprocess(), augment="crop", decoder="gpu")
    fast = make_pixels(images, small_preprocess(), augment="crop", decoder="fast")
    batch = pixels.batch([1, 2, 0], [5, 6, 7])
    expected = batch.to(CPU)
    fails_to_decode(batch.lengths[1])
    with caplog.at_level("WARNING", "clip_retrieval"):
        found = [batch.to(CPU) for _ in range(2)][1]
    assert torch.equal(found[[0, 2]], expected[[0, 2]]) and torch.equal(found[1:2], fast.batch([2], [6]))
    assert len(caplog.messages) == 1 and "Failed to decode jpeg stream: 5" in caplog.messages[0]


def break_tables(path):
    """Invalidate the Huffman tables of a JPEG file, after its header: no decoder reads it."""
    content = path.read_bytes()
    place = content.index(b"\xff\xc4") + 5
    path.write_bytes(content[:place] + b"\xff" * 16 + content[place + 16 :])
    return path


def test_image_that_proves_unreadable_is_replaced_or_an_error(tmp_path):
    paths = [save(tmp_path / f"{i}.jpg", Image.fromarray(smooth(40, 52, i))) for i in range(3)]
    break_tables(paths[1])
    pixels = make_pixels(ImageFiles([str(path) for path in paths]), small_preprocess(), decoder="gpu")
    batch = pixels.batch([0, 1, 2, 1], [0] * 4)
    found, rows, problems = batch.decode(CPU)
    assert rows == [0, 2, 2, 0] and [problem.startswith(f"{paths[1]}: not a readable") for problem in problems] == [
        1,
        1,
    ]
    assert torch.equal(found[[1, 3]], found[[2, 0]])
    with pytest.raises(UserError, match=r"1\.jpg: not a readable image"):
        batch.to(CPU)
    with pytest.raises(UserError, match="no other image of its part"):
        pixels.batch([1], [0]).decode(CPU)


def test_out_of_memory_is_not_mistaken_for_a_broken_file(images, fails_to_decode):
    batch = make_pixels(images, small_preprocess(), decoder="gpu").batch([0], [0])
    fails_to_decode(batch.lengths[0], error=torch.OutOfMemoryError)
    with pytest.raises(torch.OutOfMemoryError):
        batch.to(CPU)


# The device


def test_decoder_gpu_needs_a_cuda_device():
    check_decoder("gpu", torch.device("cuda"))
    check_decoder("fast", CPU)
    with pytest.raises(UserError, match="--decoder gpu needs a CUDA device, not cpu; use --decoder fast"):
        check_decoder("gpu", CPU)


def test_parts_are_decoded_ahead_in_order():
    started, taken = [], []
    for number, part in enumerate(decode_ahead(iter(range(12)), lambda i: started.append(i) or -i, CPU)):
        taken.append(part)
        assert number < len(started)
    assert taken == [-i for i in range(12)] and started == list(range(12))
    with pytest.raises(UserError, match="broken"):
        list(decode_ahead(iter([1]), lambda _: (_ for _ in ()).throw(UserError("broken")), CPU))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("augment", ["none", "crop"])
def test_gpu_pixels_of_photographs_are_close_to_those_of_pillow(real_data, augment):
    paths = sorted((real_data / "coco_mini" / "images").rglob("*.jpg"))[:80]
    images, preprocess = ImageFiles([str(path) for path in paths]), small_preprocess(112)
    pillow, gpu = (
        make_pixels(images, preprocess, augment=augment, decoder=decoder).batch(range(80), range(80))
        for decoder in ("pillow", "gpu")
    )
    first = gpu.to(torch.device("cuda"))
    assert differences(first.cpu(), pillow)[1] < 2
    for _ in range(5):  # memory of earlier images is used again
        assert torch.equal(gpu.to(torch.device("cuda")), first)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_leaves_broken_files_to_the_cpu(tmp_path):
    paths = [save(tmp_path / f"{i}.jpg", Image.fromarray(smooth(40, 52, i))) for i in range(3)]
    break_tables(paths[1])
    batch = make_pixels(ImageFiles([str(path) for path in paths]), small_preprocess(), decoder="gpu")
    found, rows, problems = batch.batch([0, 1, 2], [0] * 3).decode(torch.device("cuda"))
    assert rows == [0, 2, 2] and len(problems) == 1 and found.is_cuda
