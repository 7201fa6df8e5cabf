//! Plain text tables: the first column to the left, numbers to the right.

/// Rows of cells under a heading.
#[derive(Debug)]
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
    left: usize,
}

impl Table {
    /// A table whose first `left` columns hold words.
    pub(crate) fn new(left: usize, heading: &[&str]) -> Self {
        Self { rows: vec![heading.iter().map(|cell| (*cell).to_owned()).collect()], left }
    }

    pub(crate) fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    pub(crate) fn print(&self) {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            self.rows
                .iter()
                .filter_map(|row| row.get(column))
                .map(|cell| cell.chars().count())
                .max()
                .unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        for (index, row) in self.rows.iter().enumerate() {
            println!("{}", self.line(row, &widths));
            if index == 0 {
                println!("{}", widths.iter().map(|w| "-".repeat(*w)).collect::<Vec<_>>().join("  "));
            }
        }
    }

    fn line(&self, row: &[String], widths: &[usize]) -> String {
        let cell = |(column, cell): (usize, &String)| {
            let width = widths[column];
            if column < self.left { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
        };
        row.iter().enumerate().map(cell).collect::<Vec<_>>().join("  ").trim_end().to_owned()
    }
}

/// Bytes in the largest unit that keeps the number above 1.
pub(crate) fn bytes(count: usize) -> String {
    let units = ["B", "KiB", "MiB", "GiB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{count} B") } else { format!("{value:.1} {}", units[unit]) }
}

/// A number, or a dash where there is none.
pub(crate) fn number(value: Option<f64>, decimals: usize) -> String {
    match value {
        Some(value) if value.is_finite() => format!("{value:.decimals$}"),
        _ => "-".to_owned(),
    }
}

/// A share as a percentage.
pub(crate) fn percent(value: Option<f64>) -> String {
    value.filter(|v| v.is_finite()).map_or_else(|| "-".to_owned(), |v| format!("{:.1} %", 100.0 * v))
}

/// Seconds as milliseconds.
pub(crate) fn milliseconds(seconds: f64) -> String {
    format!("{:.2} ms", 1e3 * seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_units_fit() {
        let mut table = Table::new(1, &["name", "n"]);
        table.row(vec!["a".into(), "100".into()]);
        assert_eq!(table.line(&table.rows[0], &[4, 3]), "name    n");
        assert_eq!(table.line(&table.rows[1], &[4, 3]), "a     100");
        assert_eq!(
            [bytes(0), bytes(1023), bytes(1536), bytes(5 << 20)],
            ["0 B", "1023 B", "1.5 KiB", "5.0 MiB"]
        );
        assert_eq!([number(None, 1), number(Some(f64::NAN), 1), number(Some(1.25), 1)], ["-", "-", "1.2"]);
        assert_eq!(percent(Some(0.5)), "50.0 %");
    }
}
