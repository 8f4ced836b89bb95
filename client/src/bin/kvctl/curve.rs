//! Miss-cost curves: what requests wait for over a tier's size, one line a policy, on a terminal or as SVG.
//!
//! Invariants: sizes are spaced by their logarithm; what computing everything takes is said, and drawn only where the curves come near it. Leaves to others: the numbers (`simulate`).

use crate::text::size;
use plotters::prelude::*;

const ROWS: usize = 16;
const COLUMNS: usize = 72;
const SVG_SIZE: (u32, u32) = (860, 480);
/// Colours that are told apart by most eyes, and in print (Okabe and Ito, 2008).
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(0, 0, 0),
];
/// What stands for a line's points on a terminal.
const MARKS: [char; 7] = ['*', 'o', '+', 'x', '#', '@', '%'];

/// Some lines over one axis.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Curves {
    pub(crate) title: String,
    /// "DRAM", "NVMe".
    pub(crate) tier: &'static str,
    /// Seconds that all requests wait for without any cache.
    pub(crate) ceiling_s: f64,
    pub(crate) lines: Vec<Line>,
}

/// Bytes of the tier, smallest first, and seconds that requests wait for.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Line {
    pub(crate) name: String,
    pub(crate) points: Vec<(u64, f64)>,
}

impl Curves {
    fn points(&self) -> impl Iterator<Item = (u64, f64)> + '_ {
        self.lines.iter().flat_map(|line| line.points.iter().copied())
    }

    /// From the smallest to the largest, as logarithms.
    fn span(&self) -> (f64, f64) {
        let logs = || self.points().map(|(bytes, _)| (bytes as f64).log2());
        (logs().fold(f64::INFINITY, f64::min), logs().fold(f64::NEG_INFINITY, f64::max))
    }

    /// What is drawn: all points, with a little room around them.
    fn range_s(&self) -> (f64, f64) {
        let least_s = self.points().map(|(_, s)| s).fold(f64::INFINITY, f64::min);
        let most_s = self.points().map(|(_, s)| s).fold(0.0, f64::max);
        let room_s = (0.1 * (most_s - least_s)).max(0.001 * most_s).max(f64::MIN_POSITIVE);
        ((least_s - room_s).max(0.0), most_s + room_s)
    }

    fn heading(&self) -> String {
        format!("{} (no cache: {:.1} s)", self.title, self.ceiling_s)
    }

    /// For a terminal.
    pub(crate) fn text(&self) -> String {
        let (left, right) = self.span();
        let (floor_s, top_s) = self.range_s();
        let scale = |number: usize, row: &[char]| {
            let s = top_s - (top_s - floor_s) * number as f64 / (ROWS - 1) as f64;
            let scale = if number.is_multiple_of(5) { format!("{s:>10.1} s") } else { " ".repeat(12) };
            format!("{scale} |{}", row.iter().collect::<String>().trim_end())
        };
        let (least, most) = (size(left.exp2().round() as u64), size(right.exp2().round() as u64));
        let ends = format!("{least}{most:>width$} of {}", self.tier, width = COLUMNS - least.len());
        let marks = self.lines.iter().zip(MARKS.iter().cycle());
        let legend: Vec<_> = marks.map(|(line, mark)| format!("{mark} {}", line.name)).collect();
        let mut shown = vec![self.heading()];
        shown.extend(self.cells().iter().enumerate().map(|(number, row)| scale(number, row)));
        shown.push(format!("{:12} +{}", "", "-".repeat(COLUMNS)));
        shown.push(format!("{:14}{ends}", ""));
        shown.push(format!("{:14}{}", "", legend.join("   ")));
        shown.join("\n") + "\n"
    }

    /// Rows of marks; the last line is on top.
    fn cells(&self) -> Vec<Vec<char>> {
        let ((left, right), (floor_s, top_s)) = (self.span(), self.range_s());
        let mut cells = vec![vec![' '; COLUMNS]; ROWS];
        for (line, mark) in self.lines.iter().zip(MARKS.iter().cycle()) {
            for column in 0..COLUMNS {
                let log = left + (right - left) * column as f64 / (COLUMNS - 1) as f64;
                let row = (top_s - at(&line.points, log)) / (top_s - floor_s) * (ROWS - 1) as f64;
                let row = cells.get_mut((row.round() as usize).min(ROWS - 1)).expect("within the rows");
                row[column] = *mark;
            }
        }
        cells
    }

    /// A drawing; an error is the library's.
    pub(crate) fn svg(&self) -> Result<String, String> {
        let mut drawn = String::new();
        self.draw(&SVGBackend::with_string(&mut drawn, SVG_SIZE).into_drawing_area())
            .map_err(|error| error.to_string())?;
        Ok(drawn)
    }

    fn draw<B: DrawingBackend>(
        &self,
        area: &DrawingArea<B, plotters::coord::Shift>,
    ) -> Result<(), DrawingAreaErrorKind<B::ErrorType>> {
        let ((left, right), (floor_s, top_s)) = (self.span(), self.range_s());
        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(area)
            .caption(self.heading(), ("sans-serif", 17))
            .margin(14)
            .x_label_area_size(46)
            .y_label_area_size(76)
            .build_cartesian_2d(left..right, floor_s..top_s)?;
        chart
            .configure_mesh()
            .x_desc(format!("{} (logarithmic)", self.tier))
            .y_desc("seconds waited, all requests")
            .x_label_formatter(&|log| size(log.exp2().round() as u64))
            .light_line_style(TRANSPARENT)
            .draw()?;
        for (line, colour) in self.lines.iter().zip(COLOURS.iter().cycle()) {
            let points = line.points.iter().map(|(bytes, s)| ((*bytes as f64).log2(), *s));
            chart
                .draw_series(LineSeries::new(points, colour.stroke_width(2)).point_size(3))?
                .label(&line.name)
                .legend(|(x, y)| PathElement::new(vec![(x, y), (x + 18, y)], colour.stroke_width(2)));
        }
        chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK).draw()?;
        area.present()
    }
}

