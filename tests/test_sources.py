"""Sources are found, files are read unchanged, and damage is reported with file and row."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import shared_file
from hypothesis import given
from hypothesis import strategies as st

from pairtune.config import SourceConfig
from pairtune.data import row_files
from pairtune.data.preference import BadRow
from pairtune.data.row_parser import parse_row
from pairtune.data.sources import BUNDLED_SPLITS, bundled_source, open_source
from pairtune.errors import BadInput

ROWS = [{"prompt": f"p{n}, with a comma", "chosen": f'ä{n}\n"quoted"', "rejected": "r"} for n in range(3)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
ARRAY = json.dumps(ROWS, ensure_ascii=False, indent=1).encode()


def csv_bytes(rows):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def zstd(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def rows_of(source, limit=None):
    return list(open_source(SourceConfig(source=str(source)), "--data").rows(limit))


def read(path):
    return [(row.number, row.content) for row in rows_of(path)]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_row_without_end_does_not_fill_the_memory(tmp_path, monkeypatch, name, ending):
    """Sixteen million characters in a file of a few hundred bytes, read with a limit of a sixteenth of that."""
    monkeypatch.setattr(row_files, "_LARGEST_ROW", 1 << 20)
    long = b"x" * (1 << 24)
    content = {
        "a.jsonl": LINES + b'{"prompt": "' + long + b'"}\n' + LINES,
        "a.json": ARRAY[:-2] + b', "' + long + b'"]',
        "a.csv": csv_bytes(ROWS) + b'"' + long + b'",b,c\n',
    }[name]
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstd}[ending]
    path = write(tmp_path / (name + ending), pack(content))
    tracemalloc.start()
    try:
        if name == "a.jsonl":
            rows = read(path)
            assert [number for number, _ in rows] == [1, 2, 3, 4, 5, 6, 7]
            assert isinstance(rows[3][1], BadRow)
            assert "is longer than" in str(rows[3][1])
        else:
            with pytest.raises(BadInput, match=r"row 4: .*is longer than"):
                read(path)
        assert tracemalloc.get_traced_memory()[1] < 12 << 20
    finally:
        tracemalloc.stop()


def test_long_rows_of_parquet_do_not_fill_the_memory(tmp_path, monkeypatch):
    """One row of many is left out alone; a file whose rows are too long on average is refused before it is unpacked."""
    monkeypatch.setattr(row_files, "_LARGEST_ROW", 1 << 20)
    texts = ["a", "x" * (1 << 21), *"bcdefgh"]
    table = pa.table({"prompt": texts, "chosen": ["a"] * 9, "rejected": ["b"] * 9})
    pq.write_table(table, tmp_path / "one.parquet", compression="zstd")
    rows = read(tmp_path / "one.parquet")
    assert [number for number, _ in rows] == list(range(1, 10))
    assert [number for number, row in rows if isinstance(row, BadRow)] == [2]
    assert "is longer than" in str(rows[1][1])
    pq.write_table(
        pa.table({"prompt": ["x" * (1 << 24)] * 4}), tmp_path / "all.parquet", compression="zstd", use_dictionary=False
    )
    assert (tmp_path / "all.parquet").stat().st_size < 10_000
    with pytest.raises(BadInput, match=r"all.parquet: an average row of row group 1 is longer than"):
        read(tmp_path / "all.parquet")


def test_a_text_that_is_stored_once_is_not_unpacked_for_every_row(tmp_path, monkeypatch):
    """A thousand rows of 2 MB each in a file of a few KB."""
    monkeypatch.setattr(row_files, "_LARGEST_ROW", 1 << 22)
    stored = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), pa.array(["x" * (1 << 21)]))
    pq.write_table(pa.table({"prompt": stored}), tmp_path / "a.parquet", compression="zstd", store_schema=False)
    usual = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(usual)
    pa.set_memory_pool(pool)
    try:
        rows = iter(rows_of(tmp_path / "a.parquet"))
        for _ in range(100):
            assert len(next(rows).content["prompt"]) == 1 << 21
        assert 30 << 20 < pool.max_memory() < 200 << 20
    finally:
        pa.set_memory_pool(usual)


def test_a_cell_of_parquet_that_is_not_utf8_is_one_bad_row(tmp_path):
    texts = pa.array([b"good", b"\xff\xfe", b"fine"], pa.binary()).view(pa.string())
    table = pa.table({"prompt": texts, "chosen": texts, "rejected": ["a", "b", "c"]})
    pq.write_table(table, tmp_path / "a.parquet")
    rows = read(tmp_path / "a.parquet")
    assert [number for number, _ in rows] == [1, 2, 3]
    assert isinstance(rows[1][1], BadRow)
    assert "is not UTF-8 (byte 1)" in str(rows[1][1])
    assert rows[2][1]["prompt"] == "fine"


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize(("name", "content"), [("a.jsonl", LINES), ("a.json", ARRAY), ("a.csv", csv_bytes(ROWS))])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name, content, ending):
    packed = {"": content, ".gz": gzip.compress(content), ".zst": zstd(content)}[ending]
    assert read(write(tmp_path / (name + ending), packed)) == list(enumerate(ROWS, 1))


def test_parquet_gives_the_same_rows(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == list(enumerate(ROWS, 1))


def test_json_lines_under_the_name_json_are_read_as_lines(tmp_path):
    assert read(write(tmp_path / "a.json", LINES)) == list(enumerate(ROWS, 1))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_byte_order_mark_and_crlf_do_no_harm(tmp_path, name):
    plain = [{"prompt": "p", "chosen": "c", "rejected": "r"}] * 2
    content = {
        "a.jsonl": "".join(json.dumps(row) + "\n" for row in plain).encode(),
        "a.json": json.dumps(plain, indent=1).encode(),
        "a.csv": csv_bytes(plain).replace(b"\r\n", b"\n"),
    }[name]
    path = write(tmp_path / name, b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n"))
    assert [row for _, row in read(path)] == plain


def test_blank_lines_are_no_rows_but_count_as_lines(tmp_path):
    path = write(tmp_path / "a.jsonl", LINES.replace(b"\n", b"\n\n"))
    assert [number for number, _ in read(path)] == [1, 3, 5]


def test_a_limit_reads_no_further(tmp_path):
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(LINES)[:-12])  # damaged at its end
    assert len(rows_of(path, limit=1)) == 1


@pytest.mark.parametrize(
    ("line", "reason", "message"),
    [
        (b'{"prompt": \n', "not valid JSON", "is not valid JSON"),
        (b'{"prompt": "\xff"}\n', "not UTF-8", r"is not UTF-8 \(byte 13\)"),
        (b"[" * 100_000 + b"\n", "not valid JSON", "is not valid JSON"),
    ],
)
def test_a_damaged_line_is_a_bad_row_in_its_place(tmp_path, line, reason, message):
    (*_, (number, fault), (after, row)) = read(write(tmp_path / "a.jsonl", LINES + line + LINES.split(b"\n")[0]))
    assert (number, after, row) == (4, 5, ROWS[0])
    assert isinstance(fault, BadRow)
    assert fault.reason == reason
    with pytest.raises(BadRow, match=message):
        parse_row(fault, "a.jsonl:4")


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"a,b\n1,2,3\n4,5\n", "too many cells"), (b"a,b\n1\n4,5\n", "too few cells")],
)
def test_a_csv_row_with_other_cells_than_the_header_is_a_bad_row(tmp_path, content, reason):
    (_, fault), (_, row) = read(write(tmp_path / "a.csv", content))
    assert (fault.reason, row) == (reason, {"a": "4", "b": "5"})


def test_csv_that_is_not_utf_8_is_refused_row_by_row(tmp_path):
    (_, row), _ = read(write(tmp_path / "a.csv", b"prompt,chosen,rejected\np,\xff,r\np,c,r\n"))
    with pytest.raises(BadRow, match="not valid Unicode"):
        parse_row(row, "a.csv:1")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", ARRAY[:-3], r"a\.json: row 3: is not valid JSON"),
        ("a.json", ARRAY[:-1], r"a\.json: row 3: is not valid JSON \(a comma or \] is missing"),
        ("a.json", ARRAY.replace(b"},", b"}"), r"a\.json: row 1: is not valid JSON \(a comma or \] is missing"),
        ("a.json", b" [ ", r"a\.json: ends after row 0 without a closing \]"),
        ("a.json", b"[1, 2, x]", r"a\.json: row 3: is not valid JSON"),
        ("a.json", b'["\xff"]', r"a\.json: is not UTF-8"),
        ("a.csv", b'a,b\n1,"2\n', r"a\.csv: row 1: is not valid CSV"),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)[:-12], r"a\.jsonl\.gz: damaged after row \d"),
        ("a.csv.zst", zstd(csv_bytes(ROWS))[:-9], r"a\.csv\.zst: damaged after row \d"),
        ("a.json.gz", gzip.compress(ARRAY, mtime=0)[:-12], r"a\.json\.gz: damaged after row \d"),
        ("a.jsonl.gz", b"neither", r"a\.jsonl\.gz: damaged after row 0"),
        ("a.parquet", b"neither", r"a\.parquet: cannot be read as Parquet"),
    ],
)
def test_damage_that_hides_the_rows_behind_it_stops(tmp_path, name, content, message):
    with pytest.raises(BadInput, match=message) as caught:
        read(write(tmp_path / name, content))
    assert "\n" not in str(caught.value)


def test_an_empty_file_has_no_rows(tmp_path):
    for name in ("a.jsonl", "a.json", "a.csv"):
        assert read(write(tmp_path / name, b"")) == []
    assert read(write(tmp_path / "b.json", b" [ ] ")) == []


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_row_of_ten_megabytes_is_a_row(tmp_path, name):
    big = [{"prompt": "p" * 10_000_000, "chosen": "c", "rejected": "r"}, ROWS[0]]
    content = {
        "a.jsonl": "\n".join(map(json.dumps, big)).encode(),
        "a.json": json.dumps(big).encode(),
        "a.csv": csv_bytes(big),
    }[name]
    assert [row for _, row in read(write(tmp_path / name, content))] == big


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(st.lists(json_values, max_size=6), st.booleans(), st.integers(1, 40))
def test_an_array_gives_back_what_was_written_whatever_the_block_size(tmp_path_factory, values, escaped, block):
    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_text(json.dumps(values, ensure_ascii=escaped), encoding="utf-8", errors="surrogatepass")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_files, "_BLOCK", block)
        try:
            assert read(path) == list(enumerate(values, 1))
        except BadInput as error:  # a lone surrogate that was not escaped is no UTF-8
            assert "is not UTF-8" in str(error) and not escaped


def test_a_folder_is_its_files_in_name_order_and_a_split_is_a_word_of_their_names(tmp_path):
    line = [json.dumps(row).encode() + b"\n" for row in ROWS]
    write(tmp_path / "train-00001-of-00002.jsonl", line[1])
    write(tmp_path / "train-00000-of-00002.jsonl", line[0])
    write(tmp_path / "more" / "test.jsonl.gz", gzip.compress(line[2]))
    write(tmp_path / ".cache" / "old.jsonl", line[2])
    write(tmp_path / "dataset_info.json", b"{}")
    write(tmp_path / "README.md", b"#")
    assert [row.content for row in rows_of(tmp_path)] == [ROWS[2], ROWS[0], ROWS[1]]
    assert [row.content for row in rows_of(f"{tmp_path}@train")] == ROWS[:2]
    (test,) = rows_of(f"{tmp_path}@test")
    assert (test.file, test.number) == (str(tmp_path / "more" / "test.jsonl.gz"), 1)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.jsonl", "--data missing.jsonl: no such file or folder"),
        ("./missing", "--data ./missing: no such file or folder"),
        ("bundled:other", "the bundled pairs are bundled:concise"),
        ("bundled:concise@dev", "splits train, validation, test"),
        ("empty", r"--data empty: no \.jsonl, \.json, \.csv, \.parquet file in this folder"),
        ("full@dev", r"--data full@dev: no file in this folder is named after the split dev \(found a\.csv\)"),
        ("full/a.csv@train", "a file has no splits; omit @train"),
        ("./full/a.csv@train", "a file has no splits; omit @train"),
        ("~no such person/a.csv", "--data ~no such person/a.csv: no such file or folder"),
        ("a.txt", r"only .*\.parquet files can be read"),
        ("a.parquet.gz", r"only .*\.parquet files can be read"),
        ("what is this?", "neither a file nor a Hub id"),
    ],
)
def test_a_source_that_does_not_exist(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write(tmp_path / "full" / "a.csv", csv_bytes(ROWS))
    write(tmp_path / "a.txt", b"text")
    write(tmp_path / "a.parquet.gz", b"text")
    with pytest.raises(BadInput, match=message):
        rows_of(source)


def test_a_hub_id_without_a_network_is_one_clear_line():
    with pytest.raises(
        BadInput, match="--data nobody/nothing@train: not a local file, and cannot be loaded from the Hub"
    ) as caught:
        rows_of("nobody/nothing@train")
    assert "\n" not in str(caught.value)


def test_a_hub_id_names_subset_split_and_revision():
    hub = open_source(SourceConfig(source="org/name.x:sub/set@train_prefs#refs/pr/1"), "--data").hub
    assert (hub.name, hub.subset, hub.split, hub.revision) == ("org/name.x", "sub/set", "train_prefs", "refs/pr/1")
    assert open_source(SourceConfig(source="imdb"), "--data").hub.split == "train"


def test_the_fingerprint_is_of_the_bytes(tmp_path):
    path = write(tmp_path / "a.jsonl", LINES)
    first = open_source(SourceConfig(source=str(path)), "--data").fingerprint()
    write(path, LINES.replace(b"p1", b"q1"))
    assert open_source(SourceConfig(source=str(path)), "--data").fingerprint() != first


def test_the_bundled_pairs_are_enough_and_parse():
    sizes = {
        split: [parse_row(row.content, "x") for row in open_source(bundled_source(split), "--data").rows()]
        for split in BUNDLED_SPLITS
    }
    assert sum(map(len, sizes.values())) >= 300
    assert all(len(pairs) >= 50 for pairs in sizes.values())


def test_real_rm_static_rows_are_all_accounted_for():
    rows = read(shared_file("rm_static_test.jsonl.gz"))
    pairs = [parse_row(row, str(number)) for number, row in rows]
    assert len(pairs) == 300
    assert sum(len(pair.prompt) == 1 for pair in pairs) == 81
