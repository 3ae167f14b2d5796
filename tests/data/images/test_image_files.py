"""Images of every mode load as Pillow converts them; broken and missing ones are named."""

import mmap
import os
import unicodedata

import numpy as np
import pytest
from PIL import Image

from clip_retrieval.data.images import decode
from clip_retrieval.data.images.image_files import ImageArray, ImageFiles, find_image_files
from clip_retrieval.data.workers import map_in_workers
from clip_retrieval.errors import UserError
from clip_retrieval.log import start_log


def picture(mode):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 4), dtype=np.uint8)
    if mode == "I;16":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    return Image.fromarray(pixels[..., :3]).convert(mode) if mode != "RGBA" else Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("mode", "file", "options"),
    [
        ("RGB", "a.jpg", {}),
        ("RGB", "a.webp", {}),
        ("L", "a.jpg", {}),
        ("CMYK", "a.jpg", {}),
        ("RGB", "turned.jpg", {"exif": 6}),
        ("1", "a.png", {}),
        ("P", "a.png", {}),
        ("P", "a.gif", {"transparency": 3}),
        ("LA", "a.png", {}),
        ("RGBA", "a.png", {}),
    ],
)
def test_images_load_as_pillow_converts_them(tmp_path, mode, file, options):
    if "exif" in options:
        exif = Image.Exif()
        exif[0x0112] = options["exif"]  # orientation
        options = {"exif": exif}
    path = tmp_path / file
    picture(mode).save(path, **options)
    image = ImageFiles([str(path)])[0]
    assert image.mode == "RGB" and image.size == (16, 12)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(Image.open(path).convert("RGB")))


