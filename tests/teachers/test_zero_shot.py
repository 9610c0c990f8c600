"""CLIP and SigLIP as teachers: tiny ones, made here, as transformers itself computes them."""

import json

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch.nn import functional

from cakd_cli.evaluation.predict import predict
from cakd_cli.machine.hardware import choose_hardware
from cakd_cli.models.normalisation import Normalisation
from cakd_cli.recipe.resolve import resolve
from cakd_cli.teachers import load_teacher
from cakd_cli.teachers.zero_shot import best_temperature
from tests.conftest import write_tensors_file

CPU = choose_hardware("cpu", "fp32")
LEARN = ("--student", "resnet8", "--epochs", 1, "--batch-size", 16, "data.crop_padding=0", "engine.precision=fp32")
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
WORDS = ["<pad>", "<unk>", "<s>", "</s>", "a", "photo", "of", "class", "0", "1", "2", "3", ".", "blurry"]


@pytest.fixture(scope="module")
def colour(tmp_path_factory):
    return write_tensors_file(tmp_path_factory.mktemp("colour") / "colour.safetensors", channels=3, size=16)


def save_tokenizer(transformers, folder):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = [("<s>", 2), ("</s>", 3)]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    ends = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends).save_pretrained(folder)


def make(folder, kind):
    transformers = pytest.importorskip("transformers")
    both = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = both | {"vocab_size": len(WORDS), "max_position_embeddings": 16, "projection_size": 16}
    text |= {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    vision = both | {"image_size": 8, "patch_size": 4}
    torch.manual_seed(0)
    if kind == "clip":
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
        network = transformers.CLIPModel(config)
    else:
        network = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))
    with torch.no_grad():
        network.logit_scale.fill_(3.0)
    network.save_pretrained(folder)
    save_tokenizer(transformers, folder)
    shown = {"image_mean": MEAN, "image_std": STD, "size": {"height": 8, "width": 8}, "do_resize": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(shown))
    return folder, network.eval()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return make(tmp_path_factory.mktemp("clip"), "clip")


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    return make(tmp_path_factory.mktemp("siglip"), "siglip")


def load(folder, colour, *words):
    flags = {"data": f"tensors:{colour}", "model": "resnet8", "teacher": f"clip:{folder}"}
    recipe = resolve([*words], flags)
    data = recipe.data.load()
    return load_teacher(recipe.teacher, data, CPU), data


def logits_of(teacher, split):
    return predict(teacher.model, split, Normalisation(teacher.mean, teacher.std, CPU), CPU, batch_size=50)


