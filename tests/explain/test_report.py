"""`python -m vim.report`: one file with everything in it, right figures, and nothing of a hostile name executed."""

from __future__ import annotations

import base64
import io
import re
import shutil
from html.parser import HTMLParser

import pytest
from PIL import Image

from tests.tiny_runs import TINY_MODEL, tiny_config, write_image_folder
from vim import report
from vim.inference.validation import ValidateOptions, class_table, validate
from vim.training.run_folder import RunFolder
from vim.training.trainer import Trainer

VOID = {"meta", "img"}


class Page(HTMLParser):
    """The pictures, texts and open elements of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.pictures: list[str] = []
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.seen.add(tag)
        for name, value in attributes:
            assert name not in ("href", "srcset"), "nothing is fetched"
            assert not name.startswith("on"), "nothing runs"
            if name == "src":
                self.pictures.append(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "run"
    Trainer(tiny_config(data__dataset="digits", model__args=TINY_MODEL), RunFolder(path)).fit()
    return path


@pytest.fixture(scope="module")
def text(run):
    assert report.main([str(run), "--device", "cpu"]) == 0
    return (run / "report.html").read_text(encoding="utf-8")


def test_everything_is_in_the_file(text):
    page = Page(text)
    assert page.open == []
    assert "script" not in page.seen
    assert not re.search(r"https?://", re.sub(r"<pre>.*</pre>", "", text, flags=re.S))
    assert len(page.pictures) == 2 + 2 * 12, "curves, confusion, and twelve mistakes with their maps"
    for picture in page.pictures:
        head, data = picture.split(",", 1)
        assert head == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            image.load()
    assert len(text) < 3 * 2**20


def test_figures_are_those_of_an_evaluation(run, text, tmp_path):
    validation = validate(ValidateOptions(source=str(run), output=tmp_path, device="cpu"))
    assert f"<dd>{validation.result.top1:.2f} %</dd>" in text
    assert f"<dd>{validation.result.count:,}</dd>" in text
    rows = re.findall(r'<tr><td>(\d)</td><td class="number">(\d+)</td><td class="number">([\d.]+) %</td>', text)
    expected = {row["class"]: (str(row["images"]), f"{row['top1']:.1f}") for row in class_table(validation)}
    assert {name: (images, share) for name, images, share in rows} == expected
    shares = [float(share) for *_, share in rows]
    assert shares == sorted(shares), "the worst class comes first"


def test_figures_are_those_of_the_run_in_its_precision(tmp_path):
    folder = RunFolder(tmp_path / "run")
    best = Trainer(tiny_config(precision="bfloat16", data__dataset="digits"), folder).fit()
    assert report.main([str(folder.path), "--device", "cpu"]) == 0
    assert f"<dd>{best['top1']:.2f} %</dd>" in folder.report.read_text(encoding="utf-8")


def test_images_that_cannot_be_read_are_counted(tmp_path):
    images = write_image_folder(tmp_path / "images", ["cat", "dog"], {"train": 8, "val": 3})
    (images / "val" / "cat" / "1.jpg").write_text("not an image")
    folder = RunFolder(tmp_path / "run")
    Trainer(tiny_config(data__dataset="folder", data__path=str(images), model__in_chans=3), folder).fit()
    assert report.main([str(folder.path), "--device", "cpu"]) == 0
    written = folder.report.read_text(encoding="utf-8")
    assert "<dt>held-out images</dt><dd>5</dd>" in written
    assert "<dt>could not be read</dt><dd>1</dd>" in written


def test_mistakes_come_from_the_surest(text):
    shares = [int(share) for share in re.findall(r"taken for \d \((\d+) %\)</figcaption>", text)]
    assert len(shares) == 12
    assert shares == sorted(shares, reverse=True)
    for label, guess in re.findall(r"<figcaption>(\d), taken for (\d) ", text):
        assert label != guess


def test_names_are_text(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "run")
    Trainer(tiny_config(model__num_classes=2), folder).fit()
    hostile = "<script>alert(1)</script>"
    monkeypatch.setattr("vim.explain.classifier_report.describe_classes", lambda names: [hostile, *names[1:]])
    assert report.main([str(folder.path), "--output", str(tmp_path / "r.html"), "--device", "cpu"]) == 0
    written = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<script" not in written
    assert "&lt;script&gt;" in written
    assert not (folder.path / "report.html").exists()


def test_bad_input(tmp_path, capsys):
    assert report.main([str(tmp_path / "none")]) == 2
    assert "vim.report: run must be the folder of a training run, got" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert report.main([str(tmp_path / "empty")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("summary", [b"a,b\n1,2\n", b"epoch,seconds,images_per_second\n1,2\n", b"\xff\x00"])
def test_a_damaged_summary_is_named(run, tmp_path, summary, capsys):
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    (moved / "summary.csv").write_bytes(summary)
    assert report.main([str(moved), "--device", "cpu"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"vim.report: {moved / 'summary.csv'} is not the summary that vim.train wrote")


def test_settings_that_are_not_utf_8_are_shown(run, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    with (moved / "config.yaml").open("ab") as file:
        file.write(b"# \xff")
    assert report.main([str(moved), "--device", "cpu"]) == 0
    assert "# \\xff" in (moved / "report.html").read_text(encoding="utf-8")
