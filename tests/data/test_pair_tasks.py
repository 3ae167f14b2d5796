"""The published layouts of Winoground, SugarCrepe and ARO."""

import json

import numpy as np
import pytest
from PIL import Image

from clip_retrieval.data.pair_tasks import read_task
from clip_retrieval.errors import UserError

RELATION = {"image_id": "1", "image_path": "a.jpg", "bbox_x": 2, "bbox_y": 1, "bbox_w": 10, "bbox_h": 5}
RELATION |= {"relation_name": "on", "true_caption": "the cup is on the box", "false_caption": "the box is on the cup"}


@pytest.fixture
def pictures(tmp_path):
    """A folder with a.jpg, b.jpg, ex_0_img_0.png and ex_0_img_1.png, all 20 x 16, with different pixels."""
    for seed, name in enumerate(("a.jpg", "b.jpg", "ex_0_img_0.png", "ex_0_img_1.png")):
        pixels = np.random.default_rng(seed).integers(0, 256, (16, 20, 3), dtype=np.uint8)
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "images" / name)
    return tmp_path / "images"


def write(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def test_winoground(pictures, tmp_path):
    record = {"id": 0, "image_0": "ex_0_img_0", "image_1": "ex_0_img_1", "caption_0": "a b", "caption_1": "b a"}
    record |= {"tag": "Noun", "secondary_tag": "", "num_main_preds": 1, "collapsed_tag": "Object"}
    path = write(tmp_path / "data/examples.jsonl", record)
    for place in (path, path.parent):
        task = read_task("winoground", place, pictures)
        examples = task.categories["winoground"]
        assert examples.images == [(0, 1)] and examples.captions == [(0, 1)] and examples.groups == ["Object"]
        assert task.dataset.captions == ["a b", "b a"] and task.dataset.images.name(1).endswith("ex_0_img_1.png")


def test_sugarcrepe_has_a_category_for_each_file(pictures, tmp_path):
    first = {"filename": "a.jpg", "caption": "A dog.", "negative_caption": "A cat."}
    second = {"filename": "a.jpg", "caption": "A cat.", "negative_caption": "A dog."}
    write(tmp_path / "data/add_obj.json", {"0": first, "1": second})
    write(tmp_path / "data/swap_att.json", {"0": first | {"filename": "b.jpg"}})
    task = read_task("sugarcrepe", tmp_path / "data", pictures)
    assert list(task.categories) == ["add_obj", "swap_att"]
    assert task.categories["add_obj"].captions == [(0, 1), (1, 0)]
    assert task.categories["add_obj"].images == [(0,), (0,)] and task.categories["swap_att"].images == [(1,)]
    assert len(task.dataset.images) == 2 and len(task.dataset.captions) == 2


def test_aro_crops_images_to_the_box(pictures, tmp_path):
    other_box = RELATION | {"bbox_x": 0, "relation_name": "under"}
    write(tmp_path / "data/visual_genome_relation.json", [RELATION, RELATION, other_box])
    task = read_task("aro", tmp_path / "data", pictures)
    examples = task.categories["visual_genome_relation"]
    assert examples.images == [(0,), (0,), (1,)] and examples.groups == ["on", "on", "under"]
    whole = np.asarray(Image.open(pictures / "a.jpg"))
    np.testing.assert_array_equal(np.asarray(task.dataset.images[0]), whole[1:6, 2:12])


def test_aro_groups_attributes_and_reads_order_tasks(pictures, tmp_path):
    record = {name: value for name, value in RELATION.items() if name != "relation_name"} | {"attributes": ["a", "b"]}
    write(tmp_path / "data/visual_genome_attribution.json", [record])
    write(tmp_path / "data/coco_order.json", [{"image": "b.jpg", "caption_options": ["a b c", "b a c", "c a b"]}])
    task = read_task("aro", tmp_path / "data", pictures)
    assert task.categories["visual_genome_attribution"].groups == ["a_b"]
    assert task.categories["coco_order"].captions == [(0, 1, 2)]
    assert task.dataset.images[0].size == (20, 16)  # b.jpg, not cropped


@pytest.mark.parametrize(
    "change, words",
    [
        ({"true_caption": None}, "example 0.*None is not a text"),
        ({"bbox_w": "wide"}, "example 0"),
        ({"bbox_x": float("inf")}, "example 0.*infinity"),
        ({"image": "a.jpg", "caption_options": "true and false"}, "example 0.*is no list"),
        ({"image_path": "missing.jpg"}, "missing.jpg"),
        ({"relation_name": 5}, "example 0"),
    ],
)
def test_bad_examples_are_named(pictures, tmp_path, change, words):
    path = write(tmp_path / "data/visual_genome_relation.json", [RELATION | change])
    with pytest.raises(UserError, match=words):
        read_task("aro", path, pictures)


def test_other_contents_are_refused(pictures, tmp_path):
    for name, content in (("list", [1]), ("empty", []), ("text", "x"), ("short", [{"image_path": "a.jpg"}])):
        path = write(tmp_path / "data" / f"{name}.json", content)
        with pytest.raises(UserError, match=f"{name}.json"):
            read_task("aro", path, pictures)
    with pytest.raises(UserError, match=r"holds no examples\.jsonl"):
        read_task("winoground", tmp_path / "data", pictures)


@pytest.mark.parametrize(
    "box", [{"bbox_w": 10**9, "bbox_h": 10**9}, {"bbox_x": 20}, {"bbox_y": -16}, {"bbox_x": 10**30}]
)
def test_boxes_that_do_not_fit_the_image_are_refused(pictures, tmp_path, box):
    path = write(tmp_path / "data/a.json", [RELATION | box])
    task = read_task("aro", path, pictures)
    with pytest.raises(UserError, match=r"a\.jpg: the box .* does not fit an image of 20 x 16"):
        task.dataset.images[0]
