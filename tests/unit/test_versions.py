"""The list of packages is that of the project's requirements."""

import configparser
import re
from importlib import metadata
from pathlib import Path

from horovod_megdet.versions import MISSING, OPTIONAL, PACKAGES, versions

SETUP = Path(__file__).resolve().parents[2] / "setup.cfg"


def test_every_requirement_is_listed() -> None:
    setup = configparser.ConfigParser()
    setup.read(SETUP)
    lines = setup["options"]["install_requires"].splitlines()
    required = {match[0].lower() for line in lines if (match := re.match(r"[A-Za-z][\w.-]*", line.strip()))}
    assert set(PACKAGES) - set(OPTIONAL) <= required <= set(PACKAGES)


def test_what_is_not_installed_is_missing() -> None:
    assert versions()["torch"] == metadata.version("torch")
    assert versions(("no-such-package",))["no-such-package"] == MISSING
