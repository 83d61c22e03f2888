import json
import sys

import pytest

from diffdistill.data.prompts import read_prompts
from diffdistill.data.tables import read_columns
from diffdistill.errors import UserError

PROMPTS = ["a red fox, asleep", 'a sign that says "open"', "zwölf Boxkämpfer", "two\nlines"]
CSV = 'id,prompt\n1,"a red fox, asleep"\n2,"a sign that says ""open"""\n3,zwölf Boxkämpfer\n4,"two\nlines"\n'
TABLES = {
    "a.csv": CSV,
    "b.CSV": CSV.replace("\n", "\r\n"),
    "a.tsv": 'id\tprompt\n1\ta red fox, asleep\n2\t"a sign that says ""open"""\n3\tzwölf Boxkämpfer\n4\t"two\nlines"\n',
    "a.jsonl": "\n".join(json.dumps({"prompt": prompt, "seed": 3}, ensure_ascii=False) for prompt in PROMPTS) + "\n\n",
    "a.json": json.dumps([{"prompt": prompt} for prompt in PROMPTS]),
    "b.json": json.dumps(PROMPTS),
}


def write(folder, name: str, content: str | bytes):
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder / name


def refused(path, column: str = "prompt") -> str:
    with pytest.raises(UserError) as caught:
        read_prompts(path, column)
    assert str(path) in str(caught.value)
    return str(caught.value).replace(str(path), "FILE")


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "with byte order mark"])
def test_a_text_file_has_one_prompt_a_line_and_blank_lines_do_not_count(tmp_path, mark):
    content = mark + "\n  a cat \r\n\r\n\t\na dog\ra dog\nein Käfer\u2028im Gras".encode()
    assert read_prompts(write(tmp_path, "p.txt", content)) == ["a cat", "a dog", "a dog", "ein Käfer\u2028im Gras"]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "with byte order mark"])
@pytest.mark.parametrize("name", TABLES)
def test_tables_of_every_kind_give_the_same_prompts(tmp_path, name, mark):
    assert read_prompts(write(tmp_path, name, mark + TABLES[name].encode())) == PROMPTS


