"""``make bench`` replaces the parts that it measured, and leaves every other word of its files alone."""

from __future__ import annotations

from pathlib import Path

from benchmarks.__main__ import BEGIN, END, PARTS, ROOT, parts_of, write


def test_one_part_is_replaced_and_the_rest_stays(tmp_path: Path) -> None:
    readme, docs = tmp_path / "README.md", tmp_path / "benchmarks.md"
    names = [*PARTS][:3]
    readme.write_text(f"# Before\n\n{BEGIN}\n{END}\n\nafter\n")
    docs.write_text("")
    for name in reversed(names):
        write(readme, docs, name, f"{name} short\n", f"{name} short\n\n{name} long\n")
    write(readme, docs, names[1], "new short\n", "new short\n\nnew long\n")
    text = readme.read_text()
    assert text.startswith(f"# Before\n\n{BEGIN}\n<!-- part: {names[0]} -->\n{names[0]} short\n")
    assert text.endswith(f"{names[2]} short\n{END}\n\nafter\n")
    shown = parts_of(docs.read_text())
    assert list(shown) == names
    assert shown[names[1]] == "new short\n\nnew long\n\n"
    assert shown[names[0]].startswith(f"{names[0]} short\n\n{names[0]} long")


def test_the_files_hold_known_parts_only() -> None:
    for path in (ROOT / "README.md", ROOT / "docs" / "benchmarks.md"):
        assert set(parts_of(path.read_text())) <= set(PARTS)
