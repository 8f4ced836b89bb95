//! A workload from a file: rows in Mooncake's JSONL format and kvd's own recordings (`kvd_tiers::lab::trace`), and Azure's CSV (`azure`), which names no blocks.
//!
//! Owns the reader of plain and gzipped files, and errors that name line and field.
//! Invariant: a `Row` that was read is in limits, and its timestamps never run backwards within a file.
//! Leaves to others: what a block contains (`content`), what is done with a row (`engine::serve`).

mod azure;

use flate2::read::GzDecoder;
use kvd_tiers::lab::trace::LINE_BYTES_MAX;
pub(crate) use kvd_tiers::lab::trace::Row;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

/// Rows of one file. At the limit: the file is refused; give `--limit`.
pub(crate) const ROWS_MAX: usize = 10_000_000;

/// Reads at most `limit` rows of `block_tokens`-token blocks from a `.jsonl` or `.csv` file, plain or `.gz`.
pub(crate) fn read_file(path: &Path, block_tokens: u64, limit: usize) -> Result<Vec<Row>, String> {
    let named = |error: String| format!("{}: {error}", path.display());
    let file = File::open(path).map_err(|error| named(error.to_string()))?;
    let gzipped = path.extension().is_some_and(|extension| extension == "gz");
    let reader: Box<dyn Read> = if gzipped { Box::new(GzDecoder::new(file)) } else { Box::new(file) };
    let reader = BufReader::new(reader);
    let format = if gzipped { path.file_stem().map(Path::new) } else { Some(path) };
    if format.and_then(Path::extension).is_some_and(|extension| extension == "csv") {
        let mut azure = azure::Lines::default();
        read_lines(reader, block_tokens, limit, |line| azure.row(line, block_tokens)).map_err(named)
    } else {
        read(reader, block_tokens, limit).map_err(named)
    }
}

/// Reads Mooncake's rows.
fn read(reader: impl BufRead, block_tokens: u64, limit: usize) -> Result<Vec<Row>, String> {
    read_lines(reader, block_tokens, limit, |line| Row::parse(line).map(Some))
}

/// Reads the rows that `parse` finds in lines; errors start with the line's number.
fn read_lines(
    mut reader: impl BufRead,
    block_tokens: u64,
    limit: usize,
    mut parse: impl FnMut(&str) -> Result<Option<Row>, String>,
) -> Result<Vec<Row>, String> {
    let mut rows = Vec::new();
    let (mut line, mut number, mut last_ms) = (String::new(), 0_u64, 0);
    while rows.len() < limit.min(ROWS_MAX) {
        line.clear();
        number += 1;
        let bytes = (&mut reader).take(LINE_BYTES_MAX as u64).read_line(&mut line);
        let bytes = bytes.map_err(|error| format!("line {number}: {error}"))?;
        if bytes == 0 {
            break;
        }
        if bytes == LINE_BYTES_MAX && !line.ends_with('\n') {
            return Err(format!("line {number}: longer than {LINE_BYTES_MAX} bytes"));
        }
        if line.trim().is_empty() {
            continue;
        }
        let row = parse(line.trim_end()).map_err(|error| format!("line {number}: {error}"))?;
        let Some(row) = row else { continue };
        row.check(block_tokens, last_ms).map_err(|error| format!("line {number}: {error}"))?;
        last_ms = row.timestamp;
        rows.push(row);
    }
    if rows.is_empty() {
        return Err("no rows".to_owned());
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::{Compression, write::GzEncoder};
    use std::io::Write as _;

    const GOOD: &str = r#"{"timestamp": 5, "input_length": 600, "output_length": 3, "hash_ids": [0, 7]}"#;

    fn of(text: &str) -> Result<Vec<Row>, String> {
        read(text.as_bytes(), 512, 100)
    }

    #[test]
    fn reads_plain_and_gzipped() {
        let expected =
            Row { timestamp: 5, input_length: 600, output_length: 3, hash_ids: vec![0, 7], ..Row::default() };
        assert_eq!(of(&format!("{GOOD}\n\n{GOOD}\n")).unwrap(), vec![expected.clone(), expected.clone()]);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.jsonl.gz");
        let mut out = GzEncoder::new(File::create(&path).unwrap(), Compression::fast());
        writeln!(out, "{GOOD}").unwrap();
        out.finish().unwrap();
        assert_eq!(read_file(&path, 512, 100).unwrap(), vec![expected]);
    }

    #[test]
    fn azures_files_are_known_by_their_name() {
        let folder = tempfile::tempdir().unwrap();
        let text = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:15:46.68,600,44\r\n";
        let expected = Row {
            timestamp: 0,
            input_length: 600,
            output_length: 44,
            hash_ids: vec![0, 1],
            ..Row::default()
        };
        let (plain, gzipped) = (folder.path().join("t.csv"), folder.path().join("t.csv.gz"));
        std::fs::write(&plain, text).unwrap();
        let mut out = GzEncoder::new(File::create(&gzipped).unwrap(), Compression::fast());
        out.write_all(text.as_bytes()).unwrap();
        out.finish().unwrap();
        for path in [plain, gzipped] {
            assert_eq!(read_file(&path, 512, 100).unwrap(), std::slice::from_ref(&expected));
        }
        let empty = folder.path().join("empty.csv");
        std::fs::write(&empty, format!("{text}2023-11-16 18:15:46.68,0,44\n")).unwrap();
        assert!(read_file(&empty, 512, 100).unwrap_err().contains("line 3: input_length: 0"));
    }

    #[test]
    fn the_limit_stops_before_a_bad_line() {
        let rows = read(format!("{GOOD}\nnonsense").as_bytes(), 512, 1);
        assert_eq!(rows.unwrap().len(), 1);
    }

    #[test]
    fn errors_name_line_and_field() {
        let bad = [
            (r#"{"timestamp": 5, "output_length": 3, "hash_ids": [0]}"#, "input_length"),
            (r#"{"timestamp": -1, "input_length": 600, "output_length": 3, "hash_ids": [0, 1]}"#, "-1"),
            (r#"{"timestamp": 4, "input_length": 600, "output_length": 3, "hash_ids": [0, 1]}"#, "timestamp"),
            (r#"{"timestamp": 5, "input_length": 0, "output_length": 3, "hash_ids": [0]}"#, "input_length"),
            (r#"{"timestamp": 5, "input_length": 600, "output_length": 3, "hash_ids": []}"#, "hash_ids"),
            (r#"{"timestamp": 5, "input_length": 600, "output_length": 3, "hash_ids": [1]}"#, "hash_ids"),
            (r#"{"timestamp": 5, "input_length": 6, "output_length": 3, "hash_ids": [1], "x": 1}"#, "x"),
            ("nonsense", "expected"),
        ];
        for (line, field) in bad {
            let error = of(&format!("{GOOD}\n{line}")).unwrap_err();
            assert!(error.starts_with("line 2: ") && error.contains(field), "{error}");
        }
        assert_eq!(of("").unwrap_err(), "no rows");
        assert!(read_file(Path::new("no/such.jsonl"), 512, 1).unwrap_err().starts_with("no/such.jsonl: "));
    }

    #[test]
    fn an_endless_line_is_refused() {
        let line = " ".repeat(LINE_BYTES_MAX + 1);
        assert!(of(&line).unwrap_err().contains("longer than"));
    }
}
