"""Index a folder of photographs, and search it by text and by image.

python scripts/search.py index PHOTOS --resume logs/ex0/best.pt
    build the index in PHOTOS/.clip_search, or update it for new, changed and deleted photographs
python scripts/search.py "a dog on the beach" PHOTOS
    print the ten best photographs with their scores
python scripts/search.py --image photo.jpg PHOTOS
    similar photographs; with a text, photographs that match both
python scripts/search.py "a street" PHOTOS --not "people" --top_k 5 --json
    without people; five results, as JSON
python scripts/search.py serve PHOTOS
    a page to search with, on http://127.0.0.1:8000
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import _path  # noqa: F401

from clip_retrieval.command_line import OptionParser, add_arguments, build_parser
from clip_retrieval.errors import run_with_exit_code
from clip_retrieval.options import DataOptions, EvalOptions, ModelOptions, RunOptions
from clip_retrieval.search.source import INDEX_FOLDER

COMMANDS = {
    "index": "build or update the index of PHOTOS, a folder",
    "query": "search PHOTOS for TEXT (the word query may be left out)",
    "serve": "serve a page to search PHOTOS with",
}
USAGE = {
    "index": "search.py index PHOTOS --resume CKPT [options]",
    "query": "search.py [TEXT] PHOTOS [options]\n       search.py index --help\n       search.py serve --help",
    "serve": "search.py serve PHOTOS [options]",
}


FAISS = {
    "index": "keep a FAISS index for approximate search (default: from 500,000 images on)",
    "query": "search approximately, with the FAISS index",
    "serve": "search approximately (default: from 500,000 images on)",
}
NO_FAISS = "exact search for any number of images"


def make_parser(command: str) -> OptionParser:
    parser = build_parser(f"{COMMANDS[command]}.", groups=(ModelOptions,), prog=f"search.py {command}")
    parser.usage = USAGE[command]
    parser.add_argument(
        "words", nargs="+", metavar="PHOTOS", help="the folder of the photographs, after the text if any"
    )
    add_arguments(parser, RunOptions, only=("resume", "device"))
    texts = () if command == "index" else ("caption_prefix",)
    add_arguments(parser, DataOptions, only=("max_image_pixels", *texts))
    parser.add_argument("--index", metavar="DIR", help=f"folder of the index (default: PHOTOS/{INDEX_FOLDER})")
    if command == "index":
        add_arguments(parser, EvalOptions, only=("eval_batch_size", "eval_precision"))
        add_arguments(parser, DataOptions, only=("num_workers",))
        parser.add_argument("--overwrite", action="store_true", help="replace an index of another model")
    elif command == "query":
        parser.add_argument(
            "--image", dest="images", action="append", type=Path, metavar="FILE", help="search for this image, too"
        )
        parser.add_argument(
            "--not", dest="negative", action="append", metavar="TEXT", help="without this; may be repeated"
        )
        parser.add_argument("--top_k", type=int, metavar="N", help="number of results (default: 10)")
        parser.add_argument("--json", action="store_true", help="print JSON")
    else:
        parser.add_argument(
            "--host", metavar="ADDRESS", help="address to serve on (default: 127.0.0.1, this machine only)"
        )
        parser.add_argument("--port", type=int, metavar="N", help="port (default: 8000; 0: a free one)")
    parser.add_argument("--faiss", action="store_true", default=argparse.SUPPRESS, help=FAISS[command])
    if command != "query":
        parser.add_argument("--no_faiss", dest="faiss", action="store_false", default=argparse.SUPPRESS, help=NO_FAISS)
    return parser


def take(typed: dict[str, Any], *names: str) -> dict[str, Any]:
    """Remove options from `typed` and return them; repeated ones as tuples."""
    found = {name: typed.pop(name) for name in names if name in typed}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}


def main() -> None:
    words = sys.argv[1:]
    command = words[0] if words and words[0] in COMMANDS else "query"
    parser = make_parser(command)
    typed = vars(parser.parse_args(words[words[:1] == [command] :]))
    *texts, photos = typed.pop("words")
    if len(texts) > (command == "query"):
        parser.error(f"{texts[1] if command == 'query' else photos}: one folder at a time, and a text in quotes")
    if "" in (photos, typed.get("index")):  # as a Path it would be the working directory
        parser.error("PHOTOS or --index is empty; give a folder")
    photos = Path(photos)
    folder = Path(typed.pop("index", photos / INDEX_FOLDER))
    if command == "index":
        from clip_retrieval.search.update import update_index

        return update_index(photos, folder, typed, **take(typed, "overwrite", "faiss"))
    if command == "query":
        own = take(typed, "images", "negative", "top_k", "json", "faiss")
        from clip_retrieval.search.query import Request, run_query

        return run_query(photos, folder, typed, Request("".join(texts), **own))
    own = take(typed, "host", "port", "faiss")
    from clip_retrieval.search.serve import serve

    return serve(photos, folder, typed, **own)


if __name__ == "__main__":
    sys.exit(run_with_exit_code(main))
