//! Each metric as a chart: a panel for each series, a bar for each path, and a line from the least to the greatest round.

use std::path::Path;

use anyhow::{Context as _, Result};
use plotters::prelude::*;

use crate::metric::METRICS;
use crate::report::{Document, Summary, number};

const WIDTH: u32 = 800;
/// Title and axis of a panel, and one bar.
const PANEL_HEIGHT: usize = 70;
const BAR_HEIGHT: usize = 28;
const NAME_WIDTH: u32 = 80;
const FONT: &str = "sans-serif";
/// What has no forwarder in userspace, the peers, and the forwarder.
const COLOURS: [(&[&str], RGBColor); 3] = [
    (&["routing", "dnat"], RGBColor(158, 158, 158)),
    (&["haproxy", "nginx"], RGBColor(120, 158, 206)),
    (&[], RGBColor(225, 129, 44)),
];

/// Writes one file for each metric of the document into `folder`.
pub(crate) fn draw(document: &Document, folder: &Path) -> Result<()> {
    for metric in METRICS {
        let of_metric = |results: &&[Summary]| results.iter().all(|result| result.series.metric == metric);
        let panels: Vec<&[Summary]> = document.by_series().filter(of_metric).collect();
        if !panels.is_empty() {
            let file = folder.join(metric).with_extension("svg");
            draw_panels(&panels, &file).with_context(|| format!("drawing {}", file.display()))?;
        }
    }
    Ok(())
}

fn draw_panels(panels: &[&[Summary]], file: &Path) -> Result<()> {
    let heights = panels.iter().map(|results| i32::try_from(PANEL_HEIGHT + BAR_HEIGHT * results.len()));
    let heights = heights.collect::<Result<Vec<i32>, _>>()?;
    let root =
        SVGBackend::new(file, (WIDTH, u32::try_from(heights.iter().sum::<i32>())?)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut rest = root.clone();
    for (results, height) in panels.iter().zip(heights) {
        let (panel, below) = rest.split_vertically(height);
        draw_panel(results, &panel)?;
        rest = below;
    }
    root.present()?;
    Ok(())
}

fn draw_panel(results: &[Summary], area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>) -> Result<()> {
    let Some(first) = results.first() else { return Ok(()) };
    let end = results.iter().map(|result| result.max).fold(0.0, f64::max) * 1.15;
    let start = results.iter().map(|result| result.min).fold(0.0, f64::min);
    let bars = i32::try_from(results.len())?;
    let mut chart = ChartBuilder::on(area)
        .caption(format!("{}: {}", first.series, first.series.better()), (FONT, 20))
        .margin(6)
        .x_label_area_size(22)
        .y_label_area_size(NAME_WIDTH)
        .build_cartesian_2d(start..end.max(f64::MIN_POSITIVE), (0..bars - 1).into_segmented())?;
    // The first path stands at the top. A range of segments includes its end.
    let name = |index: i32| {
        let result = usize::try_from(bars - 1 - index).ok().and_then(|index| results.get(index));
        result.map_or_else(String::new, |result| result.path.clone())
    };
    chart
        .configure_mesh()
        .disable_y_mesh()
        .light_line_style(TRANSPARENT)
        .x_labels(6)
        .x_label_formatter(&|value| number(*value))
        .y_labels(results.len())
        .y_label_formatter(&|segment| match segment {
            SegmentValue::CenterOf(index) => name(*index),
            SegmentValue::Exact(_) | SegmentValue::Last => String::new(),
        })
        .label_style((FONT, 16))
        .draw()?;
    for (index, result) in (0..bars).rev().zip(results) {
        let centre = SegmentValue::CenterOf(index);
        let corners = [(0.0, SegmentValue::Exact(index)), (result.median, SegmentValue::Exact(index + 1))];
        let mut bar = Rectangle::new(corners, colour(&result.path).filled());
        bar.set_margin(4, 4, 0, 0);
        chart.draw_series([bar])?;
        let spread = ErrorBar::new_horizontal(
            centre.clone(),
            result.min,
            result.median,
            result.max,
            BLACK.filled(),
            8,
        );
        chart.draw_series([spread])?;
        let label = Text::new(number(result.median), (8, -6), (FONT, 16));
        chart.draw_series([EmptyElement::at((result.max.max(result.median), centre)) + label])?;
    }
    Ok(())
}

fn colour(path: &str) -> RGBColor {
    let of_path = |(paths, _): &&(&[&str], RGBColor)| paths.is_empty() || paths.contains(&path);
    COLOURS.iter().find(of_path).map_or(BLACK, |(_, colour)| *colour)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::metric::{Reading, Series};
    use crate::report::{Entry, Head, Report};

    #[test]
    fn a_chart_names_paths_and_values() {
        let entry = |path: &str, value| Entry {
            path: path.to_owned(),
            round: 0,
            reading: Reading { series: Series::new("latency", "us"), value, cost: None },
        };
        let report =
            Report { entries: vec![entry("routing", 12.5), entry("splice", 25.5)], ..Report::default() };
        let head = Head { kernel: String::new(), cpus: 2, version: String::new(), rounds: 1, seconds: 1 };
        let folder = tempfile::tempdir().unwrap();
        draw(&report.document(head), folder.path()).unwrap();
        let svg = fs::read_to_string(folder.path().join("latency.svg")).unwrap();
        for text in ["latency [us]: less is better", "routing", "splice", "12.5", "25.5"] {
            assert!(svg.contains(text), "no {text} in {svg}");
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
