"""From words to a recipe."""

import pytest
from pydantic import ValidationError, field_validator

from cakd_cli.errors import RecipeError, UsageError
from cakd_cli.options import Options
from cakd_cli.recipe import strict_yaml
from cakd_cli.recipe.resolve import _in_words, resolve
from cakd_cli.recipe.schema import CosineSchedule, SGDOptions

BASE = {"data": "digits", "model": "resnet8"}


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return str(path)

    return write


def mistakes(words, flags=None):
    with pytest.raises(RecipeError) as caught:
        resolve(words, flags or {})
    return caught.value.message.splitlines()[1:]


def test_precedence_is_default_file_word_flag(write):
    path = write("data: digits\nmodel: resnet8\nseed: 1\nengine: {epochs: 2}\n")

    assert resolve([], BASE).seed == 0
    assert resolve([path], {}).seed == 1
    assert resolve([path, "seed=2"], {}).seed == 2
    assert resolve([path, "seed=2"], {"seed": 3}).seed == 3
    assert resolve([path, "seed=2"], {"seed": None}).seed == 2
    assert resolve([path], {}, defaults={"seed": 9}).seed == 1
    assert resolve([path], {}).engine.epochs == 2


def test_a_deeper_key_refines_a_flag():
    recipe = resolve(["loss.1.beta=4", "data.validation_fraction=0.2"], BASE | {"loss": "dkd", "teacher": "runs/t"})

    assert recipe.loss[1].beta == 4
    assert recipe.data.validation_fraction == 0.2


def test_short_forms():
    recipe = resolve([], {"data": "folder:C:/a:b", "model": "torchvision:resnet18", "teacher": "timm:x", "loss": "kd"})

    assert recipe.data.path == "C:/a:b"
    assert recipe.model.name == "resnet18"
    assert not recipe.model.pretrained
    assert recipe.teacher.pretrained
    assert [term.type for term in recipe.loss] == ["cross-entropy", "kd"]


def test_published_weights_by_name():
    words = ["model=torchvision:resnet18@IMAGENET1K_V1"]
    flags = {"data": "digits", "teacher": ("torchvision:resnet50@IMAGENET1K_V1", "torchvision:resnet50"), "loss": "kd"}
    recipe = resolve(words, flags)

    assert (recipe.model.name, recipe.model.pretrained) == ("resnet18", "IMAGENET1K_V1")
    assert [(member.name, member.pretrained) for member in recipe.teacher.members] == [
        ("resnet50", "IMAGENET1K_V1"),
        ("resnet50", True),
    ]
    assert resolve(words, flags | {"model": "torchvision:resnet34"}).model.name == "resnet34"
    assert mistakes([], BASE | {"model": "torchvision:resnet18@"}) == [
        "  --model: model.pretrained: input should be true or false or input should not be empty, got '' "
        "(start from published weights, by name (IMAGENET1K_V1); true = torchvision's default)"
    ]
    # timm's own names say which.
    assert resolve([], BASE | {"model": "timm:resnet50@a1"}).model.name == "resnet50@a1"


def test_a_section_without_its_type_keeps_the_default_kind():
    recipe = resolve(["optimizer.learning_rate=0.3", "schedule.warmup_epochs=2"], BASE)

    assert recipe.optimizer == SGDOptions(learning_rate=0.3)
    assert recipe.schedule == CosineSchedule(warmup_epochs=2)


def test_loss_names_are_the_recipes_own_methods_first(write):
    path = write("data: digits\nmodel: resnet8\nteacher: t\nmethods:\n  kd: [{type: kd, temperature: 7}]\n")

    assert resolve([path], {"loss": "kd"}).loss[0].temperature == 7
    assert resolve([path], {"loss": "dkd"}).loss[1].beta == 8


def test_a_grouping_by_its_name_alone():
    words = ["loss=cakd-logits", "loss.1.grouping=top-mass"]

    recipe = resolve(words, BASE | {"teacher": "t"})

    assert (recipe.loss[1].grouping.type, recipe.loss[1].grouping.mass) == ("top-mass", 0.9)


def test_mistakes_of_different_kinds_are_all_listed():
    with pytest.raises(RecipeError) as caught:
        resolve(["loss=[kd]", "data.view=3", "engine=7"], BASE)

    for expected in ("loss.0: input", "data.view: unknown key", "engine: input"):
        assert expected in str(caught.value)


def test_published_objectives():
    flags = BASE | {"teacher": "t", "engine.epochs": 240}
    kd = resolve([], flags | {"loss": "kd"}).loss
    dkd = resolve([], flags | {"loss": "dkd"}).loss
    cakd = resolve([], flags | {"loss": "cakd"}).loss

    assert [(term.weight, term.warmup_epochs) for term in kd] == [(0.1, 0), (0.9, 0)]
    assert (dkd[1].alpha, dkd[1].beta, dkd[1].temperature, dkd[1].warmup_epochs) == (1, 8, 4, 20)
    assert (cakd[1].grouping.type, cakd[1].warmup_epochs) == ("label", 20)


