"""COCO annotations and image files: what is read, and what is reported about bad ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from horovod_megdet.data.coco import CocoDataset, check_dataset, check_same_classes, load_dataset
from horovod_megdet.data.images import ImageFileError, read_header, read_image
from horovod_megdet.errors import UserError

ORIENTATION = 0x0112
BCCD = Path(__file__).parents[3] / "shared" / "data" / "bccd"

Content = dict[str, Any]


def picture(height: int = 30, width: int = 40) -> Image.Image:
    """A smooth RGB image whose four corners differ."""
    y, x = np.mgrid[:height, :width]
    channels = [x * 255 // width, y * 255 // height, 255 - x * 255 // width]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def annotation(id: int, image: int, box: list[float], category: int = 3, **others: Any) -> Content:
    return {"id": id, "image_id": image, "category_id": category, "bbox": box, **others}


def good_content() -> Content:
    """Three images of 40 x 30; the second has only a crowd region, the third no annotation. Ids with gaps."""
    return {
        "images": [{"id": id, "file_name": f"{id}.png", "width": 40, "height": 30} for id in (7, 2, 90)],
        "annotations": [
            annotation(10, 7, [1, 2, 10, 20], category=9, area=150.0),
            annotation(11, 2, [0, 0, 40, 30], iscrowd=1),
            annotation(5, 7, [30.5, 20.5, 20, 20]),
            annotation(6, 7, [0, 0, 5, 5], iscrowd=1),
        ],
        "categories": [{"id": 9, "name": "dog"}, {"id": 3, "name": "cat"}],
    }


class Folder:
    """A data set on disk."""

    def __init__(self, root: Path) -> None:
        self.annotations = root / "annotations.json"
        self.images = root / "images"
        self.images.mkdir()

    def write(self, content: Content) -> None:
        self.annotations.write_text(json.dumps(content))
        for entry in content["images"]:
            if isinstance(entry, dict) and "file_name" in entry:
                picture().save(self.images / entry["file_name"])

    def load(self, training: bool = True, **options: Any) -> CocoDataset:
        return load_dataset(self.annotations, self.images, training=training, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    written = Folder(tmp_path)
    written.write(good_content())
    return written


def test_training_reads_boxes_without_crowds(folder: Folder) -> None:
    dataset = folder.load()
    assert dataset.image_ids.tolist() == [7]
    assert dataset.category_ids == [3, 9]
    assert dataset.class_names == ["cat", "dog"]
    image, boxes, labels = dataset.read(0)
    assert torch.equal(image, torch.from_numpy(np.array(picture())).permute(2, 0, 1))
    assert boxes.dtype == torch.float32
    assert boxes.tolist() == [[1, 2, 11, 22], [30.5, 20.5, 40, 30]], "clipped to the image"
    assert labels.dtype == torch.int64
    assert labels.tolist() == [2, 1]


def test_empty_images_are_kept_on_request_but_not_those_with_only_crowds(folder: Folder) -> None:
    dataset = folder.load(keep_empty=True)
    assert dataset.image_ids.tolist() == [7, 90]
    _, boxes, labels = dataset.read(1)
    assert boxes.shape == (0, 4)
    assert labels.shape == (0,)


def test_evaluation_keeps_all_images_and_crowds(folder: Folder) -> None:
    dataset = folder.load(training=False)
    assert dataset.image_ids.tolist() == [7, 2, 90]
    assert len(dataset.read(0)[1]) == 3


def test_to_coco_is_what_the_file_says(folder: Folder, capfd: pytest.CaptureFixture[str]) -> None:
    coco = folder.load(training=False).ground_truth.to_coco()
    assert capfd.readouterr().out == ""
    assert sorted(coco.imgs) == [2, 7, 90]
    assert {id: category["name"] for id, category in coco.cats.items()} == {3: "cat", 9: "dog"}
    found = [
        (entry["image_id"], entry["category_id"], entry["bbox"], entry["area"], entry["iscrowd"])
        for entry in coco.loadAnns(coco.getAnnIds(imgIds=[7]))
    ]
    assert found == [
        (7, 9, [1, 2, 10, 20], 150.0, 0),
        (7, 3, [30.5, 20.5, 20, 20], 400.0, 0),
        (7, 3, [0, 0, 5, 5], 25.0, 1),
    ]
    assert 0 not in coco.anns, "to pycocotools a match with annotation 0 is no match"


def test_fingerprint_depends_on_the_data_and_not_on_its_location(folder: Folder, tmp_path: Path) -> None:
    fingerprint = folder.load().fingerprint
    (tmp_path / "other").mkdir()
    other = Folder(tmp_path / "other")
    content = good_content()
    other.write(content)
    assert other.load().fingerprint == fingerprint
    content["annotations"][0]["bbox"][0] += 0.25
    other.write(content)
    assert other.load().fingerprint != fingerprint


BAD_ANNOTATIONS = {
    "zero size": (annotation(20, 7, [1, 2, 0, 5]), "has no area"),
    "negative size": (annotation(20, 7, [1, 2, -3, 5]), "has no area"),
    "too thin to survive float32": (annotation(20, 7, [1, 2, 1e-7, 5]), "has no area"),
    "outside": (annotation(20, 7, [40, 2, 9, 9]), "lies outside the image, which is 40 pixels wide"),
    "above": (annotation(20, 7, [4, -9, 9, 9]), "lies outside the image, which is 30 pixels high"),
    "NaN": (annotation(20, 7, [float("nan"), 2, 5, 5]), "in finite numbers"),
    "infinite": (annotation(20, 7, [1, 2, float("inf"), 5]), "in finite numbers"),
    "huge integer": (annotation(20, 7, [10**400, 2, 5, 5]), "in finite numbers"),
    "three numbers": (annotation(20, 7, [1, 2, 5]), "not [x, y, width, height]"),
    "text box": (annotation(20, 7, "1 2 5 5"), "not [x, y, width, height]"),  # type: ignore[arg-type]
    "NaN area": (annotation(20, 7, [1, 2, 5, 5], area=float("nan")), "area nan is not a finite number"),
    "odd crowd": (annotation(20, 7, [1, 2, 5, 5], iscrowd="yes"), "iscrowd is 'yes'"),
    "unknown category": (annotation(20, 7, [1, 2, 5, 5], category=4), "there is no category 4"),
    "unhashable category": (annotation(20, 7, [1, 2, 5, 5], category=[]), "there is no category []"),  # type: ignore[arg-type]
    "unknown image": (annotation(20, 8, [1, 2, 5, 5]), "there is no image 8"),
    "duplicate id": (
        annotation(10, 7, [1, 2, 5, 5]),
        "annotation 10, image 7 (7.png): duplicate annotation id",
    ),
    "no box": ({"id": 20, "image_id": 7, "category_id": 3}, "entry 4 of `annotations` has no `bbox`"),
    "no object": ("oops", "entry 4 of `annotations` is 'oops', not an object"),
    "text id": (annotation("a", 7, [1, 2, 5, 5]), "has the id 'a', but ids must be integers"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize(("entry", "words"), BAD_ANNOTATIONS.values(), ids=BAD_ANNOTATIONS)
def test_bad_annotation(folder: Folder, entry: Any, words: str) -> None:
    fingerprint = folder.load().fingerprint
    content = good_content()
    content["annotations"].append(entry)
    folder.write(content)
    with pytest.raises(UserError) as caught:
        folder.load()
    assert words in str(caught.value)
    assert "1 problem " in str(caught.value)
    skipped = folder.load(bad="skip")
    assert words in str(skipped.problems[0])
    assert len(skipped.problems) == 1
    assert skipped.fingerprint == fingerprint, "everything else is as if the entry did not exist"


def remove_file(folder: Folder, _: Content) -> None:
    (folder.images / "2.png").unlink()


def empty_file(folder: Folder, _: Content) -> None:
    (folder.images / "2.png").write_bytes(b"")


def text_file(folder: Folder, _: Content) -> None:
    (folder.images / "2.png").write_text("<html>404</html>")


def folder_for_a_file(folder: Folder, _: Content) -> None:
    (folder.images / "2.png").unlink()
    (folder.images / "2.png").mkdir()


def wrong_size(folder: Folder, content: Content) -> None:
    content["images"][1]["width"] = 41


def swapped_size(folder: Folder, content: Content) -> None:
    content["images"][1].update(width=30, height=40)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (remove_file, "no such image file"),
        (empty_file, "not an image"),
        (text_file, "not an image"),
        (folder_for_a_file, "Is a directory"),
        (wrong_size, "(height, width) is (30, 41) in the annotation file and (30, 40) in the image file"),
        (swapped_size, "(height, width) is (40, 30) in the annotation file and (30, 40) in the image file"),
    ],
)
def test_bad_image_is_left_out_with_its_annotations(
    folder: Folder, spoil: Callable[[Folder, Content], None], words: str
) -> None:
    content = good_content()
    spoil(folder, content)
    folder.annotations.write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        folder.load(training=False)
    assert words in str(caught.value)
    assert "image 2 (2.png)" in str(caught.value)
    dataset = folder.load(training=False, bad="skip")
    assert dataset.image_ids.tolist() == [7, 90]
    assert len(dataset.problems) == 1
    assert len(dataset.ground_truth.to_coco().anns) == 3


def test_truncated_file_is_found_by_decoding(folder: Folder) -> None:
    path = folder.images / "2.png"
    path.write_bytes(path.read_bytes()[:-60])
    assert folder.load(check_images="open").problems == []
    assert check_dataset(folder.annotations, folder.images, "open") == []
    with pytest.raises(UserError, match=r"2\.png\): the image cannot be read: "):
        folder.load(check_images="decode")
    assert [problem.image for problem in check_dataset(folder.annotations, folder.images, "decode")] == [2]


@pytest.mark.parametrize(
    ("section", "entry", "words"),
    [
        ("images", {"id": 7, "file_name": "2.png"}, "image 7 (2.png): duplicate image id"),
        ("images", {"id": 4}, "entry 3 of `images` has no `file_name`"),
        ("images", {"id": "4", "file_name": "2.png"}, "has the id '4', but ids must be integers"),
        ("categories", {"id": 3, "name": "bird"}, "duplicate category id 3: 'cat' and 'bird'"),
        ("categories", {"id": 4}, "entry 2 of `categories` has no `name`"),
    ],
)
def test_bad_image_or_category_entry(folder: Folder, section: str, entry: Content, words: str) -> None:
    fingerprint = folder.load(training=False).fingerprint
    content = good_content()
    content[section].append(entry)
    folder.write(content)
    with pytest.raises(UserError) as caught:
        folder.load(training=False)
    assert words in str(caught.value)
    assert folder.load(training=False, bad="skip").fingerprint == fingerprint


def test_error_lists_the_first_problems_and_says_what_to_do(folder: Folder) -> None:
    content = good_content()
    content["annotations"] += [annotation(100 + place, 7, [1, 1, 0, 0]) for place in range(8)]
    folder.write(content)
    with pytest.raises(UserError) as caught:
        folder.load()
    message = str(caught.value)
    assert message.startswith(f"{folder.annotations}: 8 problems")
    assert message.count("has no area") == 5
    assert "... and 3 more" in message
    assert "megdet check-data" in message
    assert "data.bad_annotations: skip" in message
    assert len(check_dataset(folder.annotations, folder.images)) == 8


def test_image_whose_boxes_are_all_bad_does_not_count_as_empty(folder: Folder) -> None:
    content = good_content()
    content["annotations"].append(annotation(30, 90, [1, 1, 0, 0]))
    folder.write(content)
    assert folder.load(bad="skip", keep_empty=True).image_ids.tolist() == [7]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "not a COCO annotation file"),
        ('{"images": [], "annotations": []}', "has no list `categories`"),
        ('{"images": {}, "annotations": [], "categories": []}', "has no list `images`"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', "the list `images` is empty"),
        ("\udcff", "cannot be read"),
    ],
)
def test_unusable_annotation_file(folder: Folder, text: str, words: str) -> None:
    folder.annotations.write_text(text, encoding="utf-8", errors="surrogateescape")
    for bad in ("error", "skip"):
        with pytest.raises(UserError) as caught:
            folder.load(bad=bad)
        assert words in str(caught.value)
        assert str(folder.annotations) in str(caught.value)


def test_missing_file_and_folder(folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.json: no such annotation file"):
        load_dataset(tmp_path / "nothing.json", folder.images, training=True)
    with pytest.raises(UserError, match="nothing: no such image folder"):
        load_dataset(folder.annotations, tmp_path / "nothing", training=True)


def test_nothing_left(folder: Folder) -> None:
    content = good_content()
    content["annotations"] = []
    folder.write(content)
    with pytest.raises(UserError, match=r"no image has annotations; `data\.keep_empty_images: true`"):
        folder.load()
    for path in folder.images.iterdir():
        path.unlink()
    with pytest.raises(UserError, match="no image is left"):
        folder.load(bad="skip")


def test_byte_order_mark_is_no_error(folder: Folder) -> None:
    folder.annotations.write_text(json.dumps(good_content()), encoding="utf-8-sig")
    assert len(folder.load()) == 1


def test_classes_of_both_sets_must_agree(folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    other = Folder(tmp_path / "val")
    content = good_content()
    content["categories"].reverse()
    other.write(content)
    check_same_classes(folder.load(), other.load())
    content["categories"][0]["name"] = "lion"
    other.write(content)
    with pytest.raises(UserError, match="3 'cat' only in the first, 3 'lion' only in the second"):
        check_same_classes(folder.load(), other.load())


def test_classes_with_equal_names_get_their_ids(folder: Folder) -> None:
    content = good_content()
    content["categories"].append({"id": 12, "name": "cat"})
    folder.write(content)
    assert folder.load().class_names == ["cat (3)", "dog", "cat (12)"]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, suffix: str) -> None:
    """The pixels are stored inversely transposed, so that the displayed image is always the same."""
    inverse = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    shown = picture(48, 64)
    stored = shown.transpose(inverse[orientation]) if orientation > 1 else shown
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / f"oriented.{suffix}"
    options = {"quality": 100, "subsampling": 0} if suffix == "jpg" else {"lossless": True} if suffix == "webp" else {}
    stored.save(path, exif=exif, **options)
    assert read_header(path).size == (48, 64)
    assert suffix == "tif" or read_header(path).stored_size == (stored.height, stored.width)
    expected = torch.from_numpy(np.array(shown)).permute(2, 0, 1).int()
    assert (read_image(path).int() - expected).abs().max() <= 4
    assert read_image(path, at_least=(24, 32)).shape == ((3, 24, 32) if suffix == "jpg" else (3, 48, 64))


def test_sizes_may_be_those_of_the_unrotated_file(folder: Folder) -> None:
    """The file has the stored size, 40 x 30; boxes are given on the displayed image, 30 x 40."""
    content = good_content()
    content["annotations"][2]["bbox"] = [20, 30.5, 20, 20]
    folder.write(content)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    picture(30, 40).save(folder.images / "7.png", exif=exif)
    dataset = folder.load()
    assert dataset.sizes.tolist() == [[40, 30]]
    image, boxes, _ = dataset.read(0)
    assert image.shape == (3, 40, 30)
    assert boxes.tolist() == [[1, 2, 11, 22], [20, 30.5, 30, 40]]


KINDS = {
    "gray.png": ("L", 1),
    "bits.png": ("1", 255),
    "palette.png": ("P", 60),
    "palette.gif": ("P", 60),
    "alpha.png": ("RGBA", 1),
    "gray_alpha.png": ("LA", 1),
    "gray.jpg": ("L", 6),
    "cmyk.jpg": ("CMYK", 12),
    "color.jpg": ("RGB", 12),
    "color.webp": ("RGB", 40),
    "color.bmp": ("RGB", 0),
    "color.tif": ("RGB", 0),
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_image(tmp_path: Path, name: str) -> None:
    mode, tolerance = KINDS[name]
    original = picture(48, 64)
    original.convert(mode).save(tmp_path / name)
    pixels = read_image(tmp_path / name)
    assert pixels.dtype == torch.uint8
    assert read_header(tmp_path / name).size == (48, 64)
    expected = original.convert("L").convert("RGB") if mode in ("L", "LA", "1") else original
    difference = (pixels.int() - torch.from_numpy(np.array(expected)).permute(2, 0, 1).int()).abs()
    assert difference.max() <= tolerance


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    values = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    Image.fromarray(values).save(tmp_path / "deep.png")
    pixels = read_image(tmp_path / "deep.png")
    assert torch.equal(pixels, torch.from_numpy((values >> 8).astype(np.uint8)).expand(3, 32, 32))


def test_fast_decoder_gives_pillows_pixels(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (45, 67, 3), dtype=np.uint8)).save(tmp_path / "a.jpg", quality=90)
    with Image.open(tmp_path / "a.jpg") as image:
        expected = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(read_image(tmp_path / "a.jpg"), expected)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.gif", "a.bmp", "a.webp", "a.tif"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_truncated_files_name_themselves(tmp_path: Path, name: str, part: float) -> None:
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(len(content) * part)])
    with pytest.raises(ImageFileError, match=str(tmp_path / name)):
        read_image(tmp_path / name)


@pytest.mark.skipif(not BCCD.is_dir(), reason=f"needs the real data set at {BCCD}")
def test_real_data(tmp_path: Path) -> None:
    annotations, images = BCCD / "annotations" / "instances_train.json", BCCD / "images"
    problems = check_dataset(annotations, images, cache_dir=tmp_path)
    assert problems, "the set is known to have degenerate annotations"
    assert all("has no area" in problem.message for problem in problems)
    with pytest.raises(UserError, match="has no area"):
        load_dataset(annotations, images, training=True, cache_dir=tmp_path)
    dataset = load_dataset(annotations, images, training=True, bad="skip", cache_dir=tmp_path)
    assert len(dataset) == 205
    assert len(dataset.ground_truth.to_coco().anns) == len(json.loads(annotations.read_text())["annotations"]) - len(
        problems
    )