def test_parquet_gives_the_same_prompts(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "p.parquet"
    parquet.write_table(pyarrow.table({"seed": [1, 2, 3, 4], "prompt": PROMPTS}), path)
    assert read_prompts(path) == PROMPTS
    assert refused(path, "promt") == "FILE has no column 'promt'. Did you mean 'prompt'? Columns: seed, prompt."
    assert refused(path, "seed") == "FILE: 'seed' must be text; row 1 holds 1 (int)."
    path.write_bytes(path.read_bytes()[:-20])
    assert refused(path).startswith("cannot read FILE: ")
    assert refused(tmp_path / "none.parquet") == "no file at FILE. Check the path."


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = write(tmp_path, "p.parquet", b"PAR1")
    assert refused(path) == "reading FILE needs pyarrow: pip install pyarrow. Or save the table as CSV."


def test_another_column_and_several_columns_can_be_read(tmp_path):
    path = write(tmp_path, "p.csv", "file,text,caption\na.png,one,two\n")
    assert read_prompts(path, "caption") == ["two"]
    assert read_columns(path, ["caption", "file"]) == [("two", "a.png")]


def test_files_that_are_not_there_folders_and_unknown_endings_are_refused(tmp_path):
    for name in ("none.txt", "none.csv", "none.json", "none", "no.ending"):
        assert refused(tmp_path / name) == "no file at FILE. Check the path."
    for name in ("folder", "folder.txt", "folder.csv"):
        (tmp_path / name).mkdir()
    assert refused(tmp_path / "folder") == refused(tmp_path / "folder.txt") == "FILE is a folder; give a file of prompts."
    assert refused(tmp_path / "folder.csv") == "FILE is a folder; give a file."
    known = "Known: .txt, .csv, .tsv, .jsonl, .json, .parquet."
    assert refused(write(tmp_path, "p.doc", "a cat")) == f"FILE has an unknown ending. {known}"
    assert refused(write(tmp_path, "p", "a cat")) == f"FILE has an unknown ending. {known}"


@pytest.mark.parametrize("content", ["", "\n \n\t\n", b"\xef\xbb\xbf"])
def test_empty_files_are_refused(tmp_path, content):
    assert refused(write(tmp_path, "p.txt", content)) == "FILE holds no prompts. Write one a line."
    assert refused(write(tmp_path, "p.json", content)) == "FILE is empty."
    assert refused(write(tmp_path, "p.jsonl", content)) == "FILE holds no rows."
    if content != "\n \n\t\n":
        assert refused(write(tmp_path, "p.csv", content)) == "FILE is empty."
    assert refused(write(tmp_path, "head.csv", "id,prompt\n\n")) == "FILE holds no rows."
    assert refused(write(tmp_path, "list.json", "[]")) == "FILE holds no rows."


@pytest.mark.parametrize("name", ["p.txt", "p.csv", "p.jsonl"])
def test_a_file_in_another_encoding_is_refused_naming_line_and_offset(tmp_path, name):
    latin = write(tmp_path, name, "prompt\na cat\nein Käfer\n".encode("latin-1"))
    assert refused(latin) == "FILE is not UTF-8: line 3 has the byte 0xe4 (offset 18). Save the file as UTF-8."
    for form in ("utf-16", "utf-16-be"):
        wide = write(tmp_path, name, (b"" if form == "utf-16" else b"\xfe\xff") + "prompt\na cat\n".encode(form))
        assert refused(wide) == "FILE is UTF-16; save it as UTF-8."
    unmarked = write(tmp_path, name, b"a\n" + "cat".encode("utf-16-le"))
    assert refused(unmarked) == "FILE is not text: line 2 has a zero byte (offset 3). Save it as UTF-8."


def test_a_missing_column_is_refused_with_those_that_exist(tmp_path):
    table = write(tmp_path, "p.csv", "id,Prompt,style\n1,a cat,oil\n")
    assert refused(table) == "FILE has no column 'prompt'. Did you mean 'Prompt'? Columns: id, Prompt, style."
    assert refused(write(tmp_path, "p.tsv", "a,b\n")) == "FILE has no column 'prompt'. Columns: a,b."
    lines = write(tmp_path, "p.jsonl", '{"prompt": "a cat"}\n{"prompts": "a dog", "id": 2}\n')
    assert refused(lines) == "FILE: row 2 has no column 'prompt'. Did you mean 'prompts'? Columns: prompts, id."


def test_a_value_that_is_no_text_is_refused_naming_the_row(tmp_path):
    lines = write(tmp_path, "p.jsonl", '{"prompt": "a cat"}\n\n{"prompt": 12}\n{"prompt": ["x"]}\n')
    assert refused(lines) == "FILE: 'prompt' must be text; row 2 holds 12 (int)."
    mixed = write(tmp_path, "p.json", '[{"prompt": "a cat"}, "a dog", 3]')
    assert refused(mixed) == "FILE: row 3 must be an object with prompt; it is 3."
    blank = write(tmp_path, "b.jsonl", "\n".join(f'{{"prompt": {value}}}' for value in ['"x"', "null", '" "', '""', '"\\n"']))
    assert refused(blank) == "FILE: no text in column 'prompt' of row 2, 3, 4 and 1 more. Fill or remove them."
    cells = write(tmp_path, "b.csv", "id,prompt\n1,a cat\n2,\n")
    assert refused(cells) == "FILE: no text in column 'prompt' of row 2. Fill or remove them."


def test_what_is_not_well_formed_is_refused_naming_the_line(tmp_path):
    comma = write(tmp_path, "p.csv", "id,prompt\n1,a cat\n2,a red fox, asleep\n")
    assert refused(comma) == (
        "FILE: row 2 (line 3) has 3 fields, the header 2. Put text that holds the separator or a line end in double quotes."
    )
    quote = write(tmp_path, "q.csv", 'id,prompt\n1,"a cat\n2,a dog\n')
    assert refused(quote) == "FILE: line 3 is not well-formed: unexpected end of data."
    assert refused(write(tmp_path, "p.jsonl", '{"prompt": "a"}\n{"prompt": \n')).startswith("FILE: line 2 is not JSON: ")
    lines = refused(write(tmp_path, "p.json", '{"prompt": "a"}\n{"prompt": "b"}\n'))
    assert lines.startswith("FILE is not JSON: ") and lines.endswith("One object a line is the format of .jsonl.")
    assert refused(write(tmp_path, "q.json", '{"prompt": "a"}')) == "FILE must hold a list of objects; it holds one dict."
