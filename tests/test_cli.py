"""The command lora-fuse on real files: what it writes, and what it says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from checkpoint_models import LLAMA, assert_same_state, load, peft_merged, peft_model
from cli_runs import fail, run, succeed, write_files
from safetensors.torch import load_file, save_file

import lora_fuse as lf
from lora_fuse import cli
from lora_fuse._terminal import SizeType, Spec, parse_spec, size_text
from lora_fuse.compress import joint, peru_fft, peru_lora
from lora_fuse.merging.methods import METHODS

COMMANDS = ["inspect", "merge", "fuse", "compress", "joint-compress", "peru-fft", "demo", "extract", "bench"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.mark.parametrize("command", [[], *([c] for c in COMMANDS)], ids=str)
def test_help_shows_an_example(command: list[str]) -> None:
    text = succeed(*command, "--help").stdout
    example = text[text.index("Example:") :]
    assert re.search(rf"^    lora-fuse {' '.join(command)}", example, re.MULTILINE)


def test_every_command_is_there_and_the_version() -> None:
    assert sorted(cli.main.commands) == sorted(COMMANDS)
    assert succeed("--version").stdout == f"lora-fuse, version {lf.__version__}\n"
    assert set(cli.merge.METHODS) == set(METHODS) - {"regmean"}  # which needs Gram matrices
    assert get_args(joint.Form) == cli.joint.FORMS
    assert get_args(peru_lora.Spread) == cli.compress.PERU_LORA_SPREADS
    assert (cli.compress.PERU_MERGES, cli.compress.PERU_SCOPES) == (peru_fft.MERGES, peru_fft.SCOPES)


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("loras/sql", Spec("loras/sql", None)),
        ("loras/sql:0.7", Spec("loras/sql", 0.7)),
        ("loras/sql:-1e-1", Spec("loras/sql", -0.1)),
        ("owner/name:2", Spec("owner/name", 2.0)),
        (r"C:\loras\sql", Spec(r"C:\loras\sql", None)),
        (r"C:\loras\sql:0.5", Spec(r"C:\loras\sql", 0.5)),
        ("a:b:0.5", Spec("a:b", 0.5)),
        (":0.5", Spec(":0.5", None)),
    ],
)
def test_adapter_and_weight(text: str, spec: Spec) -> None:
    assert parse_spec(text) == spec


def test_a_path_that_ends_like_a_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "epoch:3").mkdir()
    assert parse_spec("epoch:3") == Spec("epoch:3", None)
    assert parse_spec("epoch:3:0.5") == Spec("epoch:3", 0.5)


def test_sizes() -> None:
    def read(text: str) -> int:
        return SizeType().convert(text, None, None)

    assert [read(t) for t in ("5GB", "1.5 mb", "2KiB", "7")] == [5 * 10**9, 1_500_000, 2048, 7]
    assert [size_text(n) for n in (0, 999, 1000, 2_660_368, 10**13)] == [
        "0 B",
        "999 B",
        "1.00 kB",
        "2.66 MB",
        "10.00 TB",
    ]


def test_inspect_adapter(files: Path) -> None:
    facts = json.loads(succeed("inspect", files / "head", "--json").stdout)
    adapter = lf.load_adapter(files / "head")
    assert facts["format"] == "PEFT"
    assert facts["base_model"] == str(files / "base")
    assert (facts["ranks"], facts["scalings"]) == ({"4": 4}, {"2.0": 4})
    assert facts["targets"] == {"q_proj": 2, "v_proj": 2}
    assert (facts["parameters"], facts["bytes"]) == (adapter.num_parameters(), adapter.nbytes)
    assert facts["heads"] == {"lm_head.weight": [64, 32]}
    table = succeed("inspect", files / "head").stdout
    assert "q_proj (2), v_proj (2)" in table
    assert "lm_head.weight 64x32" in table


def test_inspect_model(files: Path) -> None:
    facts = json.loads(succeed("inspect", files / "base", "--json").stdout)
    model = load(LLAMA, files / "base")
    assert facts["kind"] == "model"
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert len(facts["files"]) > 2
    assert facts["dtypes"] == {"F32": facts["tensors"]}
    assert "LlamaForCausalLM" in succeed("inspect", files / "base").stdout


@pytest.fixture
def kohya(files: Path, tmp_path: Path) -> Path:
    tensors = {}
    for path, layer in lf.load_adapter(files / "a").layers.items():
        stem = f"lora_unet_{path.replace('.', '_')}"
        tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"] = layer.lora_a, layer.lora_b
        tensors[f"{stem}.alpha"] = torch.tensor(float(layer.scaling * layer.rank))
    save_file(tensors, tmp_path / "k.safetensors")
    return tmp_path / "k.safetensors"


def test_kohya_file(files: Path, kohya: Path, tmp_path: Path) -> None:
    assert "without the model" in fail("inspect", kohya)
    facts = json.loads(succeed("inspect", kohya, "--model", files / "base", "--json").stdout)
    assert (facts["format"], facts["layers"]) == ("kohya", 4)
    succeed("fuse", files / "base", kohya, "-o", tmp_path / "k")
    succeed("fuse", files / "base", files / "a", "-o", tmp_path / "a")
    assert_same_state(load(LLAMA, tmp_path / "k").state_dict(), load(LLAMA, tmp_path / "a").state_dict())


def test_inspect_tells_what_a_strict_reader_refuses(files: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(files / "a", tmp_path / "odd")
    config = json.loads((tmp_path / "odd" / "adapter_config.json").read_text())
    (tmp_path / "odd" / "adapter_config.json").write_text(json.dumps({**config, "use_novelty": True}))
    facts = json.loads(succeed("inspect", tmp_path / "odd", "--json").stdout)
    assert "use_novelty" in facts["warnings"][0]
    assert "use_novelty" in fail("merge", tmp_path / "odd", "-o", tmp_path / "out")


def test_fuse_equals_peft(files: Path, tmp_path: Path) -> None:
    result = succeed("fuse", files / "base", files / "a", "-o", tmp_path / "out")
    assert_same_state(load(LLAMA, tmp_path / "out").state_dict(), peft_merged(LLAMA, files / "base", files / "a"))
    assert result.stderr == ""  # no bar and no spinner where there is no terminal
    assert result.stdout.startswith(f"{tmp_path / 'out'}: 4 of ")


def test_fuse_options(files: Path, tmp_path: Path) -> None:
    options = ["--dtype", "bf16", "--max-shard-size", "10KB", "--rounding", "stochastic", "--seed", 3]
    succeed("fuse", files / "base", f"{files / 'a'}:0.5", files / "b", "-o", tmp_path / "out", *options)
    facts = json.loads(succeed("inspect", tmp_path / "out", "--json").stdout)
    assert facts["dtypes"] == {"BF16": facts["tensors"]}
    assert len(facts["files"]) > 3
    ours, base = load(LLAMA, tmp_path / "out").state_dict(), load(LLAMA, files / "base").state_dict()
    path = "model.layers.1.self_attn.v_proj"
    exact = base[f"{path}.weight"]
    for name, weight in (("a", 0.5), ("b", 1.0)):
        exact = exact + weight * lf.load_adapter(files / name).delta(path)
    torch.testing.assert_close(ours[f"{path}.weight"], exact, rtol=2**-7, atol=1e-7)


def test_merge_writes_what_the_library_merges(files: Path, tmp_path: Path) -> None:
    result = succeed("merge", f"{files / 'a'}:0.7", f"{files / 'b'}:-0.3", "-o", tmp_path / "out")
    expected = lf.merge([lf.load_adapter(files / n) for n in "ab"], [0.7, -0.3])
    written = lf.load_adapter(tmp_path / "out")
    for path, layer in expected.layers.items():
        assert torch.equal(written.delta(path), layer.product())
    assert "energy" not in result.stdout  # exact
    assert result.stderr == ""
    assert peft_model(LLAMA, files / "base", tmp_path / "out") is not None


def test_merge_says_what_truncation_kept(files: Path, tmp_path: Path) -> None:
    out = succeed("merge", files / "a", files / "b", "--method", "svd", "--rank", 3, "-o", tmp_path / "out").stdout
    adapters = [lf.load_adapter(files / n) for n in "ab"]
    merged = lf.load_adapter(tmp_path / "out")
    kept, total, worst = 0.0, 0.0, {}
    for path in merged.layers:
        exact = sum(a.layers[path].product(torch.float64) for a in adapters)
        squares = torch.linalg.svdvals(exact).square()
        kept, total = kept + float(squares[:3].sum()), total + float(squares.sum())
        worst[path] = float(squares[:3].sum() / squares.sum())
    path = min(worst, key=lambda p: worst[p])
    assert f"energy kept {kept / total:.2%}, relative error {(1 - kept / total) ** 0.5:.3g}" in out
    assert f"worst layer {worst[path]:.2%} ({path})" in out


def test_merge_uniform_and_heads(files: Path, tmp_path: Path) -> None:
    succeed("merge", files / "a", files / "b", "--method", "uniform", "--dtype", "bf16", "-o", tmp_path / "u")
    adapter = lf.load_adapter(tmp_path / "u")
    assert {t.dtype for t in adapter.tensors()} == {torch.bfloat16}
    assert "uniform" in fail("merge", f"{files / 'a'}:2", "--method", "uniform", "-o", tmp_path / "v")
    assert "modules_to_save" in fail("merge", files / "head", files / "head", "-o", tmp_path / "v")
    succeed("merge", files / "head", files / "head", "--modules-to-save", "average", "-o", tmp_path / "v")
    saved = [lf.load_adapter(p).modules_to_save["lm_head"]["weight"] for p in (tmp_path / "v", files / "head")]
    torch.testing.assert_close(*saved)


@pytest.mark.parametrize("option", [["--rank", "2"], ["--energy", "0.8"], ["--budget", "50%"]], ids=str)
def test_compress(files: Path, tmp_path: Path, option: list[str]) -> None:
    result = succeed("compress", files / "a", files / "b", *option, "-o", tmp_path / "out")
    key = option[0].removeprefix("--")
    value: Any = {"rank": 2, "energy": 0.8, "budget": 0.5}[key]
    expected = lf.peru_lora({n: files / n for n in "ab"}, **{key: value})
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a", "b"]
    for name, adapter in expected.items():
        written = lf.load_adapter(tmp_path / "out" / name)
        assert all(torch.equal(written.delta(p), layer.product()) for p, layer in adapter.layers.items())
        assert f"{expected.report.adapters[name].energy:.2%}" in result.stdout
    assert f"{expected.report.energy:.2%}" in result.stdout


def test_joint_compress(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "bank"
    given = [files / "a", files / "b", "--rank", 5, "--form", "diagonal", "--clusters", 2, "--seed", 1]
    result = succeed("joint-compress", *given, "-o", out)
    adapters = {name: lf.load_adapter(files / name) for name in "ab"}
    expected = lf.joint_compress(adapters, 5, 2, "diagonal", seed=1)
    written = lf.load_joint(out)
    for name, adapter in expected.adapters.items():
        assert all(torch.equal(core, written.adapters[name].cores[path]) for path, core in adapter.cores.items())
        assert f"{expected.report.error_of(name):.2%}" in result.stdout
    shown = succeed("inspect", out).stdout
    assert "joint bank" in shown
    assert f"{expected.report.error:.2%}" in shown
    facts = json.loads(succeed("inspect", out, "--json").stdout)
    assert facts["adapters"]["a"]["relative_error"] == pytest.approx(expected.report.error_of("a"))
    assert "not empty" in fail("joint-compress", *given, "-o", out)
    succeed("joint-compress", *given, "-o", out, "--overwrite")
    assert "two are called 'a'" in fail("joint-compress", files / "a", files / "a", "-o", tmp_path / "x")
    assert "rank: expected" in fail("joint-compress", files / "a", "--rank", 0, "-o", tmp_path / "x")
    assert not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match="holds a joint bank"):
        lf.attach(torch.nn.Linear(2, 2), {"a": out})


def test_peru_fft(files: Path, tmp_path: Path) -> None:
    out, tasks = tmp_path / "peru", {"sql": files / "tuned1", "math": files / "tuned2"}
    given = [f"{name}={path}" for name, path in tasks.items()]
    options = ["--density", "0.05", "--merge", "ties", "--scaling", "0.9", "--trim", "0.3", "--scope", "row"]
    patterns = ["--exclude", "*norm*", "--exclude", "model.embed_tokens", "--shared", "*.0.mlp", "--heads", "score"]
    result = succeed("peru-fft", files / "base", *given, *options, *patterns, "-o", out)
    expected = lf.peru_fft(
        files / "base",
        tasks,
        density=0.05,
        merge="ties",
        scaling=0.9,
        trim=0.3,
        scope="row",
        exclude=["*norm*", "model.embed_tokens"],
        shared="*.0.mlp",
        heads="score",
    )
    written = lf.load_peru(out)
    assert written.report == expected.report
    for task in (None, *tasks):
        got, want = written.state_dict(task), expected.state_dict(task)
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in want)
    assert load_file(out / "merged.safetensors").keys() == expected.merged.keys()
    lines = [line.split() for line in result.stdout.splitlines()]
    for line, (name, task) in zip(lines[1:3], expected.report.tasks.items(), strict=True):
        assert line[:4] == [name, f"{task.kept:,}", f"{task.entries:,}", f"{task.energy:.2%}"]
        assert " ".join(line[4:6]) == size_text(task.nbytes)
    assert lines[3][0] == "merged"
    assert f"{out}" in result.stdout
    assert "3 shared (" in result.stdout
    assert "1 head (score.weight)" in result.stdout
    facts = json.loads(succeed("inspect", out, "--json").stdout)
    assert (facts["kind"], facts["bytes"]) == ("PERU", expected.report.nbytes)
    assert facts["settings"] == expected.settings
    assert facts["tasks"]["math"]["heads"] == {"score.weight": [3, 4]}
    assert facts["tasks"]["sql"]["kept"] == expected.adapters["sql"].nnz
    shown = succeed("inspect", out).stdout
    assert f"{expected.report.tasks['sql'].energy:.2%}" in shown
    (out / "merged.safetensors").write_bytes(b"x" * 100)
    assert "merged.safetensors" in fail("inspect", out)


def test_demo_gets_its_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lora_fuse.demo

    calls: list[tuple[Path, dict]] = []
    monkeypatch.setattr(lora_fuse.demo, "run", lambda out, **options: calls.append((out, options)))
    succeed("demo", "-o", tmp_path, "--quick")
    succeed("demo")
    assert calls == [
        (tmp_path, {"data": None, "quick": True}),
        (Path("lora_fuse_demo"), {"data": None, "quick": False}),
    ]

    def broken(out: Path, **options: Any) -> None:
        raise RuntimeError("the demo needs peft")

    monkeypatch.setattr(lora_fuse.demo, "run", broken)
    assert fail("demo", code=1) == "Error: the demo needs peft\n"


def test_bench_runs_the_repositorys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lf, "__file__", str(tmp_path / "lora_fuse" / "__init__.py"))
    assert "come with the repository" in fail("bench")
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").touch()  # a package, so that no other of the name comes first
    script = "import sys; open('args.txt', 'w').write(' '.join(sys.argv[1:])); sys.exit(3)"
    (tmp_path / "benchmarks" / "bench_multi_lora.py").write_text(script)
    assert run("bench", "--quick").exit_code == 3
    assert (tmp_path / "args.txt").read_text() == "--quick"
