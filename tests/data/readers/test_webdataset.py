"""Shards as a data set: the same as the files that they were built from."""

import json

import pytest

from clip_retrieval.data.pixels.transforms import evaluation_transform
from clip_retrieval.errors import UserError
from tests.data.make_shards import jpeg, numbered, shards_of_csv, write_shard, write_shards
from tests.models.small import small_preprocess


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_shards_equal_their_source_data_set(tmp_path, captioned, read, split):
    shards = read("webdataset", shards_of_csv(captioned / "captions.csv", tmp_path), split)
    files = read("csv", captioned, split)
    assert (shards.name, shards.split) == ("webdataset", split)
    assert shards.captions == files.captions and shards.pairs.tolist() == files.pairs.tolist()
    transform = evaluation_transform(small_preprocess())
    assert len(shards.images) == len(files.images)
    for i in range(len(files.images)):
        assert shards.images.encoded(i) == files.images.encoded(i)
        assert transform(shards.images[i]).equal(transform(files.images[i]))
        assert shards.images.stamp(i)[0] == files.images.stamp(i)[0]
    assert (
        shards.image_ids[0]
        == f"{['train', 'val', 'test'].index(split) and int(files.images.name(0).split('/')[-1][:-4]):05}"
    )


def test_one_sample_per_caption_is_the_same_data_set(tmp_path, captioned, read):
    files = read("csv", captioned, "val")
    samples = [
        (f"{number:05}", {"jpg": files.images.encoded(image), "txt": files.captions[caption]})
        for number, (image, caption) in enumerate(files.pairs.tolist())
    ]
    write_shard(tmp_path / "val-0.tar", samples[:4])
    write_shard(tmp_path / "val-1.tar", samples[4:])
    shards = read("webdataset", tmp_path, "val")
    assert shards.captions == files.captions and shards.pairs.tolist() == files.pairs.tolist()
    assert [shards.images.encoded(i) for i in range(6)] == [files.images.encoded(i) for i in range(6)]
    assert shards.images.encoded(5, slice(2, 9)) == files.images.encoded(5)[2:9]


def test_an_image_name_has_shard_and_member(tmp_path, read):
    write_shards(tmp_path, [2, 2])
    dataset = read("webdataset", tmp_path, "train")
    assert dataset.images.name(3) == f"{tmp_path}/train-001.tar, 00003.jpg"


def test_a_broken_image_is_named_on_access(tmp_path, read):
    write_shard(tmp_path / "test.tar", [*numbered(0, 1), ("broken", {"jpg": jpeg(1)[:200], "txt": "x"})])
    images = read("webdataset", tmp_path, "test").images
    assert images[0].size == (24, 20)
    with pytest.raises(UserError, match=r"test\.tar, broken\.jpg: not a readable image"):
        images[1]


def test_samples_without_image_or_caption_are_skipped_and_counted(tmp_path, read, caplog):
    odd = [("no_image", {"txt": "x"}), ("no_text", {"jpg": jpeg(1)}), ("empty", {"jpg": jpeg(2), "txt": " "})]
    write_shard(tmp_path / "test.tar", [*odd, *numbered(0, 2)])
    with caplog.at_level("WARNING", "clip_retrieval"):
        dataset = read("webdataset", tmp_path, "test")
    assert dataset.captions == ["thing zero", "thing one"] and dataset.image_ids == ["00000", "00001"]
    (message,) = caplog.messages
    assert "3 of 5 samples are skipped" in message and "test.tar, sample no_image: it has no image" in message


def test_a_missing_caption_key_names_shard_and_sample(tmp_path, read):
    samples = [(f"{i}", {"jpg": jpeg(i), "json": json.dumps({"text": "a", "url": "b"})}) for i in range(3)]
    path = write_shard(tmp_path / "test.tar", samples)
    with pytest.raises(UserError) as error:
        read("webdataset", tmp_path, "test")
    assert str(error.value).startswith(f"{path}, sample 0: its .json has no 'caption' (found text, url)")
    assert read("webdataset", tmp_path, "test", caption_key="text").captions == ["a"] * 3


def test_duplicate_keys_are_not_used_as_ids(tmp_path, read):
    write_shards(tmp_path, [2], "test-a")
    assert read("webdataset", tmp_path, "test").image_ids == ["00000", "00001"]
    write_shard(tmp_path / "test-b.tar", [("00000", {"jpg": jpeg(5), "txt": "another thing"})])
    assert read("webdataset", tmp_path, "test").image_ids is None


def test_the_first_of_duplicate_members_counts(tmp_path, read):
    write_shard(
        tmp_path / "test.tar", [("0", {"jpg": jpeg(0), "txt": "first"}), ("0", {"txt": "second", "jpg": jpeg(1)})]
    )
    dataset = read("webdataset", tmp_path, "test")
    assert dataset.captions == ["first"] and dataset.images.encoded(0) == jpeg(0)


def test_a_truncated_shard_is_refused(tmp_path, read):
    (path,) = write_shards(tmp_path, [9], "test")
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(UserError, match="its end is missing"):
        read("webdataset", tmp_path, "test")