/// A line's value at a size's logarithm, straight from point to point.
fn at(points: &[(u64, f64)], log: f64) -> f64 {
    let log_of = |at: usize| (points[at].0 as f64).log2();
    let after = (0..points.len()).find(|&at| log_of(at) >= log - 1e-9).unwrap_or(points.len() - 1);
    let before = after.saturating_sub(1);
    let (from, to) = (log_of(before), log_of(after));
    let share = if to > from { ((log - from) / (to - from)).clamp(0.0, 1.0) } else { 1.0 };
    points[before].1 + (points[after].1 - points[before].1) * share
}

#[cfg(test)]
mod tests {
    use super::*;

    fn curves() -> Curves {
        let line = |name: &str, ends: [f64; 3]| Line {
            name: name.to_owned(),
            points: [1_u64 << 30, 2 << 30, 4 << 30].into_iter().zip(ends).collect(),
        };
        Curves {
            title: "waiting".to_owned(),
            tier: "DRAM",
            ceiling_s: 100.0,
            lines: vec![line("lru", [90.0, 80.0, 40.0]), line("worth", [80.0, 60.0, 20.0])],
        }
    }

    #[test]
    fn values_between_points_are_straight() {
        let points = &curves().lines[0].points;
        let near = |log: f64, s: f64| assert!((at(points, log) - s).abs() < 1e-9, "{log}");
        [(30.0, 90.0), (30.5, 85.0), (31.0, 80.0), (31.5, 60.0), (32.0, 40.0), (33.0, 40.0)]
            .into_iter()
            .for_each(|(log, s)| near(log, s));
    }

    #[test]
    fn a_terminal_shows_the_top_the_ends_and_who_is_who() {
        let shown = curves().text();
        for part in ["waiting (no cache: 100.0 s)\n", "97.0 s |", "1 GiB", "4 GiB of DRAM", "* lru   o worth"]
        {
            assert!(shown.contains(part), "{part:?} in\n{shown}");
        }
        let rows: Vec<&str> = shown.lines().skip(1).take(ROWS).collect();
        let row_of = |mark: char, first: bool| {
            let at = |row: &&str| {
                let cells = row.split_once('|').expect("an axis").1;
                if first { cells.starts_with(mark) } else { cells.chars().nth(COLUMNS - 1) == Some(mark) }
            };
            rows.iter().position(at).expect("it is drawn")
        };
        assert!(row_of('*', true) < row_of('o', true) && row_of('*', false) < row_of('o', false));
        assert!(row_of('*', true) < row_of('*', false), "less is lower");
    }

    #[test]
    fn a_drawing_has_every_line() {
        let drawn = curves().svg().unwrap();
        assert!(drawn.starts_with("<svg") && drawn.trim_end().ends_with("</svg>"));
        assert!(["worth", "lru", "no cache: 100.0 s"].iter().all(|part| drawn.contains(part)));
        assert!(drawn.matches("<polyline").count() >= 2);
    }

    #[test]
    fn one_size_and_equal_values_are_drawn_too() {
        let line = Line { name: "lru".to_owned(), points: vec![(1 << 30, 5.0)] };
        let one = Curves { ceiling_s: 5.0, lines: vec![line], ..curves() };
        assert!(one.text().contains("lru"));
    }
}