@pytest.mark.parametrize("file", ["a.png", "a.tif", "a.pgm", "a.jp2"])
def test_sixteen_bit_grey_is_the_same_picture_as_eight_bit(tmp_path, file):
    picture("I;16").save(tmp_path / file)
    eight_bit = np.random.default_rng(0).integers(0, 256, (12, 16, 4), dtype=np.uint8)[..., 0]
    image = np.asarray(ImageFiles([str(tmp_path / file)])[0])
    np.testing.assert_array_equal(image, np.repeat(eight_bit[..., None], 3, axis=2))


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_grey_levels_are_scaled_from_the_bits_that_they_need(tmp_path, bits):
    levels = np.linspace(0, 2**bits - 1, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(levels).save(tmp_path / "a.png")
    image = np.asarray(ImageFiles([str(tmp_path / "a.png")])[0])[..., 0]
    np.testing.assert_array_equal(image, np.round(levels / (2**bits - 1) * 255))
    assert len(np.unique(image)) == 256


def test_levels_of_32_bits_are_scaled_and_negative_ones_are_black(tmp_path):
    Image.fromarray(np.array([[-5, 0, 2**19, 2**20 - 1]], np.int32)).save(tmp_path / "a.tif")
    assert np.asarray(ImageFiles([str(tmp_path / "a.tif")])[0])[0, :, 0].tolist() == [0, 0, 128, 255]
    Image.fromarray(np.array([[-5, 0, 100, 255]], np.int32)).save(tmp_path / "a.tif")
    assert np.asarray(ImageFiles([str(tmp_path / "a.tif")])[0])[0, :, 0].tolist() == [0, 0, 100, 255]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_scaled_levels_are_mentioned_once(tmp_path, capsys, monkeypatch, num_workers):
    monkeypatch.setattr(decode, "_scaling_is_logged", mmap.mmap(-1, 1))
    for number in range(6):
        picture("I;16").save(tmp_path / f"{number}.png")
    images = ImageFiles([str(tmp_path / f"{number}.png") for number in range(6)])
    start_log()
    list(map_in_workers(images.__getitem__, range(6), num_workers=num_workers))
    if num_workers == 0:  # other processes write to the terminal itself
        assert capsys.readouterr().err.count("grey images of more than 8 bits") == 1
    assert decode._scaling_is_logged[0] == 1


@pytest.mark.parametrize("skip_missing", [False, True])
def test_names_of_other_systems_are_found(tmp_path, skip_missing):
    decomposed = unicodedata.normalize("NFD", "é")
    latin = os.fsdecode("zwölf.png".encode("latin-1"))
    for name in (f"caf{decomposed}/bl{decomposed}.png", "pics/deep/0.png", "é.png", latin, "caf?.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    names = ["café/blé.png", "café\\blé.png", "pics\\deep\\0.png", f"{decomposed[0]}{decomposed[1]}.png", "zwölf.png"]
    found = find_image_files([(tmp_path, names)], "x.csv", skip_missing=skip_missing)
    blé = f"{tmp_path}/caf{decomposed}/bl{decomposed}.png"
    assert found.paths == [blé, blé, f"{tmp_path}/pics/deep/0.png", f"{tmp_path}/é.png", f"{tmp_path}/{latin}"]
    assert found.key(1) == "café/blé.png"
    for name in ("CAFÉ/blé.png", "pics/../é/0.png", "caf*.png", "\ud800/é.png"):
        with pytest.raises(UserError, match="missing"):
            find_image_files([(tmp_path, [name])], "x.csv")


def test_an_exact_name_precedes_other_spellings(tmp_path):
    for name in ("a\\b.png", "a/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    names = ["a\\b.png", "a/b.png"]
    assert find_image_files([(tmp_path, names)], "x.csv").paths == [f"{tmp_path}/{name}" for name in names]


def test_an_array_of_images():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    images = ImageArray(pixels, "shapes")
    assert len(images) == 2 and images.name(1) == "shapes image 1"
    np.testing.assert_array_equal(np.asarray(images[1]), pixels[1])


def fails(path, *parts):
    with pytest.raises(UserError) as error:
        ImageFiles([str(path)])[0]
    message = str(error.value)
    assert "\n" not in message
    assert message.count(str(path)) == 1
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".gif", ".webp", ".tif", ".bmp"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_a_truncated_image_is_named(tmp_path, suffix, share):
    path = tmp_path / f"broken{suffix}"
    Image.effect_noise((64, 64), 60).convert("RGB").save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    fails(path, "not a readable image")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_bytes_raise_a_user_error(tmp_path):
    random = np.random.default_rng(0)
    for suffix in (".jpg", ".png", ".tif"):
        path = tmp_path / f"x{suffix}"
        Image.effect_noise((32, 32), 60).convert("RGB").save(path)
        data = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(40):
            damaged = data.copy()
            damaged[random.integers(0, min(len(data), 400), 8)] = random.integers(0, 256, 8)
            path.write_bytes(damaged.tobytes())
            try:
                assert ImageFiles([str(path)])[0].mode == "RGB"
            except UserError as error:
                assert str(path) in str(error)


def test_a_file_that_is_not_an_image_is_named(tmp_path):
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    fails(tmp_path / "page.jpg", "none of the formats JPEG, PNG")
    (tmp_path / "empty.jpg").write_bytes(b"")
    fails(tmp_path / "empty.jpg", "none of the formats JPEG, PNG")
    (tmp_path / "folder.jpg").mkdir()
    fails(tmp_path / "folder.jpg", "directory")
    fails(tmp_path / "gone.jpg", "no such image", "--image_dir")


# Finding files


def test_an_image_comes_from_the_first_place_that_has_it(tmp_path, photos):
    photos(tmp_path / "one", "a.jpg", "sub/b.jpg")
    photos(tmp_path / "two", "b_2.jpg", "c_2.jpg", "a_2.jpg")
    absolute = tmp_path / "three" / "d.jpg"
    photos(tmp_path / "three", "d.jpg")
    names = ["a.jpg", "sub/b.jpg", "c.jpg", str(absolute)]
    places = [
        (tmp_path / "nowhere", names),
        (tmp_path / "one", names),
        (tmp_path / "two", ["a_2.jpg", "b_2.jpg", "c_2.jpg", "d_2.jpg"]),
    ]
    found = find_image_files(places, "captions.json")
    expected = [tmp_path / "one" / "a.jpg", tmp_path / "one" / "sub" / "b.jpg", tmp_path / "two" / "c_2.jpg", absolute]
    assert found.paths == [str(path) for path in expected]
    assert found[3].size == (8, 8)


def test_later_places_are_searched_only_if_needed(tmp_path, photos):
    photos(tmp_path, "a.jpg")

    def places():
        yield tmp_path, ["a.jpg"]
        raise AssertionError("searched")

    assert len(find_image_files(places(), "captions.json")) == 1


def test_missing_images_are_counted_and_the_first_named(tmp_path, photos):
    photos(tmp_path / "images", "a.jpg")
    names = ["a.jpg", "b.jpg", "c.jpg"]
    with pytest.raises(UserError) as error:
        find_image_files([(tmp_path / "nowhere", names), (tmp_path / "images", names)], "captions.json")
    message = str(error.value)
    assert message.startswith("captions.json: 2 of 3 images are missing")
    assert str(tmp_path / "images" / "b.jpg") in message and "--image_dir" in message
