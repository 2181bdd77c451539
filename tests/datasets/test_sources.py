"""A data set is the files a person would name, with the captions and classes they were given."""

import json
import os
from pathlib import Path

import pytest

from grn_lightning.datasets.sources import SourceFile, list_sources, stable_order


def _tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def test_a_folder_is_searched_and_captions_lie_beside_the_files(tmp_path: Path) -> None:
    files = {
        "b.JPG": "12345",
        "b.txt": "\ufeff a bee\n",
        "a/x.1.png": "",
        "a/x.1.txt": "  \n",
        "a/y.mp4": "123",
        "a/y.txt": "naïve café\nsecond line",
        "alone.txt": "not a caption of anything",
        "table.csv": "",
        ".DS_Store": "",
        "a/._y.mp4": "",
        ".cache/z.png": "",
        "README": "",
    }
    found = list_sources(_tree(tmp_path, files))
    assert found.root == tmp_path
    assert found.files == (
        SourceFile("a/x.1.png", 0),
        SourceFile("a/y.mp4", 3, ("naïve café\nsecond line",)),
        SourceFile("b.JPG", 5, ("a bee",)),
    )
    assert found.left_out == {".txt": 1, ".csv": 1, "": 1}
    assert found.class_names == ()


def test_links_are_followed_once_and_broken_ones_are_kept_for_the_report(tmp_path: Path) -> None:
    root = _tree(tmp_path / "root", {"a/x.png": "1"})
    _tree(tmp_path / "elsewhere", {"y.png": "12"})
    (root / "b").symlink_to(tmp_path / "elsewhere")
    (root / "a" / "loop").symlink_to(root)
    (root / "gone.png").symlink_to(tmp_path / "nowhere.png")
    names = {file.name: file.num_bytes for file in list_sources(root).files}
    assert names == {"a/x.png": 1, "b/y.png": 2, "gone.png": -1}


def test_the_target_is_left_out(tmp_path: Path) -> None:
    _tree(tmp_path, {"a.png": "", "shards/b.png": ""})
    assert [f.name for f in list_sources(tmp_path, skip=tmp_path / "shards").files] == ["a.png"]


def test_folders_are_classes_numbered_by_sorted_name(tmp_path: Path) -> None:
    _tree(tmp_path, {"n02/1.png": "", "n01/sub/2.png": "", "n10/3.png": "", "n01/0.png": ""})
    found = list_sources(tmp_path, classes_from_folders=True)
    assert found.class_names == ("n01", "n02", "n10")
    indices = {file.name: file.class_index for file in found.files}
    assert indices == {"n01/0.png": 0, "n01/sub/2.png": 0, "n02/1.png": 1, "n10/3.png": 2}


def test_folders_named_by_numbers_are_sorted_by_value(tmp_path: Path) -> None:
    _tree(tmp_path, {f"{n}/a.png": "" for n in range(12)})
    found = list_sources(tmp_path, classes_from_folders=True)
    assert found.class_names == tuple(str(n) for n in range(12))


def test_known_classes_keep_their_numbers(tmp_path: Path) -> None:
    _tree(tmp_path, {"cat/1.png": "", "dog/1.png": ""})
    known = ("ant", "cat", "dog")
    found = list_sources(tmp_path, classes_from_folders=True, known_classes=known)
    assert [file.class_index for file in found.files] == [1, 2]
    assert found.class_names == known
    with pytest.raises(
        ValueError, match=r"classes.json has 1 classes but not dog; build the split"
    ):
        list_sources(tmp_path, classes_from_folders=True, known_classes=("cat",))


def test_a_file_without_class_folder_is_refused(tmp_path: Path) -> None:
    _tree(tmp_path, {"cat/1.png": "", "loose.png": ""})
    with pytest.raises(ValueError, match="in the folder of its class, but loose.png do not"):
        list_sources(tmp_path, classes_from_folders=True)


CSV = 'file,caption,class\n./b.png,"one, two",zebra\na.mp4,,ant\n'
TSV = "path\ttext\tlabel\nb.png\tone, two\tzebra\na.mp4\t\tant\n"
JSONL = (
    json.dumps({"image": "b.png", "prompt": "one, two", "cls": "zebra"})
    + "\n\n"
    + json.dumps({"video": "a.mp4", "prompt": None, "cls": "ant"})
)


