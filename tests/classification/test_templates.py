import pytest

from clip_retrieval.classification.templates import SETS, Templates, choose_templates
from clip_retrieval.errors import UserError


def test_sets_are_complete():
    sizes = {name: len(set(texts)) for name, texts in SETS.items()}
    assert sizes == {"imagenet": 80, "simple": 7, "cifar": 18, "single": 1, "stl10": 2, "chinese": 8}
    assert {"a low contrast photo of the {}.", "a photo of a big {}.", "a photo of the {}."} <= set(SETS["cifar"])
    assert "itap of my {}." in SETS["imagenet"]


@pytest.mark.parametrize("name", SETS)
def test_every_template_has_one_placeholder(name):
    assert all(text.count("{}") == 1 and "{" not in text.replace("{}", "") for text in SETS[name])


def test_prompts_are_ordered_by_class():
    templates = Templates("own", ("a {}.", "the {}."))
    assert templates.prompts(["cat", "dog"]) == ["a cat.", "the cat.", "a dog.", "the dog."]


@pytest.mark.parametrize(
    "names, default, expected",
    [
        (["cat"], "imagenet", "imagenet"),
        (["cat"], "cifar", "cifar"),
        (["cat", "狗"], "cifar", "chinese"),
        (["cat", "dog", "狗"], "cifar", "cifar"),
    ],
)
def test_default_templates_are_the_data_sets_or_chinese(names, default, expected):
    templates = choose_templates(None, (), names, default)
    assert (templates.name, templates.texts) == (expected, SETS[expected])


def test_templates_from_a_set_a_file_or_the_command_line(tmp_path):
    file = tmp_path / "t.txt"
    file.write_text("a photo of {c}\n\n  {} there \n", encoding="utf-8")
    assert choose_templates("simple", (), ["狗"]).texts == SETS["simple"]
    assert choose_templates(str(file), (), ["cat"]) == Templates(str(file), ("a photo of {}", "{} there"))
    assert choose_templates(None, ("my {}", "{c}!"), ["cat"]) == Templates("own", ("my {}", "{}!"))


@pytest.mark.parametrize(
    "content, words",
    [
        ("a {}\na photo\n", ["t.txt, line 2", "has 0"]),
        ("a {} and {c}\n", ["t.txt, line 1", "has 2"]),
        ("\n \n", ["t.txt", "no templates"]),
    ],
)
def test_bad_file_is_named_with_the_line(tmp_path, content, words):
    (tmp_path / "t.txt").write_text(content)
    with pytest.raises(UserError) as error:
        choose_templates(str(tmp_path / "t.txt"), (), ["cat"])
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    "templates, template, words",
    [
        ("cifer", (), ["cifer", "no such file", "cifar"]),
        ("cifar", ("a {}",), ["--templates", "--template"]),
        (None, ("a photo",), ['--template "a photo"', "has 0"]),
    ],
)
def test_bad_usage_names_the_option(templates, template, words):
    with pytest.raises(UserError) as error:
        choose_templates(templates, template, ["cat"])
    assert all(word in str(error.value) for word in words)


def test_placeholder_with_simple_clips_name(tmp_path):
    assert choose_templates(None, ("a photo of {label_name}",), ["cat"]).texts == ("a photo of {}",)
    assert choose_templates(None, ('"{}" on a sign.',), ["cat"]).texts == ('"{}" on a sign.',)


@pytest.mark.parametrize("line", ['"a photo of a {}.",', "lambda c: f'a bad photo of a {c}.',", "['a {}']"])
def test_code_in_a_template_is_refused(tmp_path, line):
    (tmp_path / "t.txt").write_text(line + "\n")
    with pytest.raises(UserError, match=r"t.txt, line 1: write the sentence alone"):
        choose_templates(str(tmp_path / "t.txt"), (), ["cat"])
