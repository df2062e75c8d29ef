"""The installed project: a wheel contains the configuration and the plugin, and both are found from any folder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

from tests.conftest import REPO


def test_wheel_contains_conf_and_runs_without_the_clone(tmp_path: Path) -> None:
    build = ["uv", "build", "--quiet", "--wheel", "--out-dir", str(tmp_path / "dist"), str(REPO)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    expected = {"cifar_exp/conf/config.yaml", "cifar_exp/conf/model/convnet.yaml", "hydra_plugins/cifar_exp_study.py"}
    assert expected <= names
    assert not any(name.startswith(("tests/", "data/", "outputs/")) for name in names)
    where = "import cifar_exp.config.reading as c; print(c.conf_dir())"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "check": True}
    shown = subprocess.run([sys.executable, "-c", where], **options)  # type: ignore[call-overload]
    assert shown.stdout.strip() == str(tmp_path / "site" / "cifar_exp" / "conf")
    shown = subprocess.run([sys.executable, "-m", "cifar_exp", "--cfg", "job", "model.width=8"], **options)  # type: ignore[call-overload]
    assert "width: 8" in shown.stdout
