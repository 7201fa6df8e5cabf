//! The figure: what a recipe costs in quality against what it costs in bytes, one line per recipe.

use crate::error::{Error, Result};
use plotters::coord::Shift;
use plotters::prelude::*;
use std::path::Path;

/// Width and height in pixels.
const SIZE: (u32, u32) = (960, 600);

/// Distinguishable in print and for most colour-blind readers.
const COLOURS: &[RGBColor] = &[
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(90, 90, 90),
];

/// A recipe at a budget: name of its line, bytes, and how far off it is.
pub(super) type Point = (String, f64, f64);

/// One line: name, points.
type Line = (String, Vec<(f64, f64)>);

/// What a figure says beside its lines.
#[derive(Clone, Debug)]
pub(super) struct Labels {
    pub(super) title: String,
    pub(super) x: &'static str,
    pub(super) y: &'static str,
}

/// Checks before anything is measured that the figure can be drawn.
pub(super) fn check(path: &Path) -> Result<()> {
    if !matches!(path.extension().and_then(|e| e.to_str()), Some("svg" | "png")) {
        return Err(Error::usage(
            format!("{} is neither .svg nor .png", path.display()),
            "name the figure *.svg or *.png",
        ));
    }
    let font = epaint_default_fonts::UBUNTU_LIGHT;
    plotters::style::register_font("sans-serif", FontStyle::Normal, font).map_err(|_| Error::Figure {
        path: path.to_owned(),
        problem: "the built-in typeface is broken".to_owned(),
    })
}

/// Draws points as a line for each name. Points that are not off at all have no place on a logarithmic axis.
pub(super) fn draw(path: &Path, points: impl Iterator<Item = Point>, labels: &Labels) -> Result<()> {
    let lines = lines(points);
    if lines.is_empty() {
        return Err(Error::usage(
            "there is nothing to draw",
            "give a recipe that compresses, with a --budget",
        ));
    }
    let problem = |problem: String| Error::Figure { path: path.to_owned(), problem };
    if path.extension().is_some_and(|e| e == "svg") {
        chart(SVGBackend::new(path, SIZE).into_drawing_area(), &lines, labels).map_err(problem)
    } else {
        chart(BitMapBackend::new(path, SIZE).into_drawing_area(), &lines, labels).map_err(problem)
    }
}

fn lines(points: impl Iterator<Item = Point>) -> Vec<Line> {
    let mut lines: Vec<Line> = Vec::new();
    for (name, x, y) in points.filter(|point| point.2 > 0.0) {
        match lines.iter_mut().find(|(line, _)| *line == name) {
            Some((_, points)) => points.push((x, y)),
            None => lines.push((name, vec![(x, y)])),
        }
    }
    for (_, points) in &mut lines {
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
    }
    lines
}

fn chart<B: DrawingBackend>(
    root: DrawingArea<B, Shift>,
    lines: &[Line],
    labels: &Labels,
) -> std::result::Result<(), String> {
    let all = || lines.iter().flat_map(|(_, points)| points);
    let most = all().map(|p| p.0).fold(0.0, f64::max) * 1.1;
    let (low, high) = all().fold((f64::MAX, 0.0f64), |(low, high), p| (low.min(p.1), high.max(p.1)));
    let text = |e: DrawingAreaErrorKind<B::ErrorType>| e.to_string();
    root.fill(&WHITE).map_err(text)?;
    let mut chart = ChartBuilder::on(&root)
        .caption(&labels.title, ("sans-serif", 20))
        .margin(16)
        .x_label_area_size(44)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..most, (low / 1.5..high * 1.5).log_scale())
        .map_err(text)?;
    chart
        .configure_mesh()
        .x_desc(labels.x)
        .y_desc(labels.y)
        .y_label_formatter(&|y| format!("{y:.3}"))
        .draw()
        .map_err(text)?;
    for (index, (name, points)) in lines.iter().enumerate() {
        let colour = COLOURS[index % COLOURS.len()];
        chart
            .draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)))
            .map_err(text)?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], colour.stroke_width(2)));
        chart.draw_series(points.iter().map(|p| Circle::new(*p, 4, colour.filled()))).map_err(text)?;
    }
    chart
        .configure_series_labels()
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK)
        .label_font(("sans-serif", 14))
        .draw()
        .map_err(text)?;
    root.present().map_err(text)
}
