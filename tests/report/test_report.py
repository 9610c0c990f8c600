"""cakd report: what the page holds, and that it needs nothing but itself."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch

from cakd_cli.evaluation import mistakes
from cakd_cli.report import figures, page
from tests.conftest import train_toy

VOID = {"meta", "img", "br", "link", "path", "use", "rect", "input"}


class Page(HTMLParser):
    """Elements with their attributes, what was left open, and all text."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def of(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture(scope="module")
def runs(toy_file, toy_teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    for loss, seeds in (("cross-entropy", (0, 1)), ("cakd-logits", (0, 1))):
        for seed in seeds:
            words = ("optimizer.learning_rate=0.002", f"loss={loss}")
            flags = {"teacher": (str(toy_teacher),), "engine.epochs": 2, "seed": seed}
            train_toy(toy_file, folder / f"{loss}-seed{seed}", *words, **flags)
    return folder


@pytest.fixture(scope="module")
def written(runs, tmp_path_factory):
    from cakd_cli.commands.report import run
    from cakd_cli.console import Console

    path = tmp_path_factory.mktemp("page") / "report.html"
    run([str(runs)], out=str(path), against=None, different=False, overwrite=False, console=Console(quiet=True))
    return path


@pytest.fixture(scope="module")
def parsed(written):
    return Page(written.read_text())


def test_all_sections_are_there(parsed):
    text = " ".join(" ".join(parsed.words).split())

    assert parsed.open == []
    headings = ("Methods", "Training", "What it costs", "How sure it is", "Classes", "Most confused classes")
    for heading in (
        *headings,
        "Where student and teacher disagree",
        "Which classes belong together",
        "How it was made",
    ):
        assert heading in text
    assert "the student alone" in text
    assert "Parts of the loss of cakd-logits" in text
    assert "type: cakd" in text  # the recipe
    assert torch.__version__.partition("+")[0] in text


def test_the_page_needs_no_network_and_no_script(written, parsed):
    assert not parsed.of("script")
    assert not parsed.of("link")
    for _, attributes in parsed.found:
        for name in ("src", "href", "xlink:href"):
            assert re.match(r"#|data:image/", attributes.get(name) or "#"), attributes
    assert not re.search(r"url\((?!#)|@import", written.read_text())
    assert written.stat().st_size < 5e6


def test_the_page_can_be_read_without_seeing_it(parsed):
    identities = [attributes["id"] for _, attributes in parsed.found if "id" in attributes]
    assert len(set(identities)) == len(identities)
    assert parsed.of("html")[0]["lang"] == "en"
    assert len(parsed.of("h1")) == 1
    for picture in parsed.of("img"):
        assert picture["alt"]
    drawings = parsed.of("svg")
    assert len(drawings) >= 6
    for drawing in drawings:
        assert drawing["role"] == "img"
        for identity in drawing["aria-labelledby"].split():
            assert identity in identities
    for link in parsed.of("a"):
        assert link["href"].removeprefix("#") in identities
    assert len(parsed.of("caption")) == len(parsed.of("table"))
    assert len(parsed.of("details")) == len(drawings)  # each figure's numbers
    for used in re.findall(r"url\(#([^)]+)\)", " ".join(str(attributes) for _, attributes in parsed.found)):
        assert used in identities


@pytest.mark.slow
def test_names_are_text_not_html_nor_mathematics(toy_file, tmp_path):
    """A class may be called anything."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(toy_file, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
    names = ["<script>alert(1)</script>", "$\\frac$ & {{ 7 * 7 }}", "a\\d \\1", "x" * 300]
    save_file(tensors, tmp_path / "odd.safetensors", metadata={"class_names": json.dumps(names)})
    run = train_toy(
        tmp_path / "odd.safetensors", tmp_path / "run", "optimizer.learning_rate=0.001", **{"engine.epochs": 1}
    )
    student = train_toy(
        tmp_path / "odd.safetensors", tmp_path / "kd", "loss=kd", "optimizer.learning_rate=0.0001", "engine.epochs=1",
        teacher=(str(train_toy(tmp_path / "odd.safetensors", tmp_path / "teacher")),),
    )  # fmt: skip
    from cakd_cli.commands.report import run as report
    from cakd_cli.console import Console

    for path in (run, student):
        out = tmp_path / f"{path.name}.html"
        report([str(path)], out=str(out), against=None, different=False, overwrite=False, console=Console(quiet=True))
        text = out.read_text()
        assert "<script>" not in text
        assert "{{ 7 * 7 }}" in text
        assert Page(text).open == []


@pytest.mark.parametrize(
    ("out", "words", "message"),
    [
        ("", (), "--out is empty"),
        ("folder", (), "is no file"),
        ("taken.html", (), "exists"),
        ("new.html", ("--against", "dkd"), "there is no such group"),
    ],
)
def test_wrong_words(cakd, runs, tmp_path, monkeypatch, out, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "taken.html").write_text("mine")

    result = cakd("report", runs, "--out", out, *words)

    assert result.code in (2, 4)
    assert message in result.err
    assert (tmp_path / "taken.html").read_text() == "mine"
    assert not (tmp_path / "new.html").exists()


def test_what_is_not_installed_is_named(cakd, runs, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)

    result = cakd("report", runs, "--out", tmp_path / "report.html")

    assert result.code == 3
    assert "pip install 'cakd[report]'" in result.err


@pytest.mark.parametrize(
    ("verdict", "begins"),
    [
        (
            "better",
            "Distilling was worth it: kd reaches top-1 80.00%, the student alone 70.00%, a difference of +10.00",
        ),
        ("worse", "Distilling did harm"),
        ("inconclusive: 6 seeds in common are needed", "Not decided"),
    ],
)
def test_the_summary_says_what_was_found(verdict, begins):
    difference = {"mean": 0.1, "low": 0.05, "high": 0.2, "pairs": 3, "verdict": verdict}
    kd = {"name": "kd", "alone": False, "figures": {"top1": {"mean": 0.8}}, "difference": difference}
    alone = {"name": "cross-entropy", "alone": True, "figures": {"top1": {"mean": 0.7}}}
    document = {"headline": "top1", "groups": [kd, alone], "against": "cross-entropy", "teacher": None}

    (line,) = page.summary(document)

    assert line.startswith(begins)
    assert ("6 seeds in common are needed" in line) == verdict.startswith("inconclusive")


def test_reliability_sorts_by_confidence():
    logits = torch.tensor([[2.0, 0, 0], [2.0, 0, 0], [0, 9.0, 0], [0, 0, 0.1]])
    bins = mistakes.reliability(logits, torch.tensor([0, 1, 1, 0]))

    assert sum(b.share for b in bins) == pytest.approx(1)
    assert [round(b.accuracy, 3) for b in bins] == [0.0, 0.5, 1.0]
    assert bins[-1].confidence > 0.99
    assert mistakes.reliability(torch.tensor([[90.0, 0]]), torch.tensor([0]))[0].confidence == 1


def test_confusions_and_disagreements():
    logits = torch.eye(3)[torch.tensor([0, 1, 1, 1, 2])] * torch.tensor([1.0, 5, 2, 3, 1]).unsqueeze(1)
    labels = torch.tensor([0, 0, 0, 2, 2])

    pairs = mistakes.confusions(logits, labels)

    assert [(pair.label, pair.answer, pair.times, pair.samples) for pair in pairs] == [
        (0, 1, 2, (1, 2)),
        (2, 1, 1, (3,)),
    ]
    teacher = torch.eye(3)[torch.tensor([0, 0, 1, 2, 0])] * 4
    assert mistakes.disagreements(logits, teacher) == [1, 3, 4]
    assert mistakes.disagreements(logits, logits) == []


def test_correlation_of_classes():
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    logits[:, 3] = 1.0

    found = mistakes.class_correlation(logits)

    expected = torch.corrcoef(logits[:, :3].double().T)
    assert torch.allclose(found[:3, :3], expected)
    assert found.isfinite().all()


def test_figures_of_too_little_are_left_out():
    assert figures.learning_curves({"kd": [0.5]}) is None
    assert figures.loss_parts({}, "kd") is None


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [400, 1400])
def test_a_browser_opens_the_page(written, tmp_path, width):
    """Without a word on its console, and no wider than the window."""
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    command += [f"--window-size={width},2000", f"--screenshot={tmp_path / 'page.png'}", f"file://{written}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)

    assert "CONSOLE" not in done.stderr
    assert (tmp_path / "page.png").stat().st_size > 10_000
