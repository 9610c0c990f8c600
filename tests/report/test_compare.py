"""cakd compare and cakd runs over runs that are real, and as small as can be."""

import json
import shutil

import pytest

from cakd_cli.commands.compare import comparison_of
from cakd_cli.files import read_json, write_json
from cakd_cli.report import finished, writing
from tests.conftest import train_toy


@pytest.fixture(scope="module")
def runs(toy_file, toy_teacher, tmp_path_factory):
    """Two methods with two seeds, in the folder of a sweep beside their teacher."""
    folder = tmp_path_factory.mktemp("sweep")
    shutil.copytree(toy_teacher, folder / "teacher")
    for loss in ("cross-entropy", "kd"):
        for seed in (0, 1):
            words = ("optimizer.learning_rate=0.02", f"loss={loss}")
            flags = {"teacher": (str(folder / "teacher"),), "engine.epochs": 1, "seed": seed}
            train_toy(toy_file, folder / f"{loss}-seed{seed}", *words, **flags)
    return folder


def test_what_is_compared(cakd, runs):
    document = cakd("compare", runs, "--json").document

    assert (document["against"], document["comparisons"], document["headline"]) == ("cross-entropy", 1, "top1")
    groups = {group["name"]: group for group in document["groups"]}
    assert groups.keys() == {"cross-entropy", "kd"}  # the teacher is none of the students
    top1 = {
        name: [read_json(runs / f"{name}-seed{seed}" / "run.json")["metrics"]["test"]["top1"] for seed in (0, 1)]
        for name in groups
    }
    for name, group in groups.items():
        assert group["figures"]["top1"]["mean"] == pytest.approx(sum(top1[name]) / 2)
        assert group["figures"]["top1"]["n"] == 2
        assert {"agreement", "kl", "bcd", "scd", "wcd", "ece", "nll"} <= group["figures"].keys()
    gains = [ours - theirs for ours, theirs in zip(top1["kd"], top1["cross-entropy"], strict=True)]
    assert groups["kd"]["difference"]["mean"] == pytest.approx(sum(gains) / 2)
    assert groups["kd"]["difference"]["verdict"] == "inconclusive: 6 seeds in common are needed"
    means = [group["figures"]["top1"]["mean"] for group in document["groups"]]
    assert means == sorted(means, reverse=True)


def test_what_was_measured_is_not_measured_again(runs, monkeypatch):
    before = comparison_of([str(runs)])
    monkeypatch.setattr("cakd_cli.report.finished.measure", None)

    assert comparison_of([str(runs)]) == before
    (runs / "kd-seed0" / "evaluation.json").write_text("{}")
    with pytest.raises(TypeError):
        comparison_of([str(runs)])


def test_a_folder_that_cannot_be_written_is_measured_once(runs, tmp_path, monkeypatch):
    shutil.copytree(runs, tmp_path / "sweep")
    for kept in (tmp_path / "sweep").glob("*/evaluation.json"):
        kept.unlink()
    measured, measure = [], finished.measure

    def counted(path, *arguments, **options):
        measured.append(path.name)
        return measure(path, *arguments, **options)

    def refused(path, value):
        raise PermissionError(path)

    monkeypatch.setattr(finished, "measure", counted)
    monkeypatch.setattr(finished, "write_json", refused)
    comparison_of([str(tmp_path / "sweep")])

    assert sorted(measured) == ["cross-entropy-seed0", "cross-entropy-seed1", "kd-seed0", "kd-seed1"]


def test_against_another_method(cakd, runs):
    document = cakd("compare", runs, "--against", "kd", "--json").document
    assert [group["name"] for group in document["groups"] if "difference" in group] == ["cross-entropy"]

    wrong = cakd("compare", runs, "--against", "dkd")

    assert wrong.code == 2
    assert "--against dkd: there is no such group; did you mean kd?" in wrong.err


