"""The table of published numbers, and scripts/verify.py with a small model that takes the place of a published one."""

import csv
import re

import open_clip
import pytest
import torch

from clip_retrieval.errors import UserError
from clip_retrieval.models.names import OPENAI_NAMES
from clip_retrieval.verify import METRICS, PUBLISHED, Published, compare, read_published, select
from tests.conftest import ROOT, read_json
from tests.models.small import small_clip


@pytest.fixture(scope="module")
def table():
    return read_published()


def test_published_numbers_are_plausible_and_have_sources(table):
    names = [(row.model, row.pretrained, row.dataset) for row in table]
    assert len(set(names)) == len(names) > 100
    for row in table:
        assert row.source.startswith(("https://", "README of CLIP_ITM"))
        for direction in ("i2t", "t2i"):
            recalls = [row.recalls[name] for name in METRICS if name in row.recalls and name.startswith(direction)]
            assert all(10 < recall <= 100 for recall in recalls) and recalls == sorted(recalls)
        assert len(row.recalls) in (2, 3, 6)  # SigLIP2 has R@1 only, MUGE is text-to-image


def test_published_models_exist(table):
    known = set(open_clip.list_pretrained())
    for row in table:
        if not row.model.startswith("hf-hub:OFA-Sys/chinese-clip-vit-"):
            assert (OPENAI_NAMES.get(row.model, row.model), row.pretrained) in known


def test_documents_agree_with_the_table(table):
    results, readme = ((ROOT / path).read_text() for path in ("docs/results.md", "README.md"))
    coco = results[results.index("## COCO") : results.index("Finetuned on 82,783")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in coco.splitlines()]
    found = {row[0]: [float(cell) for cell in row[1:]] for row in rows if row[0].startswith(("RN", "ViT"))}
    openai = {row.model: row for row in table if row.dataset == "coco" and row.pretrained == "openai"}
    assert found == {name: list(row.recalls.values()) for name, row in openai.items()} and len(found) == 9
    # README: R@1 of both directions
    names = re.search(r"^\| \| (RN50 .*) \|$", readme, re.MULTILINE)[1].split(" | ")
    for label, dataset in (("COCO 5K, OpenAI's weights", "coco"), ("Flickr30K 1K, OpenAI's weights", "flickr30k")):
        cells = re.search(rf"^\| {label} \| ?(.*) \|$", readme, re.MULTILINE)[1].split("|")
        for name, cell in zip(names, cells, strict=True):
            if cell.strip():
                (row,) = select(table, dataset, [f"{name}:openai"])
                assert [float(text) for text in cell.split("/")] == [row.recalls[n] for n in ("i2t R@1", "t2i R@1")]
    # Chinese-CLIP ViT-B, zero-shot
    for title, dataset in (("Flickr30K-CN", "flickr30k_cn"), ("COCO-CN", "coco_cn"), ("MUGE", "muge")):
        section = results[results.index(f"## {title}\n") :]
        line = re.search(r"Chinese-CLIP ViT-B \| zero-shot \|(.*)\|", section)[1]
        (row,) = select(table, dataset, ["hf-hub:OFA-Sys/chinese-clip-vit-base-patch16"])
        assert [float(cell) for cell in line.split("|")][: len(row.recalls)] == list(row.recalls.values())


