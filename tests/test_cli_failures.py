"""How the command lora-fuse fails, warns and is stopped; what a terminal shows."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cli_runs import fail, run, succeed, write_files

import lora_fuse as lf
from lora_fuse.adapters.lora import LoraLayer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ("merge {f}/a {f}/b --method tsne -o {o}", "'tsne'"),
        ("merge {f}/a:heavy -o {o}", "'heavy'"),
        ("merge {f}/a:nan -o {o}", "weights"),
        ("merge {f}/a:inf -o {o}", "weights"),
        ("merge {f}/missing -o {o}", "missing"),
        ("merge {f}/a", "--out"),
        ("merge -o {o}", "ADAPTER"),
        ("merge {f}/a {f}/b --method svd --rank 0 -o {o}", "rank"),
        ("merge {f}/a {f}/b --rank 2 --energy 0.5 -o {o}", "rank, energy"),
        ("merge {f}/a {f}/b -o {f}/a", "apart from the input"),
        ("merge {f}/a {f}/b -o {f}/b/inside", "apart from the input"),
        ("fuse {f}/base {f}/a -o {f}/base --overwrite", "apart from the input"),
        ("fuse {f}/nowhere {f}/a -o {o}", "no such model folder"),
        ("fuse {f}/a {f}/b -o {o}", "adapter"),
        ("fuse {f}/base {f}/a:1e300 -o {o}", "finite"),
        ("fuse {f}/base {f}/a --max-shard-size big -o {o}", "'big' is not a size"),
        ("fuse {f}/base {f}/a --max-shard-size 0 -o {o}", "is not a size"),
        ("fuse {f}/base {f}/a --dtype int8 -o {o}", "int8"),
        ("fuse {f}/base -o {o}", "ADAPTER"),
        ("compress {f}/a -o {o}", "--rank, --energy and --budget"),
        ("compress {f}/a --rank 2 --energy 0.5 -o {o}", "--rank, --energy and --budget"),
        ("compress {f}/a {f}/a --rank 2 -o {o}", "two are called 'a'"),
        ("compress {f}/a --energy 1.5 -o {o}", "energy"),
        ("peru-fft {f}/base sql={f}/tuned1 --density 0 --heads score -o {o}", "density: expected 0 < density <= 1"),
        ("peru-fft {f}/base sql={f}/tuned1 --scope layer -o {o}", "'layer'"),
        ("peru-fft {f}/base sql={f}/tuned1 --merge tsne -o {o}", "'tsne'"),
        ("peru-fft {f}/base sql={f}/tuned1 -o {o}", "has 'score.weight', which the base lacks"),
        ("peru-fft {f}/base sql={f}/tuned1 --heads score --shared nothing -o {o}", "shared: 'nothing' matches no"),
        ("peru-fft {f}/base sql={f}/a -o {o}", "holds a LoRA adapter; expected a whole model"),
        ("peru-fft {f}/base sql={f}/none -o {o}", "no such file or folder"),
        ("peru-fft {f}/none sql={f}/tuned1 -o {o}", "no such file or folder"),
        ("peru-fft {f}/base {f}/tuned1 -o {o}", "write NAME=PATH"),
        ("peru-fft {f}/base ../sql={f}/tuned1 -o {o}", "'../sql' cannot be a task's name"),
        ("peru-fft {f}/base sql={f}/tuned1 sql={f}/tuned2 -o {o}", "two are called 'sql'"),
        ("peru-fft {f}/base sql={f}/tuned1 -o {f}/tuned1/peru", "apart from the input"),
        ("peru-fft {f}/base sql={f}/tuned1", "--out"),
        ("inspect {f}", "choose one of"),
        ("inspect {f}/none", "none"),
        ("inspect {f}/a --model {f}/none", "no such model folder"),
        ("inspect {f}/base/config.json", "config.json"),
        ("explode", "explode"),
    ],
)
def test_bad_input(files: Path, tmp_path: Path, args: str, says: str) -> None:
    before = sorted(str(p) for p in files.rglob("*"))
    assert says in fail(*args.format(f=files, o=tmp_path / "out").split())
    assert list(tmp_path.iterdir()) == []
    assert sorted(str(p) for p in files.rglob("*")) == before


def test_output_that_exists(files: Path, tmp_path: Path) -> None:
    for command in (
        ["merge", files / "a"],
        ["fuse", files / "base", files / "a"],
        ["compress", files / "a", "--rank", 2],
        ["peru-fft", files / "base", f"sql={files / 'tuned1'}", "--heads", "score"],
    ):
        out = tmp_path / command[0]
        succeed(*command, "-o", out)
        before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
        assert "not empty" in fail(*command, "-o", out)
        assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
        succeed(*command, "-o", out, "--overwrite")
    (tmp_path / "peru-fft" / "notes.txt").write_text("mine")
    assert "other things" in fail("merge", files / "a", "-o", tmp_path / "peru-fft", "--overwrite")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "keep.txt").write_text("mine")
    assert "other things" in fail("merge", files / "a", "-o", tmp_path / "notes", "--overwrite")
    assert (tmp_path / "notes" / "keep.txt").read_text() == "mine"


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = run("--debug", "inspect", tmp_path / "none")
    assert isinstance(result.exception, ValueError)


def test_warnings_are_lines_on_stderr(files: Path, tmp_path: Path) -> None:
    shutil.copytree(files / "b", tmp_path / "b")
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    (tmp_path / "b" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "other/base"}))
    result = succeed("merge", files / "a", tmp_path / "b", "-o", tmp_path / "out")
    assert result.stderr.startswith("Warning: ")
    assert "other/base" in result.stderr
    assert "UserWarning" not in result.stderr


def command_line(*args: object) -> list[str]:
    return [sys.executable, "-m", "lora_fuse.cli", *map(str, args)]


def test_progress_bar_on_a_terminal(files: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    command = command_line("fuse", files / "base", files / "a", "-o", tmp_path / "out")
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=theirs) as process:
        os.close(theirs)
        seen = b""
        try:
            while piece := os.read(ours, 4096):
                seen += piece
        except OSError:  # how a terminal ends
            pass
        stdout = process.stdout.read() if process.stdout else b""
    os.close(ours)
    assert process.returncode == 0
    assert b"fuse" in seen
    assert b"\xe2\x94\x81" in seen  # the bar
    assert stdout.count(b"\n") == 1  # only the result


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_in_the_middle(tmp_path: Path, number: signal.Signals) -> None:
    rows, columns = 1 << 17, 1024
    size = rows * columns * 4
    header = json.dumps({"m.weight": {"dtype": "F32", "shape": [rows, columns], "data_offsets": [0, size]}}).encode()
    base = tmp_path / "in" / "base"
    base.mkdir(parents=True)
    with (base / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)  # zeros, sparse on disk
    layer = LoraLayer(torch.ones(4, columns), torch.ones(rows, 4), 1.0)
    lf.LoraAdapter({"m": layer}).save_pretrained(tmp_path / "in" / "a")
    (tmp_path / "results").mkdir()
    command = command_line("fuse", base, tmp_path / "in" / "a", "-o", tmp_path / "results" / "out")
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs inherit it ignored
    )
    with process:
        while process.poll() is None and not any((tmp_path / "results").glob(".out.*.partial/model.safetensors")):
            time.sleep(0.01)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == (143 if number == signal.SIGTERM else 1)
    assert b"Traceback" not in stderr
    assert list((tmp_path / "results").iterdir()) == []