@pytest.mark.parametrize(("suffix", "text"), [("csv", CSV), ("tsv", TSV), ("jsonl", JSONL)])
@pytest.mark.parametrize("beside", [True, False])
def test_tables_name_files_captions_and_classes(
    tmp_path: Path, suffix: str, text: str, beside: bool
) -> None:
    _tree(tmp_path, {"b.png": "", "a.mp4": "", "a.txt": "from the side", "unnamed.png": ""})
    table = tmp_path / f"table.{suffix}"
    table.write_text(text)
    found = list_sources(tmp_path, captions=table) if beside else list_sources(table)
    assert found.class_names == ("ant", "zebra")
    assert found.files == (
        SourceFile("a.mp4", 0, ("from the side",), 0),
        SourceFile("b.png", 0, ("one, two",), 1),
    )


def test_several_rows_are_several_captions(tmp_path: Path) -> None:
    _tree(tmp_path, {"a.png": "", "t.csv": "file,caption\na.png,first\na.png,second\n"})
    assert list_sources(tmp_path / "t.csv").files[0].captions == ("first", "second")


def test_a_table_may_number_classes_itself(tmp_path: Path) -> None:
    _tree(tmp_path, {"a.png": "", "b.png": "", "t.csv": "file,class\na.png,7\nb.png,10\n"})
    found = list_sources(tmp_path / "t.csv")
    assert [file.class_index for file in found.files] == [7, 10]
    assert found.class_names == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "name,caption\na.png,x\n",
            r"cannot use row 1 of .*t\.csv: no file in file or path .* name",
        ),
        ("file,class\na.png,1\na.png,2\n", r"row 2 .*a\.png gets a second class, 2 after 1"),
        ("file,class\na.png,1\nb.png,\n", r"a class to some files but none to b\.png"),
        ("file\na.png\nnone.png\n", r"names 1 missing files: none\.png"),
        ("file\na.png\nc.bmp\n", r"files of unknown kinds: c\.bmp"),
    ],
)
def test_wrong_tables_are_refused(tmp_path: Path, text: str, message: str) -> None:
    _tree(tmp_path, {"a.png": "", "b.png": "", "c.bmp": "", "t.csv": text})
    with pytest.raises(ValueError, match=message):
        list_sources(tmp_path / "t.csv")


def test_wrong_json_lines_are_refused(tmp_path: Path) -> None:
    _tree(tmp_path, {"a.png": "", "t.jsonl": '{"file": "a.png"}\n["a.png"]\n'})
    with pytest.raises(ValueError, match=r"row 2 of .*t\.jsonl: not a JSON object"):
        list_sources(tmp_path / "t.jsonl")


def test_sources_that_are_none_are_refused(tmp_path: Path) -> None:
    _tree(tmp_path, {"a.bmp": "", "b.bmp": "", "c": ""})
    with pytest.raises(ValueError, match=r"no pictures or videos .*only 2 .bmp, 1 without suffix"):
        list_sources(tmp_path)
    with pytest.raises(ValueError, match="there is no file or folder"):
        list_sources(tmp_path / "none")
    with pytest.raises(ValueError, match="there is no file or folder pipe:cat"):
        list_sources(Path("pipe:cat x.tar"))
    with pytest.raises(ValueError, match="or one table"):
        list_sources(tmp_path / "a.bmp")
    with pytest.raises(ValueError, match="or one table"):
        list_sources(tmp_path, captions=tmp_path)


def test_names_and_captions_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"caption .*a\.txt is not UTF-8"):
        list_sources(tmp_path)
    os.remove(tmp_path / "a.txt")
    os.close(os.open(os.fsencode(tmp_path) + b"/caf\xe9.png", os.O_CREAT))
    with pytest.raises(ValueError, match=r"not UTF-8: 'caf\\udce9\.png'"):
        list_sources(tmp_path)


def test_order_is_mixed_but_stable_when_names_come_or_go() -> None:
    names = [f"{n:03d}" for n in range(200)]
    order = stable_order(names, salt="0")
    assert order != names
    assert order == stable_order(reversed(names), salt="0")
    assert order != stable_order(names, salt="1")
    assert [name for name in order if name != "077"] == stable_order(
        [name for name in names if name != "077"], salt="0"
    )
