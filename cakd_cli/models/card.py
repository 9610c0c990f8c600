"""The model card: a network described for people, with front matter that the Hub reads."""

from typing import TYPE_CHECKING, Any

import yaml

from cakd_cli import __version__
from cakd_cli.models import TimmSpec
from cakd_cli.models.base import num_parameters
from cakd_cli.models.preprocessing import Preprocessing

if TYPE_CHECKING:
    from cakd_cli.models.saving import SavedModel


def model_card(saved: "SavedModel") -> str:
    """Say what the network is, how good it is, and how pictures become its input."""
    facts, shown = saved.facts, saved.preprocessing
    test = facts.get("metrics", {}).get("test", {})
    lines = [
        "---",
        yaml.safe_dump(_front_matter(saved), sort_keys=False).strip(),
        "---",
        "",
        f"# {saved.spec.label}",
        "",
        f"An image classifier of {num_parameters(saved.model):,} parameters for {len(saved.class_names)} classes, "
        f"trained by cakd {__version__}" + (f" on {facts['data']['name']}." if "data" in facts else "."),
        "",
        f"- input: {_in_words(shown)}",
        "- output: one logit a class"
        + ("; an image may have several labels, so each class is decided by itself" if "map" in test else ""),
        f"- loss: {facts.get('loss', 'unknown')}",
    ]
    if "teacher" in facts:
        lines.append(f"- teacher: {facts['teacher']['name']}")
    for split, metrics in facts.get("metrics", {}).items():
        values = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if isinstance(value, float))
        lines.append(f"- {split}: {values}")
    best = facts.get("best_on_test")
    if best:
        lines.append(
            f"- best on test: top1 {best['top1']:.4f} after epoch {best['epoch']}, chosen on the test images as the "
            "literature does; this network is that of the last epoch"
        )
    lines += [
        "",
        "Measure it with `cakd eval FOLDER --data DATA`; use the file of `cakd export RUN --format onnx` so:",
        "",
    ]
    return "\n".join([*lines, "```python", _script(shown, saved.class_names), "```", ""])


def _front_matter(saved: "SavedModel") -> dict[str, Any]:
    facts = saved.facts
    test = facts.get("metrics", {}).get("test", {})
    front: dict[str, Any] = {
        "library_name": "timm" if isinstance(saved.spec, TimmSpec) else "cakd",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "cakd"] + (["knowledge-distillation"] if "teacher" in facts else []),
    }
    if "top1" in test:
        name, value = ("mean_average_precision", test["map"]) if "map" in test else ("accuracy", test["top1"])
        result = {
            "task": {"type": "image-classification"},
            "dataset": {"name": facts["data"]["name"], "type": facts["data"]["name"]},
            "metrics": [{"type": name, "value": round(value, 4)}],
        }
        front["model-index"] = [{"name": saved.spec.label, "results": [result]}]
    return front


def _in_words(shown: Preprocessing) -> str:
    channels, height, width = shown.input_size
    begin = f"{channels} x {height} x {width}"
    if shown.resized:
        begin = (
            f"a picture whose shorter side is resized to {shown.resize} pixels ({shown.interpolation}, antialiased), "
            f"its middle {height} x {width}"
        )
    return f"{begin}; pixels divided by 255, minus mean {list(shown.mean)}, divided by {list(shown.std)}"


def _script(shown: Preprocessing, class_names: tuple[str, ...]) -> str:
    """Fifteen lines that give the figures above, without torch."""
    channels, height, width = shown.input_size
    mode = {1: "L", 3: "RGB"}.get(channels)
    lines = ["import numpy as np", "import onnxruntime", *(["from PIL import Image"] if mode else []), ""]
    lines += ['session = onnxruntime.InferenceSession("model.onnx")', f"names = {list(class_names)!r}", ""]
    if mode is None:
        lines.append(f"def classify(pixels):  # uint8, ({channels}, {height}, {width})")
    else:
        lines += ["def classify(path):", f'    picture = Image.open(path).convert("{mode}")']
        if shown.resized:
            lines += [
                f"    size = [int({shown.resize} * x / min(picture.size)) for x in picture.size]",
                "    picture = picture.resize(size, Image.Resampling.BILINEAR)",
                f"    left, top = (round((x - y) / 2.0) for x, y in zip(picture.size, ({width}, {height})))",
                f"    picture = picture.crop((left, top, left + {width}, top + {height}))",
            ]
        lines.append(f"    pixels = np.asarray(picture).reshape({height}, {width}, {channels}).transpose(2, 0, 1)")
    lines += [
        f"    mean, std = (np.reshape(x, (-1, 1, 1)) for x in ({list(shown.mean)}, {list(shown.std)}))",
        "    images = ((pixels / 255 - mean) / std)[None].astype(np.float32)",
        '    return names[session.run(["logits"], {"images": images})[0].argmax()]',
    ]
    return "\n".join(lines)