def of_library(folder, network, split, *, padding):
    """Logits as transformers gives them for pictures and sentences together."""
    transformers = pytest.importorskip("transformers")
    (batch,) = split.ordered_batches(batch_size=len(split), device=CPU.device)
    images = functional.interpolate(batch.images.float() / 255, (8, 8), mode="bilinear", antialias=True)
    pixels = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    sentences = [f"a photo of a class {label}." for label in range(4)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(sentences, padding=padding, truncation=True, max_length=16, return_tensors="pt")
    mask = {"attention_mask": tokens["attention_mask"]} if padding is True else {}
    with torch.no_grad():
        return network(input_ids=tokens["input_ids"], pixel_values=pixels, **mask).logits_per_image


def test_clip_answers_as_transformers_does(clip, colour):
    folder, network = clip

    teacher, data = load(folder, colour, "teacher.logit_temperature=2.0")

    found, _ = logits_of(teacher, data.test)
    torch.testing.assert_close(2 * found, of_library(folder, network, data.test, padding=True), atol=1e-5, rtol=1e-5)
    assert found.std(0).min() > 0
    assert "CLIP, which compares an image with 'a photo of a {}.' of each class; temperature 2" in teacher.notes[0]


def test_siglip_answers_as_transformers_does_but_for_the_bias_that_softmax_ignores(siglip, colour):
    folder, network = siglip

    teacher, data = load(folder, colour, "teacher.logit_temperature=1.0")

    expected = of_library(folder, network, data.test, padding="max_length") - network.logit_bias
    torch.testing.assert_close(logits_of(teacher, data.test)[0], expected.detach(), atol=1e-5, rtol=1e-5)
    assert "its sigmoid of each class is taken for a softmax over all" in teacher.notes[0]


def test_several_templates_are_the_mean_of_what_they_say(clip, colour):
    folder, _ = clip
    templates = ("a photo of a {}.", "a blurry {}")
    both, *alone = (
        load(folder, colour, "teacher.logit_temperature=1.0", f"teacher.templates={json.dumps(list(chosen))}")[0]
        for chosen in (templates, templates[:1], templates[1:])
    )

    first, second = (functional.normalize(teacher.model.classifier.weight, dim=1) for teacher in alone)

    expected = functional.normalize(first + second, dim=1)
    torch.testing.assert_close(functional.normalize(both.model.classifier.weight, dim=1), expected)
    assert "and 1 other template of each class" in both.notes[0]
    assert len({both.weights_hash, *(teacher.weights_hash for teacher in alone)}) == 3


def test_the_temperature_is_the_best_on_held_out_images(clip, colour):
    plain, data = load(clip[0], colour, "teacher.logit_temperature=1.0")
    logits, labels = logits_of(plain, data.validation)

    teacher, _ = load(clip[0], colour)

    chosen = float((plain.model.classifier.weight / teacher.model.classifier.weight).mean())
    assert chosen == pytest.approx(best_temperature(logits, labels), rel=0.005)
    assert f"temperature {chosen:.3g}, the best on 16 held-out images" in teacher.notes[0]


def test_the_best_temperature_is_scipys():
    generator = torch.Generator().manual_seed(0)
    logits, labels = 5 * torch.randn(300, 4, generator=generator), torch.randint(0, 4, (300,), generator=generator)
    logits[torch.arange(300), labels] += 3

    def loss(log_temperature):
        return functional.cross_entropy(logits.double() / torch.tensor(log_temperature).exp(), labels).item()

    found = minimize_scalar(loss, bounds=(-4, 4), method="bounded", options={"xatol": 1e-8})
    assert best_temperature(logits, labels) == pytest.approx(float(torch.tensor(found.x).exp()), rel=1e-5)


def test_who_is_always_right_or_knows_nothing_has_an_end():
    labels = torch.arange(40) % 4

    assert best_temperature(torch.eye(4)[labels], labels) == pytest.approx(0.01)
    assert best_temperature(-torch.eye(4)[labels], labels) == pytest.approx(100)


def test_a_student_learns_from_sentences(cakd, clip, colour, tmp_path, monkeypatch):
    # Fresh weights know nothing, and a teacher near chance is refused.
    monkeypatch.setattr("cakd_cli.evaluation.metrics.near_chance", lambda *given: False)
    words = ("--data", f"tensors:{colour}", "--teacher", f"clip:{clip[0]}", *LEARN, "--loss", "kd")

    result = cakd("distill", *words, "--out", tmp_path / "run")

    assert result.code == 0, result.err
    assert f"clip:{clip[0]}: CLIP, which compares" in result.err
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())["teacher"]
    assert recorded["origin"] == "published weights, and sentences made of the class names"


def without(name):
    return lambda folder: (folder / name).unlink()


def another(folder):
    (folder / "config.json").write_text('{"model_type": "bert"}')


WRONG = [
    (without("config.json"), (), 4, "has no config.json"),
    (lambda folder: (folder / "config.json").write_text("["), (), 4, "does not say what model it is"),
    (another, (), 4, "is bert, neither CLIP nor SigLIP"),
    (without("model.safetensors"), (), 4, "transformers cannot read the network"),
    (without("preprocessor_config.json"), (), 4, "has no preprocessor_config.json"),
    (lambda folder: None, ("teacher.templates=[a photo]",), 3, "must have {} once, got 'a photo'"),
    (lambda folder: None, ("teacher.templates=[]",), 3, "list should have at least 1"),
    (lambda folder: None, ("teacher.logit_temperature=0",), 3, "must be above 0, got 0"),
    (lambda folder: None, ("--data", "tensors:{grey}"), 3, "takes images of 3 channels, those of grey have 1"),
]


@pytest.mark.parametrize(("damage", "words", "code", "message"), WRONG, ids=range(len(WRONG)))
def test_a_wrong_folder_is_one_error(cakd, clip, colour, tmp_path, damage, words, code, message):
    folder = tmp_path / "net"
    folder.mkdir()
    for path in clip[0].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    damage(folder)
    grey = write_tensors_file(tmp_path / "grey.safetensors", size=16)
    words = [word.replace("{grey}", str(grey)) for word in words]

    result = cakd(
        "distill", "--data", f"tensors:{colour}", "--teacher", f"clip:{folder}", *LEARN, "loss=kd", *words, "--dry-run"
    )

    assert (result.code, message in result.err) == (code, True), result.err
    assert "Traceback" not in result.err
    assert result.err.count("error: ") == 1
