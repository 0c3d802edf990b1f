"""Files are read as they are, and damage is named with file and line."""

from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import shared_file

from pairtune.data.formats import parse_row
from pairtune.data.sources import BUNDLED_SPLITS, bundled_source, read_rows
from pairtune.errors import BadInput

ROWS = [{"prompt": f"p{n}", "chosen": f"ä{n}", "rejected": "r"} for n in range(3)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def read(path):
    return list(read_rows(str(path), "--data"))


def test_jsonl_gzip_and_parquet_give_the_same_rows(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    expected = list(enumerate(ROWS, 1))
    assert read(tmp_path / "a.jsonl") == read(tmp_path / "a.jsonl.gz") == read(tmp_path / "a.parquet") == expected


def test_byte_order_mark_blank_lines_and_crlf_do_no_harm(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n\r\n"))
    assert read(path) == [(1, ROWS[0]), (3, ROWS[1]), (5, ROWS[2])]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LINES + b'{"prompt": ', r"a\.jsonl:4: is not valid JSON"),
        (LINES + b'{"prompt": "\xff"}\n', r"a\.jsonl:4: is not UTF-8 \(byte 12\)"),
        (b"[" * 100_000, r"a\.jsonl:1: is not valid JSON"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=message):
        read(path)


def test_a_truncated_gzip_is_named_with_its_last_whole_line(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(LINES)[:-12])
    with pytest.raises(BadInput, match=r"a\.jsonl\.gz: damaged after line \d"):
        read(path)


def test_a_gzip_that_is_none_and_a_parquet_that_is_none(tmp_path):
    for name in ("a.jsonl.gz", "a.parquet"):
        (tmp_path / name).write_bytes(b"neither")
        with pytest.raises(BadInput, match=name):
            read(tmp_path / name)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.jsonl", "--data missing.jsonl: no such file"),
        ("bundled:other", "the bundled pairs are bundled:concise"),
        ("bundled:concise@dev", "splits train, validation, test"),
    ],
)
def test_a_source_that_does_not_exist(source, message):
    with pytest.raises(BadInput, match=message):
        read(source)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(BadInput, match=r"only .*\.parquet files are read"):
        read(tmp_path / "a.txt")


def test_a_hub_id_without_a_network_is_one_clear_line():
    with pytest.raises(BadInput, match="--data nobody/nothing@train: neither a file here nor to be had") as caught:
        read("nobody/nothing@train")
    assert "\n" not in str(caught.value)


def test_the_bundled_pairs_are_enough_and_parse():
    sizes = {split: [parse_row(row, "x") for _, row in read(bundled_source(split))] for split in BUNDLED_SPLITS}
    assert sum(map(len, sizes.values())) >= 300
    assert all(len(pairs) >= 50 for pairs in sizes.values())


def test_real_rm_static_rows_are_all_accounted_for():
    rows = read(shared_file("rm_static_test.jsonl.gz"))
    pairs = [parse_row(row, str(number)) for number, row in rows]
    assert len(pairs) == 300
    assert sum(len(pair.prompt) == 1 for pair in pairs) == 81