def test_all_mistakes_at_once_in_the_order_of_the_file(write):
    path = write(
        """data: digits
model: {type: resnet9}
seed: yes
engine:
  epochs: 0
  batchsize: 3
loss:
  - type: cakd
    temprature: 4
    warmup_epochs: soon
    grouping: {type: top-k, k: 0}
  - {type: dkkd}
optimizer: {type: sgd, learning_rate: 1e-3x}
seed: 3
"""
    )
    found = mistakes([path, "engine.precision=bf17", "nonsense.x=1"])
    places = [line.split(": ")[0].split("/")[-1].strip() for line in found]

    assert places == [
        *(f"recipe.yaml:{line}" for line in (2, 3, 5, 6, 9, 10, 11, 12, 13, 14)),
        "engine.precision=bf17",
        "nonsense.x=1",
    ]
    text = "\n".join(found)
    for expected in (
        "no 'resnet9' here; did you mean resnet8",
        "seed: input should be a valid integer, got 'yes'",
        "engine.epochs: input should be greater than or equal to 1, got 0 (passes over the training split)",
        "engine.batchsize: unknown key; did you mean batch_size",
        "loss.0.temprature: unknown key; did you mean temperature?",
        "loss.0.warmup_epochs: input should be a valid number or input should be 'auto', got 'soon'",
        "loss.0.grouping.k: input should be greater than or equal to 1, got 0 (number of strong classes)",
        "loss.1: no 'dkkd' here; did you mean dkd or gdkd or kd?",
        "optimizer.learning_rate: input should be a valid number, got '1e-3x'",
        "seed: given twice, first on line 3",
        "engine.precision: no 'bf17' here; did you mean bf16?",
    ):
        assert expected in text


@pytest.mark.parametrize(
    ("words", "flags", "expected"),
    [
        ([], {"model": "resnet8"}, "data: is missing (what to look at); give --data"),
        ([], {"data": "digits"}, "give --model or --student"),
        ([], BASE | {"data": "digit"}, "--data: data: no 'digit' here; did you mean digits?"),
        ([], BASE | {"data": "folder"}, "'folder' lacks its path; write folder:PATH"),
        ([], BASE | {"data": "digits:8"}, "'digits' takes nothing after a colon, got '8'"),
        ([], BASE | {"loss": "kdd"}, "--loss: loss: no method 'kdd'; did you mean kd or kdsvd or rkd?"),
        ([], BASE | {"loss": "kd"}, "teacher: is missing, and the term kd needs one; give --teacher"),
        ([], BASE | {"loss": "kd", "teacher": "resnet56"}, "resnet56 has fresh weights"),
        (["loss.5.weight=1"], BASE, "loss.5.weight=1: loss: there is no entry 5"),
        (["seed.x=1"], BASE, "seed.x=1: seed"),
        (["=1"], BASE, "the key is empty"),
        (["engine..epochs=1"], BASE, "the key is empty"),
        (["seed=[1"], BASE, "seed=[1: "),
        (["seed="], BASE, "seed: input should be a valid integer, got None"),
        (["seed=-1"], BASE, "greater than or equal to 0, got -1"),
        (["seed=010"], BASE, "got '010'"),
        (["engine.parallel=fsdp", "engine.compile=on"], BASE, "engine.compile: is on, and what is cut over processes"),
        (["optimizer.momentum=0"], BASE, "optimizer.nesterov: needs a momentum above 0"),
        (["²=1"], BASE, "²=1: ²: unknown key"),
        (["loss=[]"], BASE, "loss: needs at least one term"),
        (["loss=3"], BASE, "loss: "),
        (["loss.0.weight=0"], BASE, "loss: no term has a weight above 0"),
        (["loss=[{type: cakd-features}]"], BASE | {"teacher": "t"}, "loss: no term looks at the logits"),
        ([], BASE | {"loss": "kd", "teacher": ("a", "")}, "--teacher: teacher: is empty"),
        (["teacher=[a, [b, c]]", "loss=kd"], BASE, "a list of teachers cannot hold another list"),
        (["teacher=[a, 3]", "loss=kd"], BASE, "teacher.members.1: input should be a mapping"),
        (
            ["teacher=[a, resnet56]", "loss=kd"],
            BASE,
            "resnet56 has fresh weights; give {type: resnet56, weights: FILE}",
        ),
        (["loss=[kd]"], BASE, "loss.0: input should be a mapping, as {type: NAME}, got 'kd'"),
        (["loss=dkd", "loss.1.beta={type: linear, start: 1}"], BASE, "loss.1.beta.end: is missing"),
        (["loss=cakd-logits", "loss.1.grouping=lable"], BASE, "loss.1.grouping: no 'lable' here; did you mean label?"),
        (["engine=3"], BASE, "engine: input should be a mapping, got 3"),
        (["engine.epochs=1.5"], BASE, "engine.epochs: input should be a valid integer, got 1.5"),
        (["optimizer.learning_rate=.nan"], BASE, "finite number, got nan"),
        (["optimizer.type=adam"], BASE, "optimizer: no 'adam' here; did you mean adamw?"),
        (["schedule={type: step, milestones: [2]}"], BASE, "schedule.milestones.0: input should be less than 1, got 2"),
        (["engine.gradient_accumulation=3"], BASE, "must divide the batch size 128, got 3"),
        (["schedule.warmup_epochs=31"], BASE, "longer than the run of 30 epochs"),
        (["loss.0.warmup_epochs=99"], BASE, "is 99, longer than the run of 30 epochs; auto is a twelfth"),
        (
            ["loss=[{type: cross-entropy, label_smoothing: 1}]"],
            BASE,
            "loss.0.label_smoothing: input should be less than 1",
        ),
        (["learning_rate=1"], BASE, "learning_rate: unknown key; did you mean optimizer.learning_rate?"),
        (["epochs=3"], BASE, "epochs: unknown key; did you mean engine.epochs?"),
        (["temperature=4"], BASE, "temperature: unknown key; did you mean loss.1.temperature?"),
        (["type=4"], BASE, "type: unknown key; choose from data, model"),
        ([], BASE | {"loss": "DKD"}, "loss: no method 'DKD'; did you mean dkd"),
        ([], BASE | {"loss": "kd,dkd"}, "loss: a run has one method, got 'kd,dkd'; several are for cakd sweep"),
        (["model.width=2"], BASE, "model.width: unknown key; choose from type, weights"),
    ],
)
def test_one_mistake(words, flags, expected):
    (line,) = mistakes(words, flags)

    assert expected in line


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("my images", "folder:my images"),
        ("my images/", "folder:my images/"),
        ("table.CSV", "csv:table.CSV"),
        ("~/table.csv", "csv:~/table.csv"),
        ("a.b/toy.safetensors", "tensors:a.b/toy.safetensors"),
    ],
)
def test_data_that_is_a_path_is_answered_with_its_kind(given, meant, tmp_path, monkeypatch):
    (tmp_path / "my images").mkdir()
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)

    (line,) = mistakes([], BASE | {"data": given})

    assert line.strip() == f"--data: data: '{given}' does not say what kind of data it is; write {meant}"
    assert resolve([], BASE | {"data": meant}).data.path == given
    assert resolve([], BASE).data.type == "digits"


