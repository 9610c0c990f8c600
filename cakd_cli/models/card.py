"""The model card: a network described for people, with front matter that the Hub reads."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import yaml

from cakd_cli import __version__
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
        + ("; an image may have several labels, so each class is decided by itself" if saved.several_labels else ""),
        *_end(saved),
        f"- loss: {facts.get('loss', 'unknown')}",
        *_origin(facts),
    ]
    for split, metrics in facts.get("metrics", {}).items():
        values = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if isinstance(value, float))
        lines.append(f"- {split}: {values}")
    if "ece" in test:
        lines.append("- ece is the expected calibration error: how far confidence is from accuracy, 0 at best")
    best = facts.get("best_on_test")
    if best:
        lines.append(
            f"- best on test: top1 {best['top1']:.4f} after epoch {best['epoch']}, chosen on the test images as the "
            "literature does; this network is that of the last epoch"
        )
    return "\n".join([*lines, "", *_use(saved), "", "```python", _script(shown), "```", ""])


def _end(saved: "SavedModel") -> list[str]:
    if saved.spec.end is None:
        return []
    return ["- end: three convolutions, then the linear classifier of the teacher (SimKD, arXiv 2203.14001)"]


def _origin(facts: Mapping[str, Any]) -> list[str]:
    """Say who taught it, where that one's weights are from, and that nobody stated a licence."""
    if "teacher" not in facts:
        return ["- licence: not stated; that of the training images may bind whoever uses it"]
    teacher = facts["teacher"]
    origin = str(teacher.get("origin", "weights of unknown origin"))
    return [
        f"- teacher: {teacher['name']}; {origin}" + ("; see their licence" if "published" in origin else ""),
        "- licence: not stated; those of the training images and of the teacher's weights may bind whoever uses it",
    ]


def _use(saved: "SavedModel") -> list[str]:
    """Say who reads the folder, and what an exported file says of itself."""
    reads = "cakd reads this folder (`cakd eval FOLDER --data DATA`, `cakd predict FOLDER IMAGE`, `--teacher FOLDER`)"
    if saved.of_timm:
        reads += ', and so does timm: `timm.create_model("local-dir:FOLDER", pretrained=True)`'
    return [
        f"{reads}.",
        "",
        "A file of `cakd export RUN --format onnx` is enough by itself: its metadata hold `class_names` and "
        "`preprocessing` as JSON, and `probabilities`, the function that turns logits into them. A `.pt2` file has the "
        "same in its extra file `cakd.json`; `--format onnx-uint8` takes pixels and answers with probabilities. "
        "This gives the accuracy above:",
    ]


def _front_matter(saved: "SavedModel") -> dict[str, Any]:
    facts = saved.facts
    test = facts.get("metrics", {}).get("test", {})
    front: dict[str, Any] = {
        "library_name": "timm" if saved.of_timm else "cakd",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "cakd"] + (["knowledge-distillation"] if "teacher" in facts else []),
    }
    if "top1" in test:
        name, value = ("mean_average_precision", test["map"]) if saved.several_labels else ("accuracy", test["top1"])
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


def _script(shown: Preprocessing) -> str:
    """Give the figures above without torch, in about fifteen lines."""
    channels, height, width = shown.input_size
    mode = {1: "L", 3: "RGB"}.get(channels)
    lines = ["import json", "import numpy as np", "import onnxruntime", *(["from PIL import Image"] if mode else [])]
    lines.append('session = onnxruntime.InferenceSession("model.onnx")')
    lines.append("told = session.get_modelmeta().custom_metadata_map")
    lines += ['names, shown = (json.loads(told[key]) for key in ("class_names", "preprocessing"))', ""]
    if mode is None:
        lines.append(f"def classify(pixels):  # uint8, ({channels}, {height}, {width})")
    else:
        lines += ["def classify(path):", f'    picture = Image.open(path).convert("{mode}")']
        if shown.resized:
            lines += [
                '    size = [int(shown["resize"] * x / min(picture.size)) for x in picture.size]',
                f"    left, top = (round((x - y) / 2) for x, y in zip(size, ({width}, {height})))",
                "    picture = picture.resize(size, Image.Resampling.BILINEAR)",
            ]
        taken = f"picture.crop((left, top, left + {width}, top + {height}))" if shown.resized else "picture"
        lines.append(f"    pixels = np.asarray({taken}).reshape({height}, {width}, {channels}).transpose(2, 0, 1)")
    lines += [
        '    mean, std = (np.reshape(shown[key], (-1, 1, 1)) for key in ("mean", "std"))',
        "    images = ((pixels / 255 - mean) / std)[None].astype(np.float32)",
        '    return names[session.run(["logits"], {"images": images})[0].argmax()]',
    ]
    return "\n".join(lines)