def test_two_networks_are_told_from_two_methods(cakd, runs):
    result = cakd("compare", runs / "kd-seed0", runs / "cross-entropy-seed0")

    assert "two networks, not two methods" in result.out
    assert "McNemar" in result.out
    document = cakd("compare", runs / "kd-seed0", runs / "cross-entropy-seed0", "--json").document
    networks, figures = document["networks"], [group["figures"]["top1"]["mean"] for group in document["groups"]]
    assert abs(networks["only_first"] - networks["only_second"]) == round(64 * abs(figures[0] - figures[1]))


def test_runs_that_are_not_alike_are_refused(cakd, runs, toy_file, tmp_path):
    train_toy(toy_file, tmp_path / "longer", "optimizer.learning_rate=0.02", "loss=cross-entropy")

    refused = cakd("compare", runs / "cross-entropy-seed0", tmp_path / "longer")

    assert refused.code == 3
    assert "no fair comparison: they differ in epochs: 1 or 4\n" in refused.err
    shown = cakd("compare", runs / "cross-entropy-seed0", tmp_path / "longer", "--different")
    assert shown.code == 0, shown.err
    assert "not alike: epochs (1 or 4)" in shown.out


def test_a_run_without_a_teacher_has_fewer_figures(cakd, toy_teacher, tmp_path):
    shutil.copytree(toy_teacher, tmp_path / "teacher")
    document = cakd("compare", tmp_path / "teacher", "--json").document

    (group,) = document["groups"]
    assert "agreement" not in group["figures"]
    assert document["teacher"] is None
    assert cakd("compare", tmp_path / "teacher").code == 0


@pytest.mark.parametrize("form", ["--markdown", "--latex"])
def test_tables_for_papers(cakd, runs, form):
    result = cakd("compare", runs, form)

    lines = result.out.splitlines()
    if form == "--markdown":
        assert lines[0].startswith("| student | n | top-1 % |")
        assert {line.count("|") for line in lines if line.startswith("|")} == {lines[0].count("|")}
    else:
        (columns,) = (line for line in lines if line.startswith(r"\begin{tabular}"))
        rows = [line for line in lines if line.endswith(r"\\")]
        assert {row.count(" & ") for row in rows} == {columns.partition("}{")[2].count("r") + 1}
        assert r"\toprule" in lines


def test_names_are_text_in_latex():
    group = {"name": "kd_a-50%&{x}", "alone": False, "seeds": [0], "figures": {}, "model": "resnet8"}
    group |= {"parameters": 1, "flops_per_image": 2, "latency_ms": None}
    document = {"groups": [group], "against": group["name"], "headline": "top1", "comparisons": 0}
    document |= {"networks": None, "different": {}, "teacher": None}

    assert r"kd\_a-50\%\&\{x\}" in writing.latex(document)


def test_small_curves():
    assert writing.small_curve([0.1]) == ""
    assert writing.small_curve([0.0, 0.5, 1.0]) == "▁▅█"
    assert len(writing.small_curve([i / 100 for i in range(100)])) == 10
    assert writing.small_curve([0.5, 0.5]) == "▁▁"


def test_what_is_no_finished_run(cakd, runs, tmp_path):
    assert "is no run, and holds none" in cakd("compare", tmp_path).err
    shutil.copytree(runs / "kd-seed0", tmp_path / "kd-seed0")
    facts = read_json(tmp_path / "kd-seed0" / "run.json")
    write_json(tmp_path / "kd-seed0" / "run.json", facts | {"ended": "stopped"})
    assert cakd("compare", tmp_path).code == 4
    for damaged in ([], {**facts, "metrics": {"test": {"top1": "high"}}}, {**facts, "data": None}):
        (tmp_path / "kd-seed0" / "run.json").write_text(json.dumps(damaged))
        result = cakd("compare", tmp_path / "kd-seed0")
        assert (result.code, "a bug in cakd" in result.err) == (4, False), result.err
    shutil.copytree(runs / "kd-seed0", tmp_path / "other" / "kd-seed0")
    twice = cakd("compare", runs / "kd-seed0", tmp_path / "other" / "kd-seed0")
    assert (twice.code, "are both kd with seed 0" in twice.err) == (4, True)


