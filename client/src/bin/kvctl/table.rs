//! Tables for people: no borders, two spaces between columns (one in the dense ones), numbers to the right.

use comfy_table::{CellAlignment, Table, presets};

/// A table with a header; columns named in `right` hold numbers.
pub(crate) fn columns(header: &[&str], right: &[&str], rows: Vec<Vec<String>>) -> String {
    spaced(header, right, rows, 2)
}

/// Likewise, one space apart; headers may have several lines.
pub(crate) fn dense(header: &[&str], right: &[&str], rows: Vec<Vec<String>>) -> String {
    spaced(header, right, rows, 1)
}

fn spaced(header: &[&str], right: &[&str], rows: Vec<Vec<String>>, gap: u16) -> String {
    let mut table = bare();
    table.set_header(header.iter().copied());
    table.add_rows(rows);
    for (at, name) in header.iter().enumerate() {
        let column = table.column_mut(at).expect("a column for each header");
        column.set_padding((0, gap));
        if right.contains(name) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    lines(&table)
}

/// Names to the left, values beside them.
pub(crate) fn pairs(rows: &[(&str, String)]) -> String {
    let mut table = bare();
    table.add_rows(rows.iter().map(|(name, value)| [*name, value.as_str()]));
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    lines(&table)
}

fn bare() -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table
}

fn lines(table: &Table) -> String {
    table.lines().flat_map(|line| [line.trim_end().to_owned(), "\n".to_owned()]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let row = |a: &str, b: &str| vec![a.to_owned(), b.to_owned()];
        let shown =
            columns(&["NAME", "USED"], &["USED"], vec![row("dram", "1 GiB"), row("nvme", "23.4 GiB")]);
        assert_eq!(shown, "NAME      USED\ndram     1 GiB\nnvme  23.4 GiB\n");
        assert_eq!(columns(&["NAME"], &[], vec![]), "NAME\n");
    }

    #[test]
    fn pairs_line_up() {
        let shown = pairs(&[("version", "0.1.0".into()), ("up", "3 s".into())]);
        assert_eq!(shown, "version  0.1.0\nup       3 s\n");
    }
}
