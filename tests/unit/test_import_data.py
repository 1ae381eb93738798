"""megdet import-data: five formats become the same COCO JSON; what is bad is told with file and line, and counted."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from annotation_files import WRITERS, write_cvat, write_labelme, write_openimages, write_voc, write_yolo
from PIL import Image

from horovod_megdet.arguments import fractions
from horovod_megdet.cli import main
from horovod_megdet.data.coco import check_dataset, load_dataset
from horovod_megdet.data.importing.formats import AnnotationReader, _parse_xml
from horovod_megdet.data.importing.splitting import split_images
from horovod_megdet.errors import EXIT_USER_ERROR, UserError

BCCD = Path(__file__).parents[3] / "shared" / "data" / "bccd"

Content = dict[str, Any]


def good_content() -> Content:
    """Ten images of 40 x 30, PNG and JPEG; the last one is empty."""
    images, annotations = [], []
    for number in range(10):
        name = f"p{number}.{'png' if number % 2 else 'jpg'}"
        images.append({"id": number, "file_name": name, "width": 40, "height": 30})
        boxes = [] if number == 9 else [[1.5, 2, 10, 20], [20, 5 + number, 20, 15]]
        for index, box in enumerate(boxes):
            category = 1 if index == 0 or number % 3 else 2
            entry = {"id": len(annotations) + 1, "image_id": number, "category_id": category, "bbox": box}
            annotations.append(entry)
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }


def write_images(content: Content, root: Path) -> None:
    (root / "images").mkdir(parents=True)
    for entry in content["images"]:
        Image.new("RGB", (entry["width"], entry["height"]), (90, 120, 40)).save(root / "images" / entry["file_name"])


@pytest.mark.parametrize("encoding", ["gb2312", "shift_jis", "utf-16", "iso-8859-1"])
def test_xml_in_other_encodings_is_read(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.xml"
    name = "café" if encoding == "iso-8859-1" else "山"
    path.write_bytes(f'<?xml version="1.0" encoding="{encoding}"?>\n<a>\n<name>{name}</name></a>'.encode(encoding))
    root, lines = _parse_xml(path)
    assert root.findtext("name") == name
    assert list(lines.values()) == [2, 3]


def test_xml_in_an_unknown_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.xml").write_bytes(b'<?xml version="1.0" encoding="klingon"?><annotation/>')
    reader = AnnotationReader()
    assert list(reader.read(tmp_path / "a.xml")) == []
    assert "the encoding klingon is not known" in reader.bad[0].message


class Import:
    """A data set on disk, and the command that imports it."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.output = root / "source", root / "output"
        self._monkeypatch = monkeypatch

    def write(self, writer: Callable[[Content, Path], None], content: Content | None = None) -> Path:
        content = content or good_content()
        write_images(content, self.root)
        writer(content, self.root)
        return self.root

    def run(self, *arguments: str, source: Path | None = None) -> int:
        command = ["megdet", "import-data", str(source or self.root), "--output", str(self.output), *arguments]
        self._monkeypatch.setattr(sys, "argv", command)
        return main()

    def found(self, part: str = "train") -> dict[str, list[tuple[str, list[float]]]]:
        """The classes and boxes of each image, sorted."""
        content = json.loads((self.output / f"{part}.json").read_text())
        names = {category["id"]: category["name"] for category in content["categories"]}
        files = {image["id"]: image["file_name"] for image in content["images"]}
        found: dict[str, list[tuple[str, list[float]]]] = {name: [] for name in files.values()}
        for entry in content["annotations"]:
            box = [round(value, 6) for value in entry["bbox"]]
            found[files[entry["image_id"]]].append((names[entry["category_id"]], box))
        return {name: sorted(objects) for name, objects in found.items()}


@pytest.fixture
def importing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Import:
    pytest.importorskip("globox", reason="needs globox: pip install 'horovod-megdet[import]'")
    return Import(tmp_path, monkeypatch)


def expected(content: Content) -> dict[str, list[tuple[str, list[float]]]]:
    names = {category["id"]: category["name"] for category in content["categories"]}
    return {
        image["file_name"]: sorted(
            (names[entry["category_id"]], [float(value) for value in entry["bbox"]])
            for entry in content["annotations"]
            if entry["image_id"] == image["id"]
        )
        for image in content["images"]
    }