@pytest.fixture
def verification(script, captioned, tmp_path):
    """verification(recalls, *arguments) runs verify.py on a table of the small model; also returns verify.json."""
    torch.save({"state_dict": small_clip(seed=3).state_dict()}, tmp_path / "stand_in.pt")

    def run(recalls, *arguments, model=captioned / "small.json"):
        with (tmp_path / "table.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([["model", "pretrained", "dataset", *METRICS, "source"]])
            writer.writerow([model, "openai", "csv", *recalls, "a paper"])
        options = ("--dataset", "csv", "--table", tmp_path / "table.csv", "--num_workers", "0", "--device", "cpu")
        code, out, err = script("verify", captioned, *options, *arguments)
        path = tmp_path / "logs/verify/verify.json"
        return code, out, err, read_json(path)["models"] if path.exists() else []

    return run


def test_stand_in_shows_the_gap_and_its_causes(verification, tmp_path):
    weights = ("--pretrained", tmp_path / "stand_in.pt", "--eval_precision", "bf16")
    code, out, err, (record,) = verification([99, "", "", 99, "", ""], *weights)
    assert code == 3 and "1 of 1 models are not within 0.3" in err
    assert record["status"] == "gap" and record["gap"] == pytest.approx(record["found"]["i2t R@1"] - 99, abs=20)
    assert [cause.split(":")[0] for cause in record["causes"]] == ["weights", "precision", "QuickGELU"]
    assert "gap  " in out and "(99.00)" in out and "cause? weights" in out


def test_equal_numbers_are_ok(verification, tmp_path):
    weights = ("--pretrained", tmp_path / "stand_in.pt")
    *_, (record,) = verification([50, 50, 50, 50, 50, 50], *weights)
    found = list(record["found"].values())
    code, out, err, (record,) = verification([value + 0.29 for value in found], *weights)
    assert (code, record["status"], record["causes"]) == (0, "ok", []) and "ok   " in out, err
    code, *_, (record,) = verification([*found[:5], found[5] - 0.4], *weights)
    assert code == 3 and record["gap"] == pytest.approx(0.4)


def test_model_without_weights_is_reported_and_others_continue(verification):
    code, out, err, (record,) = verification([50, "", "", "", "", ""], model="ViT-B-32-of-nobody")
    assert code == 3 and record["status"] == "error" and "ViT-B-32-of-nobody:openai: not evaluated" in out, err


def test_causes_name_split_prompt_and_preprocessing():
    def causes(gap, model="ViT-B-32", tag="laion2b", **changes):
        row = Published(model, tag, "coco", {"i2t R@1": 50.0}, "a paper")
        results = {"split": "test", "images": 5000, "captions": 25000, "precision": "fp32", "decoder": "pillow"}
        results |= {"i2t": {"R@1": 50 + gap}} | changes
        return [cause.split(":")[0] for cause in compare(row, results, {})["causes"]]

    assert causes(0.3) == []
    assert causes(-0.5) == ["preprocessing", "split"]
    assert causes(30, images=1000, captions=5000) == ["split"]
    assert causes(-2, caption_prefix="a photo of ", decoder="fast") == ["decoder", "prompt"]
    assert causes(-4, model="ViT-B-16-SigLIP2", tag="webli") == ["lower-casing", "preprocessing"]
    assert causes(-4, tag="dfn2b") == ["QuickGELU"]


def test_models_are_selected_by_name_and_tag(table):
    assert {row.pretrained for row in select(table, "coco", ["ViT-B-32"])} == {
        "laion2b_s34b_b79k",
        "datacomp_xl_s13b_b90k",
    }
    assert len(select(table, "coco", ["ViT-B-32:laion2b_s34b_b79k", "ViT-B/32"])) == 2
    with pytest.raises(UserError, match="--models ViT-B: no published numbers on coco"):
        select(table, "coco", ["ViT-B"])
    with pytest.raises(UserError, match="choose from coco, flickr30k"):
        select(table, "cifar", [])


def test_bad_tables_are_named(tmp_path):
    header = ",".join(["model", "pretrained", "dataset", *METRICS, "source"])
    rows = [f"{header}\nx,y,coco,{recall},,,,,,s\n" for recall in ("high", "", "nan", "inf", "-1")]
    for text in ("a,b\n1,2\n", *rows):
        (tmp_path / "table.csv").write_text(text)
        with pytest.raises(UserError, match=r"table\.csv, line 2"):
            read_published(tmp_path / "table.csv")
    (tmp_path / "table.csv").write_text(header)
    with pytest.raises(UserError, match="holds no results"):
        read_published(tmp_path / "table.csv")


def test_missing_data_are_one_line_and_no_evaluations(script, tmp_path):
    code, _, err = script("verify", tmp_path / "none")
    assert code == 2 and f"{tmp_path / 'none'}: no such folder" in err and err.count("\n") == 1


def test_list_prints_all_published_numbers(script, table):
    code, out, _ = script("verify", "--list")
    assert code == 0 and out.count("\n") == 2 * len(table) and PUBLISHED.exists()
