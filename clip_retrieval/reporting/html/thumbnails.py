"""Small copies of images as data URIs, each decoded and embedded once."""

from __future__ import annotations

import base64
import io

from PIL import Image

from clip_retrieval.data.dataset import Images
from clip_retrieval.errors import UserError
from clip_retrieval.log import log

SIDE = 224  # pixels of the long side: twice the displayed size, for dense screens
QUALITY = 62


class Thumbnails:
    """The thumbnails of a page. A template asks for each picture with `embed`."""

    def __init__(self, images: Images):
        self._images = images
        self._sizes: dict[int, tuple[int, int] | None] = {}

    def embed(self, index: int) -> tuple[str, tuple[int, int] | None]:
        """Return the data URI and the (width, height) of an image.

        The URI is empty if the page has the image already, and the size is None if the image cannot be read.
        """
        if index in self._sizes:
            return "", self._sizes[index]
        try:
            image = self._images[index]
        except UserError as error:
            log.warning(f"not in the report: {error}")
            self._sizes[index] = None
            return "", None
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        self._sizes[index] = image.size
        file = io.BytesIO()
        image.save(file, "WEBP", quality=QUALITY, method=4)
        return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}", image.size