@pytest.mark.parametrize("format", WRITERS)
def test_every_format_gives_the_same_data(importing: Import, format: str) -> None:
    importing.write(WRITERS[format])
    source = {"cvat": "annotations.xml", "openimages": "boxes.csv", "labelme": "images"}.get(format, "")
    classes = ["--classes", str(importing.root / "classes.csv")] if format == "openimages" else []
    images = ["--images", str(importing.root / "images")]
    assert importing.run("--split", "1", *images, *classes, source=importing.root / source) == 0
    wanted = expected(good_content())
    if format == "openimages":
        del wanted["p9.jpg" if "p9.jpg" in wanted else "p9.png"]  # its CSV does not name empty images
    assert importing.found() == wanted
    assert not check_dataset(importing.output / "train.json", importing.root / "images")
    assert (importing.output / "classes.txt").read_text() == "cat\ndog\n"


@pytest.mark.parametrize("folder", [".", "images", "labels"])
def test_the_output_may_not_be_a_folder_of_the_data_set(
    importing: "Import", capsys: pytest.CaptureFixture[str], folder: str
) -> None:
    importing.write(write_yolo)
    importing.output = importing.root / folder
    before = sorted(importing.root.rglob("*"))
    assert importing.run() == EXIT_USER_ERROR
    assert "Give --output a folder of its own" in capsys.readouterr().err
    assert sorted(importing.root.rglob("*")) == before