@pytest.mark.parametrize(
    ("words", "flags", "expected"),
    [
        (["data.class_pattern=("], {"data": "folder:x"}, "data.class_pattern: is no regular expression: "),
        (["data.label_column=path"], {"data": "csv:x"}, "and so is label_column"),
        (["teacher={type: ensemble, members: [a, b], weights: [1.0]}"], {}, "there are 2 members and 1 weights"),
        (["optimizer.momentum=0"], {}, "optimizer.nesterov: needs a momentum above 0"),
        (["loss=[{type: kd, weight: {type: adaptive, base: 1}}]"], {"teacher": "t"}, "loss.0.weight: cannot be adapt"),
        (
            ["loss=[{type: cross-entropy}, {type: fsp, layers: [{student: a, teacher: a}]}]"],
            {"teacher": "t"},
            "loss.1.layers: needs two pairs",
        ),
    ],
)
def test_what_a_check_finds_is_said_without_the_name_of_its_exception(words, flags, expected):
    (line,) = mistakes(words, BASE | flags)

    assert expected in line
    assert "rror, " not in line


def test_a_run_is_no_network(toy_teacher):
    (line,) = mistakes([], BASE | {"model": str(toy_teacher)})

    assert f"model: '{toy_teacher}' is a run; name its network, and model.weights={toy_teacher}" in line


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("my images", "data is given by --data 'folder:my images'"),
        ("csv:a.csv", "data is given by --data csv:a.csv"),
        ("nothing", "cakd recipes list"),
        ("digits", "cakd recipes list"),
    ],
)
def test_data_is_no_recipe(word, hint, tmp_path, monkeypatch):
    (tmp_path / "my images").mkdir()
    monkeypatch.chdir(tmp_path)

    with pytest.raises(RecipeError) as caught:
        resolve([word], {})

    assert f"no recipe '{word}'" in caught.value.message
    assert caught.value.hint == hint


def test_a_plain_exception_of_a_check_is_said_alone():
    class Section(Options):
        size: int

        @field_validator("size")
        @classmethod
        def _check(cls, size):
            raise ValueError("Must be even")

    with pytest.raises(ValidationError) as caught:
        Section(size=3)

    assert _in_words(caught.value.errors()[0]) == "must be even"


def test_two_recipes_are_a_wrong_word():
    with pytest.raises(UsageError, match=r"more than one recipe: a, b"):
        resolve(["a", "b"], {})


def test_a_recipe_that_is_not_a_mapping(write):
    assert "a recipe is a mapping" in mistakes([write("- 1\n")])[0]


def test_an_unknown_recipe_is_answered_with_near_ones():
    with pytest.raises(RecipeError, match=r"did you mean digits/teacher"):
        resolve(["digits/teachr"], {})


def test_what_is_written_is_read_back_unchanged(write):
    recipe = resolve([], BASE | {"teacher": "1e-3", "loss": "cakd"})

    again = resolve([write(strict_yaml.dump(recipe.model_dump(mode="json")))], {})

    assert again == recipe
