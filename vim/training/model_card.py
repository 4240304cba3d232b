"""A trained classifier as a folder for the Hugging Face hub, with a model card made from its run."""

from __future__ import annotations

import csv
import json
import tempfile
from pathlib import Path
from typing import Any

import timm
from timm.models import save_for_hf

from vim.checkpoints.io import write_text
from vim.config.schema import TrainConfig
from vim.inference.trained_model import TrainedModel, load_trained_model
from vim.training.run_folder import RunFolder

# The model by its name in timm, its settings and its weights; timm and transformers read them.
_FILES = ("model.safetensors", "config.json")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def write_model_card(run: Path, output: Path | None = None, license: str = "") -> Path:
    """Write a folder that timm and transformers load a run's model from, with a card as its `README.md`.

    Args:
        run: Folder of the run.
        output: Folder to write; `None` is `hub` in the run's folder. Its other files stay.
        license: License of the weights, by its name on the hub, such as "apache-2.0"; empty leaves it open.

    Returns:
        The folder.

    Raises:
        CheckpointError: The run's checkpoint is damaged.
        FileNotFoundError: The run has no checkpoint yet.
        OSError: The folder cannot be written.
        ValueError: `run` is not the folder of a run, is not a classifier's, its model has no name in timm, or `output`
            is a file.
    """
    if not run.is_dir():
        raise ValueError(f"run must be the folder of a training run, got {run}")
    folder, target = RunFolder(run), run / "hub" if output is None else output
    if target.exists() and not target.is_dir():
        raise ValueError(f"output must be a folder, and {target} is a file")
    trained = load_trained_model(str(run))
    config = trained.config
    trained.check_task("classification")
    if config is None or trained.class_names is None:
        raise ValueError(f"{run} must be the folder of a training run of vim.train: it has no settings")
    if not timm.is_model(config.model.name):
        raise ValueError(f"model.name must be a model of timm to be loaded by its name, got {config.model.name!r}")
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target) as draft:
        _save(trained, Path(draft))
        for name in _FILES:
            (Path(draft) / name).replace(target / name)
    if folder.curves.is_file():
        (target / folder.curves.name).write_bytes(folder.curves.read_bytes())
    write_text(target / "README.md", _card(folder, trained, config, license))
    return target


def _save(trained: TrainedModel, folder: Path) -> None:
    """Write weights, settings, names of the classes and preprocessing as timm does."""
    seen = trained.preprocessing
    data = {
        "input_size": seen.input_size,
        "mean": seen.mean,
        "std": seen.std,
        "crop_pct": seen.crop_pct,
        "interpolation": seen.interpolation,
    }
    labels = {"label_names": list(trained.class_names or ())}
    save_for_hf(trained.model, str(folder), model_config=labels, safe_serialization=True, data_config=data)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # transformers passes the number of classes itself, and refuses it among the arguments.
    settings.get("model_args", {}).pop("num_classes", None)
    settings["pretrained_cfg"].pop("tag", None)  # names the published weights
    write_text(folder / "config.json", json.dumps(settings, indent=2) + "\n")


def _card(folder: RunFolder, trained: TrainedModel, config: TrainConfig, license: str) -> str:
    """Return the text of the card."""
    names = trained.class_names or ()
    height, width = config.model.image_shape
    parameters = sum(p.numel() for p in trained.model.parameters()) / 1e6
    facts = {
        "model": f"`{config.model.name}` of Vision Mamba (arXiv:2401.09417), {parameters:.2f} M parameters",
        "arguments": f"`{config.model.args}`" if config.model.args else "",
        "input": f"{width} x {height} pixels, mode {_MODES.get(config.model.in_chans, config.model.in_chans)}",
        "classes": f"{len(names)}: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}",
        "data": f"`{config.data.dataset}`, split `{config.data.train_split}`",
        "weights": {"ema": "averaged (EMA)", "raw": "as trained"}.get(trained.weights, trained.weights),
        "started from": _origin(config),
        "recipe": f"`{config.recipe}`: {config.epochs} epochs, batches of {config.batch_size}",
        "license": license,
    }
    parts = [
        _front_matter(license),
        f"# {config.recipe}: {config.model.name}",
        "\n".join(f"- {name}: {text}" for name, text in facts.items() if text),
        _figures(folder, config, trained),
        _usage(config),
        _training(folder),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(license: str) -> str:
    lines = ["tags:", "- image-classification", "- timm", "- transformers", "- vision-mamba"]
    lines += ["pipeline_tag: image-classification", "library_name: timm"]
    return "\n".join(["---", *lines, *([f"license: {license}"] if license else []), "---"])


def _origin(config: TrainConfig) -> str:
    if config.model.checkpoint is not None:
        return f"`{Path(config.model.checkpoint).name}`"
    return "published weights" if config.model.pretrained else "random weights"


def _figures(folder: RunFolder, config: TrainConfig, trained: TrainedModel) -> str:
    """Return a table of the held-out figures of the best epoch, by the kind of the weights."""
    if not folder.summary.is_file():
        return ""
    with folder.summary.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    kind = "ema" if trained.weights == "ema" else "val"
    scored = [row for row in rows if row.get(f"{kind}_top1")]
    if not scored:
        return ""
    best = max(scored, key=lambda row: float(row[f"{kind}_top1"]))
    table = [
        f"## Held-out images (`{config.data.val_split}`)",
        "",
        "| epoch | top-1 | top-5 | loss |",
        "|---|---|---|---|",
    ]
    figures = f"{float(best[f'{kind}_top1']):.2f} % | {float(best[f'{kind}_top5']):.2f} %"
    table.append(f"| {best['epoch']} of {len(rows)} | {figures} | {float(best[f'{kind}_loss']):.4f} |")
    picture = f"\n\n![learning curves]({folder.curves.name})" if folder.curves.is_file() else ""
    return "\n".join(table) + picture


def _usage(config: TrainConfig) -> str:
    """Return how to load the model; transformers' pipeline makes every image RGB."""
    mode = _MODES.get(config.model.in_chans, "RGB")
    if mode == "RGB":
        classify = """from transformers import pipeline

classify = pipeline("image-classification", model="FOLDER_OR_REPOSITORY")
print(classify("image.png"))"""
    else:
        classify = f"""from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

processor = AutoImageProcessor.from_pretrained("FOLDER_OR_REPOSITORY")
model = AutoModelForImageClassification.from_pretrained("FOLDER_OR_REPOSITORY").eval()
logits = model(**processor(Image.open("image.png").convert("{mode}"), return_tensors="pt")).logits
print(model.config.id2label[logits.argmax().item()])"""
    return f"""## Use

    pip install vimamba transformers

```python
import timm, vim                       # importing vim makes the model known to timm
{classify}

model = timm.create_model("local-dir:FOLDER", pretrained=True)   # or "hf-hub:OWNER/NAME"
```"""


def _training(folder: RunFolder) -> str:
    """Return the command, the environment and the settings; names of folders stay private."""
    starts: Any = folder.starts()
    last = starts[-1] if starts and isinstance(starts[-1], dict) else {}
    versions = last.get("versions", {})
    facts = [f"Python {last['python']}"] if "python" in last else []
    facts += [f"{name} {versions[name]}" for name in ("torch", "timm", "vimamba") if name in versions]
    settings = "".join(
        line for line in folder.config.read_text(encoding="utf-8").splitlines(keepends=True) if line[0] != "#"
    )
    return f"""## Training

    python -m vim.train --config config.yaml

{", ".join(facts)}. The settings, `config.yaml`:

```yaml
{settings.rstrip()}
```"""
