"""Photographs, as a viewer shows them."""

from __future__ import annotations

from contextlib import suppress

from PIL import Image, ImageOps

from clip_retrieval.data.images.decode import as_rgb, decode_rgb
from clip_retrieval.data.images.image_files import ImageFiles


class Photographs(ImageFiles):
    """Images as a viewer shows them: upright, with white for transparency."""

    def __getitem__(self, index: int) -> Image.Image:
        return decode_rgb(self.paths[index], self.paths[index], prepare_photo)


def prepare_photo(image: Image.Image) -> Image.Image:
    """Convert an image to RGB, rotated by its EXIF orientation, on a white background."""
    with suppress(Exception):  # broken EXIF data can raise anything
        image = ImageOps.exif_transpose(image)
    if not image.has_transparency_data:
        return as_rgb(image)
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