def test_the_printed_lines_are_a_configuration_that_check_data_accepts(
    importing: Import, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    importing.write(write_voc)
    assert importing.run() == 0
    printed = capsys.readouterr().out
    lines = printed[printed.index("\ndata:\n") :]
    assert yaml.safe_load(lines)["data"]["train_annotations"] == str(importing.output / "train.json")
    configuration = importing.output / "mine.yaml"
    configuration.write_text(lines)
    monkeypatch.setattr(sys, "argv", ["megdet", "check-data", "--config", str(configuration), "--decode"])
    assert main() == 0
    train, val = importing.found("train"), importing.found("val")
    assert len(train) == 8
    assert train | val == expected(good_content())
    ids = [
        {image["id"] for image in json.loads((importing.output / f"{part}.json").read_text())["images"]}
        for part in ("train", "val")
    ]
    assert not ids[0] & ids[1]


def test_the_summary_counts_and_the_page_shows(importing: Import, capsys: pytest.CaptureFixture[str]) -> None:
    importing.write(write_voc)
    Image.new("RGB", (40, 30)).save(importing.root / "images" / "other.png")
    assert importing.run() == 0
    printed = capsys.readouterr().out

    def row(name: str) -> list[str]:
        line = next(line for line in printed.splitlines() if line.startswith(f"│ {name} "))
        return [cell.strip() for cell in line.strip("│").split("│")[1:]]

    assert row("images") == ["8", "2"]
    assert sum(map(int, row("  without objects"))) == 1
    assert sum(map(int, row("objects"))) == 18
    cats = [int(re.match(r"\d+", cell)[0]) for cell in row("cat")]  # type: ignore[index]
    dogs = [int(re.match(r"\d+", cell)[0]) for cell in row("dog")]  # type: ignore[index]
    assert (sum(cats), sum(dogs)) == (15, 3)
    assert row("height of images: 5 %, median, 95 %") == ["30, 30, 30"] * 2
    assert "1 image file without annotations left out." in printed
    page = (importing.output / "images.html").read_text()
    assert page.count("<figure>") == 10
    assert page.count("data:image/png;base64,") == 10


def test_the_same_seed_splits_alike(importing: Import) -> None:
    importing.write(write_voc)
    results = []
    for seed in ("3", "3", "4"):
        assert importing.run("--seed", seed, "--split", "0.5,0.5") == 0
        results.append((importing.output / "train.json").read_text())
    assert results[0] == results[1] != results[2]


def replace(path: str, old: str, new: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        text = (root / path).read_text()
        assert old in text
        (root / path).write_text(text.replace(old, new, 1))

    return change


VOC_BOX = "Annotations/p0.xml"
BAD_INPUT: dict[str, tuple[Callable[[Content, Path], None], Callable[[Path], None], str, str]] = {
    "VOC: outside": (
        write_voc,
        replace(VOC_BOX, "<xmin>1.5</xmin>", "<xmin>41</xmin>"),
        "p0.xml:7: this object has no usable box and label: `xmax` must be greater than `xmin`",
        "objects without a usable box (1)",
    ),
    "VOC: right of the image": (
        write_voc,
        lambda root: (
            replace(VOC_BOX, "<xmin>1.5</xmin>", "<xmin>41</xmin>")(root),
            replace(VOC_BOX, "<xmax>11.5</xmax>", "<xmax>50</xmax>")(root),
        )[0],
        "p0.xml:7: the box [41.0, 2.0, 50.0, 22.0] (x1, y1, x2, y2) lies outside its image, which is 40 x 30 pixels",
        "boxes outside their image (1)",
    ),
    "VOC: other size": (
        write_voc,
        replace(VOC_BOX, "<width>40</width>", "<width>80</width>"),
        "p0.xml: the image is 80 x 30 pixels in the annotations, and 40 x 30 pixels in",
        "images of another size (1)",
    ),
    "VOC: no number": (
        write_voc,
        replace(VOC_BOX, "<xmin>1.5</xmin>", "<xmin>left</xmin>"),
        "p0.xml:7: this object has no usable box and label",
        "objects without a usable box (1)",
    ),
    "VOC: no box": (
        write_voc,
        replace(VOC_BOX, "<bndbox>", "<other>"),
        "p0.xml:",
        "annotations that cannot be read (1)",
    ),
    "VOC: missing image": (
        write_voc,
        lambda root: (root / "images/p0.jpg").unlink(),
        "p0.xml: there is no image 'p0.jpg' in ",
        "missing images (1)",
    ),
    "VOC: damaged image": (
        write_voc,
        lambda root: (root / "images/p0.jpg").write_text("<html>404</html>") and None,
        "p0.jpg: not an image, or damaged at its beginning",
        "image files that cannot be read (1)",
    ),
    "VOC: annotated twice": (
        write_voc,
        replace("Annotations/p2.xml", "p2.jpg", "p0.jpg"),
        "p2.xml: the image p0.jpg has annotations in ",
        "images of one name (1)",
    ),
    "VOC: not XML": (
        write_voc,
        replace(VOC_BOX, "</size>", ""),
        "p0.xml:25: not valid XML: mismatched tag",
        "annotations that cannot be read (1)",
    ),
    "YOLO: unknown class": (
        write_yolo,
        replace("labels/p0.txt", "1 0.75", "7 0.75"),
        "p0.txt:2: unknown class '7'; known are 0, 1",
        "unknown classes (1)",
    ),
    "YOLO: pixels": (
        write_yolo,
        replace("labels/p0.txt", "0 0.1625", "0 6.5"),
        "p0.txt:1: the box [255.0, ",
        "boxes outside their image (1)",
    ),
    "YOLO: four numbers": (
        write_yolo,
        lambda root: (root / "labels/p0.txt").write_text("\n0 0.5 0.5 0.1\n") and None,
        "p0.txt:2: this object has no usable box and label: Syntax error",
        "objects without a usable box (1)",
    ),
    "YOLO: not a number": (
        write_yolo,
        lambda root: (root / "labels/p0.txt").write_text("0 0.5 0.5 0.1 nan\n") and None,
        "p0.txt:1: this object has no usable box and label",
        "objects without a usable box (1)",
    ),
    "YOLO: two images of one name": (
        write_yolo,
        lambda root: Image.new("RGB", (40, 30)).save(root / "images/p0.png"),
        "p0.txt: 2 image files could be 'p0': p0.jpg, p0.png",
        "images of one name (1)",
    ),
    "LabelMe: a circle": (
        write_labelme,
        replace("images/p0.json", '"rectangle"', '"circle"'),
        "p0.json, shape 2: a circle; only rectangles and polygons are read",
        "objects without a usable box (1)",
    ),
    "LabelMe: not JSON": (
        write_labelme,
        lambda root: (root / "images/p0.json").write_text('{"shapes":\n') and None,
        "p0.json:2: not valid JSON: Expecting value",
        "annotations that cannot be read (1)",
    ),
    "CVAT: a polygon": (
        write_cvat,
        replace("annotations.xml", "<box ", '<polygon points="1,2;3,4;5,1" label="cat" /><box '),
        "annotations.xml:5: a polygon; only boxes are read from CVAT files",
        "objects without a usable box (1)",
    ),
    "CVAT: rotated": (
        write_cvat,
        replace("annotations.xml", "<box ", '<box rotation="30.5" '),
        "annotations.xml:5: this object has no usable box and label: it is rotated by 30.5 degrees",
        "objects without a usable box (1)",
    ),
    "OpenImages: missing image": (
        write_openimages,
        lambda root: (root / "images/p1.png").unlink(),
        "boxes.csv:4: there is no image 'p1' in ",
        "missing images (1)",
    ),
    "OpenImages: unknown class": (
        write_openimages,
        replace("boxes.csv", "/m/dog", "/m/bird"),
        "boxes.csv:3: unknown class '/m/bird'; known are /m/cat, /m/dog",
        "unknown classes (1)",
    ),
}


@pytest.mark.parametrize(("writer", "change", "sentence", "counted"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_told_and_skipped(
    importing: Import,
    capsys: pytest.CaptureFixture[str],
    writer: Callable[[Content, Path], None],
    change: Callable[[Path], None],
    sentence: str,
    counted: str,
) -> None:
    change(importing.write(writer))
    classes = ["--classes", str(importing.root / "classes.csv")] if writer is write_openimages else []
    source = importing.root / "boxes.csv" if writer is write_openimages else None
    assert importing.run(*classes, source=source) == EXIT_USER_ERROR
    told = capsys.readouterr().err
    assert sentence in told
    assert not (importing.output / "train.json").exists()
    assert sentence in (importing.output / "bad.txt").read_text()
    assert importing.run("--skip-bad", "--split", "1", *classes, source=source) == 0
    assert f"Left out: {counted}; {importing.output / 'bad.txt'} lists all of it." in capsys.readouterr().out
    found, wanted = importing.found(), expected(good_content())
    assert all(objects == wanted[name] for name, objects in found.items() if name not in ("p0.jpg", "p2.jpg"))
    assert found.get("p0.jpg") != [], "its objects are not known: it must not count as an image without any"


def test_an_image_of_only_bad_objects_is_left_out(importing: Import) -> None:
    importing.write(write_yolo)
    (importing.root / "labels" / "p0.txt").write_text("9 0.5 0.5 0.1 0.1\n")
    (importing.root / "labels" / "p1.txt").write_bytes(b"\xff\xfe\x00")
    assert importing.run("--skip-bad", "--split", "1") == 0
    assert set(expected(good_content())) - set(importing.found()) == {"p0.jpg", "p1.png"}


def test_boxes_are_clipped_to_their_image(importing: Import, capsys: pytest.CaptureFixture[str]) -> None:
    importing.write(write_voc)
    replace(VOC_BOX, "<xmin>1.5</xmin>", "<xmin>-3</xmin>")(importing.root)
    assert importing.run("--split", "1") == 0
    assert "1 of the boxes clipped to the edge of the image." in capsys.readouterr().out
    assert ("cat", [0, 2, 11.5, 20]) in importing.found()["p0.jpg"]


def test_a_mixed_folder_needs_a_format(importing: Import, capsys: pytest.CaptureFixture[str]) -> None:
    importing.write(write_voc)
    for path in (importing.root / "Annotations").iterdir():
        path.with_suffix(".txt").write_text("0 0.5 0.5 0.1 0.1\n")
    assert importing.run() == EXIT_USER_ERROR
    told = capsys.readouterr().err
    assert "files of several formats: 10 .txt (" in told or "files of several formats: 10 .xml (" in told
    assert "--format voc or cvat or yolo" in told
    assert importing.run("--format", "voc", "--split", "1") == 0
    assert importing.found() == expected(good_content())


def test_voc_and_cvat_in_one_folder_need_a_format(importing: Import, capsys: pytest.CaptureFixture[str]) -> None:
    importing.write(write_voc)
    write_cvat(good_content(), importing.root / "Annotations")
    assert importing.run() == EXIT_USER_ERROR
    assert "files of several formats: " in capsys.readouterr().err
    assert importing.run("--format", "cvat", "--split", "1") == 0
    assert importing.found() == expected(good_content())


def test_files_of_one_name_in_two_folders_are_told_apart_by_their_place(importing: Import) -> None:
    content = good_content()
    for number, folder in enumerate(("a", "b")):
        root = importing.root / folder
        write_images({**content, "images": [content["images"][0]]}, root)
        (root / "labels").mkdir()
        (root / "labels" / "p0.txt").write_text(f"{number} 0.5 0.5 0.5 0.5\n")
    (importing.root / "classes.txt").write_text("cat\ndog\n")
    assert importing.run("--split", "1") == 0
    assert importing.found() == {
        "a/images/p0.jpg": [("cat", [10, 7.5, 20, 15])],
        "b/images/p0.jpg": [("dog", [10, 7.5, 20, 15])],
    }


def test_folders_of_annotations_and_images_are_alike(importing: Import) -> None:
    content = good_content()
    for folder in ("a", "b"):
        write_images(content, importing.root / folder)
        write_voc(content, importing.root / folder)
        for kind, images in (("Annotations", "Annotations"), ("images", "JPEGImages")):
            (importing.root / images).mkdir(exist_ok=True)
            (importing.root / folder / kind).rename(importing.root / images / folder)
    assert importing.run("--split", "1") == 0
    wanted = expected(content)
    assert importing.found() == {f"{folder}/{name}": wanted[name] for folder in ("a", "b") for name in wanted}


def test_groups_of_openimages_are_crowds(importing: Import) -> None:
    importing.write(write_openimages)
    text = (importing.root / "boxes.csv").read_text().splitlines()
    (importing.root / "boxes.csv").write_text("\n".join([text[0], text[1][:-1] + "1", *text[2:]]))
    assert importing.run("--split", "1", source=importing.root / "boxes.csv") == 0
    crowd = [entry["iscrowd"] for entry in json.loads((importing.output / "train.json").read_text())["annotations"]]
    assert crowd == [1] + 17 * [0]


def test_yolo_without_names_is_an_error(importing: Import, capsys: pytest.CaptureFixture[str]) -> None:
    importing.write(write_yolo)
    (importing.root / "data.yaml").unlink()
    assert importing.run() == EXIT_USER_ERROR
    assert "YOLO files number the classes. Name them: --classes FILE" in capsys.readouterr().err


def test_a_csv_of_something_else_is_an_error(importing: Import, capsys: pytest.CaptureFixture[str]) -> None:
    importing.write(lambda _, root: (root / "list.csv").write_text("a,b\n1,2\n") and None)
    assert importing.run() == EXIT_USER_ERROR
    assert "list.csv:1: not OpenImages' boxes: there is no column ImageID" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0.8,0.3", "a", "1,0", "0.25,0.25,0.25,0.25", "0.5,nan"])
def test_a_wrong_split_is_an_error(text: str, importing: Import, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        importing.run("--split", text)
    assert "is not one to three numbers above 0 with a sum of 1" in capsys.readouterr().err


def test_split_keeps_proportions_and_sizes() -> None:
    generator = np.random.default_rng(0)
    frequencies = np.array([0.9, 0.5, 0.1, 0.02, 0.01])
    present = generator.random((1000, 5)) < frequencies
    parts = split_images(present, fractions("0.7,0.2,0.1"), seed=1)
    assert [len(part) for part in parts] == [700, 200, 100]
    assert sorted(np.concatenate(parts)) == list(range(1000))
    counts = np.array([present[part].sum(axis=0) for part in parts])
    wanted = np.outer([0.7, 0.2, 0.1], present.sum(axis=0))
    assert np.abs(counts - wanted).max() <= 2, "a random split is off by 10 and more for frequent classes"
    assert counts[:, 4].all(), "also the rarest class is in every part"


def test_split_of_too_few_images_is_an_error() -> None:
    with pytest.raises(UserError, match="one part would get none of the 3 images"):
        split_images(np.ones((3, 1), bool), (0.9, 0.1), seed=0)


def test_a_missing_package_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "globox", None)
    (tmp_path / "a.xml").write_text("<annotation/>")
    assert Import(tmp_path, monkeypatch).run(source=tmp_path / "a.xml") == EXIT_USER_ERROR
    sentence = "error: megdet import-data needs the package globox: pip install 'horovod-megdet[import]'.\n"
    assert capsys.readouterr().err == sentence


@pytest.mark.skipif(not BCCD.is_dir(), reason=f"no blood cells in {BCCD}")
@pytest.mark.parametrize("format", ["voc", "yolo"])
def test_real_photos(importing: Import, format: str, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads((BCCD / "annotations" / "instances_train.json").read_text())
    importing.root.mkdir()
    WRITERS[format](content, importing.root)
    images = ("--images", str(BCCD / "images"))
    assert importing.run(*images, "--split", "1") == EXIT_USER_ERROR
    told = capsys.readouterr().err
    assert importing.run(*images, "--split", "1", "--skip-bad") == 0
    ours = load_dataset(importing.output / "train.json", BCCD / "images", training=True)
    theirs = load_dataset(
        BCCD / "annotations" / "instances_train.json",
        BCCD / "images",
        training=True,
        bad="skip",
        cache_dir=importing.output,
    )
    assert f"boxes without area ({len(theirs.problems)}):" in told
    boxes = {}
    for name, dataset in (("ours", ours), ("theirs", theirs)):
        found = dataset.ground_truth
        classes = np.array(found.class_names)[found.labels - 1]
        files = np.repeat(found.file_names, np.diff(found.first_box))
        rows = zip(files.tolist(), classes.tolist(), found.boxes.round(3).tolist(), strict=True)
        boxes[name] = sorted((file, label, *box) for file, label, box in rows)
    assert boxes["ours"] == boxes["theirs"]
    assert len(boxes["ours"]) > 2000
