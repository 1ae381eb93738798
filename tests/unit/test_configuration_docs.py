"""docs/configuration.md is what config.py says."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
import write_configuration_docs as docs
from pydantic import Field

from horovod_megdet.config import Config, section_type


def test_the_page_is_up_to_date() -> None:
    assert docs.PAGE.read_text(encoding="utf-8") == docs.page(), "run python scripts/write_configuration_docs.py"


def test_every_key_has_one_whole_row() -> None:
    for name in Config.model_fields:
        section = section_type(name)
        rows = [line for line in docs.section(name, section).splitlines() if line.startswith("| `")]
        assert [row.split("`")[1] for row in rows] == list(section.model_fields)
        for row in rows:
            cells = row.replace("\\|", "").strip("| ").split(" | ")
            assert len(cells) == 4, row
            assert all(cells), row


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (int, "whole number"),
        (Annotated[int, Field(gt=0)], "whole number > 0"),
        (Annotated[float, Field(ge=0, lt=1)], "number ≥ 0, < 1"),
        (Annotated[int, Field(gt=0)] | None, "whole number > 0 or `null`"),
        (Literal["world"] | Annotated[int, Field(gt=0)], "`world` or whole number > 0"),
        (Literal["a", "b"], "`a`, `b`"),
        (tuple[Annotated[float, Field(gt=0)], ...], "list of numbers > 0"),
        (bool, "`true`, `false`"),
        (str, "text"),
    ],
)
def test_types_are_put_in_words(annotation: object, words: str) -> None:
    assert docs.allowed(annotation, []) == words


def test_check_fails_on_a_page_that_is_out_of_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(docs, "PAGE", tmp_path / "configuration.md")
    monkeypatch.setattr("sys.argv", ["write_configuration_docs.py", "--check"])
    assert docs.main() == 1
    assert "is not up to date: run python scripts/write_configuration_docs.py" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["write_configuration_docs.py"])
    assert docs.main() == 0
    monkeypatch.setattr("sys.argv", ["write_configuration_docs.py", "--check"])
    assert docs.main() == 0
    docs.PAGE.write_text(docs.page() + "\n", encoding="utf-8")
    assert docs.main() == 1
