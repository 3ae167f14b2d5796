"""Pixels: the reference's with decoder "pillow", within two grey levels of them with "fast"."""

import pickle

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import InterpolationMode, RandAugment

from clip_retrieval.data.images.image_files import ImageArray, ImageFiles
from clip_retrieval.data.pixels.augment import crop_region
from clip_retrieval.data.pixels.pixels import ImageTransform, make_pixels
from clip_retrieval.errors import UserError
from tests.models.small import small_preprocess

DECODERS = ["pillow", "fast"]
SETTINGS = [
    {"resize_mode": mode, "interpolation": interpolation, "size": size, "fill_color": fill}
    for mode in ("shortest", "longest", "squash")
    for interpolation in ("bicubic", "bilinear", "random")
    for size, fill in ((16, 0), ((16, 24), 7))
]
SIZES = [(20, 26), (61, 43), (16, 16), (9, 70), (5, 4), (40, 17)]  # of images: larger, smaller and equal to the model's


def smooth(height, width, seed=0):
    """A smooth image, like a photograph: uint8 (height, width, 3)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for i, (height, width) in enumerate(SIZES):
        Image.fromarray(smooth(height, width, i)).save(folder / f"{i}.jpg")
    return ImageFiles([str(folder / f"{i}.jpg") for i in range(len(SIZES))])


def difference(a, b):
    assert a.dtype == b.dtype == torch.uint8 and a.shape == b.shape
    return int((a.int() - b.int()).abs().max())


@pytest.mark.parametrize("settings", SETTINGS)
def test_pillow_equals_open_clip(images, settings):
    config = PreprocessCfg(**small_preprocess() | settings | {"mean": (0, 0, 0), "std": (1, 1, 1)})
    reference = image_transform_v2(config, is_train=False)
    pixels = make_pixels(images, small_preprocess() | settings)
    for i in range(len(images)):
        assert pixels(i).dtype == torch.uint8
        assert torch.equal(pixels(i), (reference(images[i]) * 255).round().byte())


@pytest.mark.parametrize("settings", SETTINGS)
def test_fast_equals_open_clip_up_to_two_grey_levels(images, settings):
    reference = make_pixels(images, small_preprocess() | settings)
    fast = make_pixels(images, small_preprocess() | settings, decoder="fast")
    for i in range(len(images)):
        assert difference(fast(i), reference(i)) <= 2


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(300, 41), (200, 90), (90, 200), (60, 61), (41, 300), (30, 100), (100, 30), (20, 20)])
def test_fast_resizes_in_the_order_of_pillow(size, interpolation):
    # The first pass clips its result: with the passes swapped, noise differs by 20 levels.
    noise = np.random.default_rng(0).choice(np.array([0, 255], np.uint8), (1, *size, 3))
    settings = small_preprocess(40) | {"resize_mode": "squash", "interpolation": interpolation}
    reference, fast = (make_pixels(ImageArray(noise, "noise"), settings, decoder=decoder) for decoder in DECODERS)
    assert difference(fast(0), reference(0)) <= 2


@pytest.mark.parametrize("augment", ["none", "crop"])
def test_fast_is_within_two_grey_levels_on_photographs(real_data, augment):
    paths = sorted((real_data / "coco_mini" / "images").rglob("*.jpg"))[:40]
    images, preprocess = ImageFiles([str(path) for path in paths]), small_preprocess(112)
    reference, fast = (
        make_pixels(images, preprocess, augment=augment, decoder=decoder).batch(range(40), range(40))
        for decoder in DECODERS
    )
    assert difference(fast, reference) <= 2
    assert (fast.float() - reference.float()).abs().mean() < 0.02


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        *(("RGB", suffix) for suffix in ("jpg", "png", "webp", "bmp", "tif")),
        *(("L", "jpg"), ("CMYK", "jpg"), ("1", "png"), ("P", "png"), ("P", "gif"), ("LA", "png")),
    ],
)
@pytest.mark.parametrize("decoder", DECODERS)
def test_every_format_is_decoded_as_pillow_converts_it(tmp_path, mode, suffix, decoder):
    image = Image.fromarray(smooth(16, 16))
    path = tmp_path / f"a.{suffix}"
    (image if mode == "RGB" else image.convert(mode)).save(path)
    expected = np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1)
    pixels = make_pixels(ImageFiles([str(path)]), small_preprocess(16), decoder=decoder)
    np.testing.assert_array_equal(pixels(0).numpy(), expected)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9, 0.99])
def test_truncated_image_is_the_same_error_with_both_decoders(tmp_path, share):
    path = tmp_path / "broken.jpg"
    Image.effect_noise((64, 64), 60).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    messages = []
    for decoder in DECODERS:
        with pytest.raises(UserError) as error:
            make_pixels(ImageFiles([str(path)]), small_preprocess(), decoder=decoder)(0)
        messages.append(str(error.value))
    assert messages[0] == messages[1] and messages[0].startswith(f"{path}: not a readable image")


@pytest.mark.parametrize("decoder", DECODERS)
def test_images_in_memory_need_no_workers(images, decoder):
    array = np.stack([smooth(16, 16, seed) for seed in range(3)])
    pixels = make_pixels(ImageArray(array, "test"), small_preprocess(16), decoder=decoder)
    assert pixels.in_memory and len(pixels) == 3
    assert torch.equal(pixels.batch([2, 0], [0, 0]), torch.from_numpy(array[[2, 0]]).permute(0, 3, 1, 2))
    assert not make_pixels(ImageArray(array, "test"), small_preprocess(16), augment="auto").in_memory
    larger = make_pixels(ImageArray(array, "test"), small_preprocess(12), decoder=decoder)
    assert larger(1).shape == (3, 12, 12)
    assert not make_pixels(images, small_preprocess(), decoder=decoder).in_memory


# Random crops


@pytest.mark.parametrize("size", [16, (16, 24)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_crop_is_its_region_resized(images, size, interpolation):
    height, width = (16, 16) if size == 16 else size
    settings = small_preprocess(size) | {"interpolation": interpolation}
    pixels = make_pixels(images, settings, augment="crop")
    fast = make_pixels(images, settings, augment="crop", decoder="fast")
    for i in range(len(images)):
        region = images[i].crop(crop_region(*images[i].size, seed=i))
        expected = np.asarray(region.resize((width, height), Image.Resampling[interpolation.upper()]))
        np.testing.assert_array_equal(pixels(i, seed=i).numpy(), expected.transpose(2, 0, 1))
        assert difference(fast(i, seed=i), pixels(i, seed=i)) <= 2


@pytest.mark.parametrize("crop_scale", [0.9, 0.5])
def test_crop_regions_have_torchvisions_distribution(crop_scale):
    regions = [crop_region(200, 190, seed, crop_scale) for seed in range(500)]
    assert regions == [crop_region(200, 190, seed, crop_scale) for seed in range(500)] and len(set(regions)) > 400
    left, top, right, bottom = np.array(regions).T
    assert left.min() == top.min() == 0 and right.max() == 200 and bottom.max() == 190
    ours = np.stack([(right - left) * (bottom - top) / (200 * 190), (right - left) / (bottom - top)])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        image = torch.empty(3, 190, 200)
        theirs = [RandomResizedCrop.get_params(image, (crop_scale, 1.0), (3 / 4, 4 / 3)) for _ in range(500)]
    height, width = np.array(theirs).T[2:]
    theirs = np.stack([width * height / (200 * 190), width / height])
    assert ours[0].min() > crop_scale - 0.005 and ours[0].max() <= 1
    deciles = np.linspace(0, 1, 11)
    np.testing.assert_allclose(
        np.quantile(ours, deciles, axis=1),
        np.quantile(theirs, deciles, axis=1),
        rtol=0,
        atol=0.02 if crop_scale == 0.9 else 0.06,
    )


@pytest.mark.parametrize(("width", "height"), [(1000, 100), (100, 1000), (301, 17), (1, 1), (1, 90)])
def test_image_without_a_fitting_crop_is_cropped_like_torchvision(width, height):
    top, left, h, w = RandomResizedCrop.get_params(torch.empty(3, height, width), (0.9, 1.0), (3 / 4, 4 / 3))
    assert crop_region(width, height, seed=0) == (left, top, left + w, top + h)


@pytest.mark.parametrize("augment", ["none", "crop"])
@pytest.mark.parametrize("decoder", DECODERS)
def test_batch_equals_its_images_also_after_pickling(images, augment, decoder):
    pixels = make_pixels(images, small_preprocess(), augment=augment, decoder=decoder)
    indices, seeds = [4, 0, 4], [1, 2**62, 5]
    expected = torch.stack([pixels(i, seed) for i, seed in zip(indices, seeds)])
    assert torch.equal(pixels.batch(indices, seeds), expected)
    assert torch.equal(pickle.loads(pickle.dumps(pixels)).batch(indices, np.array(seeds)), expected)
    assert torch.equal(expected[0], expected[2]) == (augment == "none")


@pytest.mark.parametrize("augment", ["auto", "rand"])
def test_augmentation_depends_only_on_the_seed(images, augment):
    crops = make_pixels(images, small_preprocess(), augment="crop")
    changed = make_pixels(images, small_preprocess(), augment=augment)
    first = changed.batch([0, 1, 2], [5, 6, 7])
    assert first.shape == (3, 3, 16, 16) and first.dtype == torch.uint8
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(changed.batch([0, 1, 2], [5, 6, 7]), first)
    assert torch.equal(torch.get_rng_state(), state)
    many = [changed(0, seed) for seed in range(20)]
    assert sum(torch.equal(one, crops(0, seed)) for seed, one in enumerate(many)) < 15


def test_randaugment_is_torchvisions(images):
    crop = ImageTransform(small_preprocess(), augment="crop")
    augment = RandAugment(interpolation=InterpolationMode.BILINEAR)
    for seed in range(5):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            expected = augment(crop(images[0], seed))
        assert torch.equal(ImageTransform(small_preprocess(), augment="rand")(images[0], seed), expected)


def test_pixels_are_cropped_to_the_given_scale(images):
    pixels = make_pixels(images, small_preprocess(), augment="crop", crop_scale=0.3)
    for i in range(3):
        region = images[i].crop(crop_region(*images[i].size, seed=i, crop_scale=0.3))
        expected = np.asarray(region.resize((16, 16), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
        np.testing.assert_array_equal(pixels(i, seed=i).numpy(), expected)


def test_flip_mirrors_half_of_the_images_and_changes_nothing_else(images):
    transforms = {name: ImageTransform(small_preprocess(), augment=name) for name in ("auto", "auto_flip")}
    mirrored = 0
    for seed in range(200):
        plain, flipped = (transform(images[0], seed) for transform in transforms.values())
        assert torch.equal(flipped, plain) or torch.equal(flipped, plain.flip(-1))
        mirrored += not torch.equal(flipped, plain)
    assert 70 < mirrored < 130
    pixels = make_pixels(images, small_preprocess(), augment="auto_flip")
    assert torch.equal(pixels(0, 3), transforms["auto_flip"](images[0], 3))
