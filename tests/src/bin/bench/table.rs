//! A table that reads well in a terminal and in Markdown.
#![forbid(unsafe_code)]

use std::fmt;

/// Rows of equal length under a heading. The first column is text, the others are numbers.
pub(crate) struct Table(Vec<Vec<String>>);

impl Table {
    pub(crate) fn new<const N: usize>(heading: [&str; N]) -> Self {
        Self(vec![heading.map(str::to_owned).to_vec()])
    }

    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.0.push(cells.into_iter().collect());
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(rows) = self;
        let width = |column: usize| {
            let cells = rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        for (number, row) in rows.iter().enumerate() {
            for (column, cell) in row.iter().enumerate() {
                let width = width(column);
                if column == 0 { write!(f, "| {cell:<width$} ")? } else { write!(f, "| {cell:>width$} ")? }
            }
            writeln!(f, "|")?;
            if number == 0 {
                for column in 0..row.len() {
                    let line = "-".repeat(width(column));
                    if column == 0 { write!(f, "|-{line}-")? } else { write!(f, "|-{line}:")? }
                }
                writeln!(f, "|")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let mut table = Table::new(["name", "ns"]);
        table.row(["select".to_owned(), "7".to_owned()]);
        assert_eq!(table.to_string(), "| name   | ns |\n|--------|---:|\n| select |  7 |\n");
    }
}
