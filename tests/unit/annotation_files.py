"""Data sets in the formats that `megdet import-data` reads, written for its tests from a COCO JSON."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, ElementTree, SubElement, indent

import yaml

Content = dict[str, Any]


def objects_of(content: Content) -> list[tuple[Content, list[tuple[str, list[float]]]]]:
    """Each image with the names and boxes (x1, y1, x2, y2) of its objects."""
    names = {category["id"]: category["name"] for category in content["categories"]}
    found: dict[int, list[tuple[str, list[float]]]] = {image["id"]: [] for image in content["images"]}
    for entry in content["annotations"]:
        x, y, width, height = entry["bbox"]
        found[entry["image_id"]].append((names[entry["category_id"]], [x, y, x + width, y + height]))
    return [(image, found[image["id"]]) for image in content["images"]]


def write_voc(content: Content, root: Path) -> None:
    """``Annotations/*.xml``, as labelImg writes them."""
    for image, objects in objects_of(content):
        node = Element("annotation")
        SubElement(node, "filename").text = image["file_name"]
        size = SubElement(node, "size")
        for side in ("width", "height"):
            SubElement(size, side).text = str(image[side])
        for name, corners in objects:
            item = SubElement(node, "object")
            SubElement(item, "name").text = name
            box = SubElement(item, "bndbox")
            for side, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True):
                SubElement(box, side).text = str(value)
        path = root / "Annotations" / f"{Path(image['file_name']).stem}.xml"
        path.parent.mkdir(parents=True, exist_ok=True)
        indent(node)
        ElementTree(node).write(path)


def write_yolo(content: Content, root: Path) -> None:
    """``labels/*.txt`` and ``data.yaml``, as Ultralytics has them: none for an image without objects."""
    names = [category["name"] for category in content["categories"]]
    (root / "data.yaml").write_text(yaml.safe_dump({"nc": len(names), "names": dict(enumerate(names))}))
    (root / "labels").mkdir()
    for image, objects in objects_of(content):
        lines = []
        for name, (x1, y1, x2, y2) in objects:
            width, height = image["width"], image["height"]
            values = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
            lines.append(f"{names.index(name)} {' '.join(map(str, values))}\n")
        if lines:
            (root / "labels" / f"{Path(image['file_name']).stem}.txt").write_text("".join(lines))


def write_labelme(content: Content, root: Path) -> None:
    """A JSON beside each image; the first object of each is a polygon, the others are rectangles."""
    for image, objects in objects_of(content):
        shapes = []
        for number, (name, (x1, y1, x2, y2)) in enumerate(objects):
            points = [[x1, y1], [x2, y2]] if number else [[x1, y1], [x2, (y1 + y2) / 2], [(x1 + x2) / 2, y2]]
            shapes.append({"label": name, "points": points, "shape_type": "rectangle" if number else "polygon"})
        path = root / "images" / image["file_name"]
        sides = {"imageWidth": image["width"], "imageHeight": image["height"]}
        entry = {"shapes": shapes, "imagePath": f"..\\images\\{path.name}", "imageData": None, **sides}
        path.with_suffix(".json").write_text(json.dumps(entry))


def write_cvat(content: Content, root: Path) -> None:
    """``annotations.xml`` of `CVAT for images 1.1`."""
    node = Element("annotations")
    SubElement(node, "version").text = "1.1"
    for image, objects in objects_of(content):
        sides = {side: str(image[side]) for side in ("width", "height")}
        entry = SubElement(node, "image", {"name": image["file_name"], **sides})
        SubElement(entry, "tag", {"label": "daylight"})
        for name, corners in objects:
            box = dict(zip(("xtl", "ytl", "xbr", "ybr"), map(str, corners), strict=True))
            SubElement(entry, "box", {"label": name, **box})
    indent(node)
    ElementTree(node).write(root / "annotations.xml")


def write_openimages(content: Content, root: Path) -> None:
    """``boxes.csv`` and ``classes.csv``, with the columns of OpenImages V4 and labels like `/m/cat`."""
    with (root / "boxes.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["ImageID", "Source", "LabelName", "Confidence", "XMin", "XMax", "YMin", "YMax", "IsGroupOf"])
        for image, objects in objects_of(content):
            for name, (x1, y1, x2, y2) in objects:
                width, height = image["width"], image["height"]
                coordinates = (x1 / width, x2 / width, y1 / height, y2 / height)
                rows.writerow([Path(image["file_name"]).stem, "xclick", f"/m/{name}", 1, *coordinates, 0])
    lines = [f"/m/{category['name']},{category['name']}\n" for category in content["categories"]]
    (root / "classes.csv").write_text("".join(lines))


WRITERS: dict[str, Callable[[Content, Path], None]] = {
    "voc": write_voc,
    "yolo": write_yolo,
    "labelme": write_labelme,
    "cvat": write_cvat,
    "openimages": write_openimages,
}
