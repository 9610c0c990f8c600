import itertools

import pytest

from cakd_cli.errors import RecipeError, UsageError
from cakd_cli.sweep import slurm
from cakd_cli.sweep.plan import make_plan, split

FLAGS = {"--data": "digits", "--teacher": ["runs/teacher"], "--student": "resnet8", "--epochs": 5, "--device": None}


def plan(*words, losses=("kd",), seeds=(0, 1), **flags):
    return make_plan(words, FLAGS | flags, losses=losses, seeds=seeds)


def test_every_loss_with_every_seed_and_the_student_alone():
    units = plan(losses=("kd", "cakd"), seeds=(0, 3))

    names = [f"{loss}-seed{seed}" for seed in (0, 3) for loss in ("cross-entropy", "kd", "cakd")]
    assert [unit.name for unit in units] == names
    assert units[1].words == (
        *("--data", "digits", "--teacher", "runs/teacher", "--student", "resnet8", "--epochs", "5"),
        *("--loss", "kd", "--seed", "0"),
    )


def test_lists_of_settings_are_combined():
    units = plan("optimizer.learning_rate=0.1,0.2", "loss.1.temperature=2,4", "engine.batch_size=32", seeds=(0,))

    alone = [f"cross-entropy-optimizer.learning_rate={rate}" for rate in ("0.1", "0.2")]
    kd = [
        f"kd-optimizer.learning_rate={rate}-loss.1.temperature={t}" for rate, t in itertools.product((0.1, 0.2), (2, 4))
    ]
    assert [unit.group for unit in units] == alone + kd
    assert all("engine.batch_size=32" in unit.words for unit in units)


def test_what_stands_in_brackets_or_quotes_is_one_setting():
    assert split("{type: top-k, k: 3},label") == ["{type: top-k, k: 3}", "label"]
    assert split("[1, 2], 'a,b',c") == ["[1, 2]", "'a,b'", "c"]
    units = plan("loss.1.grouping={type: top-k, k: 2},label", losses=("cakd-logits",), seeds=(0,))
    assert [unit.name for unit in units] == [
        "cross-entropy-seed0",
        "cakd-logits-loss.1.grouping=_type_top-k_k_2_-seed0",
        "cakd-logits-loss.1.grouping=label-seed0",
    ]


@pytest.mark.parametrize(
    ("words", "options", "error", "message"),
    [
        ((), {"losses": ("kd", "kd")}, UsageError, "--loss names one twice: kd,kd"),
        ((), {"seeds": (1, 1)}, UsageError, "--seeds names one twice: 1,1"),
        (("optimizer.learning_rate=0.1,0.1",), {}, UsageError, "names a setting twice"),
        (("optimizer.learning_rate=0.1,",), {}, UsageError, "names a setting twice, or an empty one"),
        ((), {"losses": ("kd", "cakdd")}, RecipeError, "cakdd: .*\n.*did you mean cakd"),
        (("optimizer.learning_rte=0.1,0.2",), {}, RecipeError, "did you mean learning_rate?"),
        (("loss.1.temperature=2,-4",), {}, RecipeError, r"kd-loss.1.temperature=-4: "),
        (("engine.epochs=1,2",), {"seeds": range(9000)}, UsageError, "36,000 runs are more than 10,000"),
        (("seed=1,2",), {}, UsageError, "a sweep has its own lists"),
        (("model.weights=a/b,a_b",), {}, UsageError, "would share the folder"),
    ],
)
def test_what_cannot_be_run_is_said_before_anything_is(words, options, error, message):
    with pytest.raises(error, match=message):
        plan(*words, **options)


def test_a_slurm_script_has_a_case_a_run(tmp_path):
    units = plan("loss.1.grouping={type: top-k, k: 2}", losses=("cakd-logits",))
    text = slurm.script(units, tmp_path / "my sweep", jobs=3)

    assert "--array=0-3%3" in text
    assert f'--output="{tmp_path}/my sweep/logs/slurm-%A-%a.txt"' in text
    assert text.count(") command=(") == 4
    assert "'loss.1.grouping={type: top-k, k: 2}'" in text
    assert f"'{tmp_path}/my sweep/cross-entropy-seed0'" in text