def test_runs_are_listed_best_first(cakd, runs, tmp_path):
    shutil.copytree(runs / "kd-seed0", tmp_path / "runs" / "sweep" / "kd-seed0")
    shutil.copytree(runs / "teacher", tmp_path / "runs" / "teacher")
    (tmp_path / "runs" / "broken").mkdir()
    (tmp_path / "runs" / "broken" / "recipe.yaml").write_text("[")
    rows = cakd("runs", tmp_path / "runs", "--json").document["runs"]

    assert [row["state"] for row in rows] == ["completed", "completed", "not begun"]
    tests = [row["test"] for row in rows[:2]]
    assert tests == sorted(tests, reverse=True)
    text = cakd("runs", tmp_path / "runs").out
    assert "sweep/kd-seed0" in text
    assert "broken (not begun)" in text
    assert cakd("runs", tmp_path / "nowhere").code == 4
    (tmp_path / "empty").mkdir()
    assert "no run in" in cakd("runs", tmp_path / "empty").out


@pytest.fixture
def copied(runs, tmp_path):
    shutil.copytree(runs, tmp_path / "copied")
    return tmp_path / "copied"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("cost", None),
        ("right", "zz"),
        ("per_class", None),
        ("teacher", []),
        ("quality", {"top1": 0.5, "ece": "x"}),
        ("data", 3),
    ],
)
def test_a_damaged_evaluation_is_measured_again(cakd, copied, key, value):
    before = cakd("compare", copied, "--json").document
    kept = read_json(copied / "kd-seed0" / "evaluation.json")
    write_json(copied / "kd-seed0" / "evaluation.json", kept | {key: value})

    after = cakd("compare", copied, "--json").document

    for document in (before, after):
        for group in document["groups"]:
            del group["latency_ms"]
    assert after == before


@pytest.mark.parametrize(
    ("file", "edit"),
    [
        ("run.json", {"metrics": {"test": {"top1": 0.5}, "validation": []}}),
        ("run.json", {"versions": [1], "chosen": None, "hardware": None}),
        ("metrics.jsonl", {"validation": None}),
        ("metrics.jsonl", {"validation": {"top1": "x"}}),
        ("metrics.jsonl", {"train": []}),
        ("metrics.jsonl", {"train": {"other": 1.0}}),
    ],
)
def test_what_somebody_edited_is_left_out(cakd, copied, file, edit):
    path = copied / "kd-seed0" / file
    if file == "run.json":
        write_json(path, read_json(path) | edit)
    else:
        path.write_text(json.dumps(json.loads(path.read_text().splitlines()[0]) | edit) + "\n")

    for words in (("compare", copied), ("report", copied, "--out", copied / "page.html"), ("runs", copied)):
        result = cakd(*words)
        assert result.code == 0, (words, result.err)


def test_a_teacher_that_somebody_edited_is_another_one(cakd, copied):
    path = copied / "kd-seed0" / "run.json"
    write_json(path, read_json(path) | {"teacher": ["x"]})

    result = cakd("compare", copied)

    assert result.code == 3
    assert "they differ in teacher" in result.err


def test_names_are_text_in_tables(cakd, copied):
    """Rich would take [red] for a colour, and end at [/x]."""
    (copied / "kd-seed0").rename(copied / "kd[red]-seed0")
    shutil.rmtree(copied / "kd-seed1")

    assert "kd[red]" in cakd("compare", copied).out
    assert "kd[red]-seed0" in cakd("runs", copied).out


def test_groups_that_share_no_seed(cakd, copied):
    shutil.copytree(copied / "kd-seed1", copied / "kd-seed5")
    shutil.rmtree(copied / "kd-seed1")
    shutil.rmtree(copied / "kd-seed0")
    recipe = copied / "kd-seed5" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("seed: 1", "seed: 5"))

    document = cakd("compare", copied, "--json").document

    (group,) = (group for group in document["groups"] if group["name"] == "kd")
    assert (group["difference"]["pairs"], group["difference"]["mean"]) == (0, None)
    assert cakd("compare", copied).code == 0
    assert cakd("report", copied, "--out", copied / "page.html").code == 0
