//! A loss curve as an SVG.

use std::fmt::Write;

/// A series of a plot.
#[derive(Debug, Clone)]
pub struct Curve<'a> {
    /// What it shows.
    pub name: &'a str,
    /// Step and value.
    pub points: Vec<(f64, f64)>,
}

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 420.0;
/// Left, right, top, bottom.
const MARGINS: (f64, f64, f64, f64) = (60.0, 20.0, 40.0, 40.0);
const COLORS: [&str; 4] = ["#1f77b4", "#d62728", "#2ca02c", "#9467bd"];
/// Points of a line at most; more are averaged.
const POINTS: usize = 400;

/// Draws curves over the step. Points that are not numbers are left out.
///
/// # Example
/// ```
/// use mamba_train::record::{Curve, loss_curve};
/// let training = Curve { name: "training", points: (1..100).map(|i| (i as f64, 5.0 / (i as f64).sqrt())).collect() };
/// let svg = loss_curve("loss", &[training]);
/// assert!(svg.starts_with("<svg") && svg.contains("<polyline") && svg.trim_end().ends_with("</svg>"));
/// ```
pub fn loss_curve(title: &str, curves: &[Curve]) -> String {
    let finite = |(x, y): &&(f64, f64)| x.is_finite() && y.is_finite();
    let points: Vec<&(f64, f64)> = curves.iter().flat_map(|curve| &curve.points).filter(finite).collect();
    let range = |value: fn(&(f64, f64)) -> f64| {
        let values = points.iter().map(|point| value(point));
        let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
        match low < high {
            true => (low, high),
            false if low.is_finite() => (low - 0.5, low + 0.5),
            false => (0.0, 1.0),
        }
    };
    let (x_range, y_range) = (range(|p| p.0), range(|p| p.1));
    let (left, right, top, bottom) = MARGINS;
    let place = |x: f64, y: f64| {
        let (fx, fy) = ((x - x_range.0) / (x_range.1 - x_range.0), (y - y_range.0) / (y_range.1 - y_range.0));
        (left + fx * (WIDTH - left - right), HEIGHT - bottom - fy * (HEIGHT - top - bottom))
    };
    let mut svg = String::new();
    let _ = writeln!(
        svg,
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">
<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>
<text x="{left}" y="22" font-size="15">{}</text>"#,
        escaped(title)
    );
    for value in ticks(y_range) {
        let (_, y) = place(x_range.0, value);
        let _ = writeln!(
            svg,
            r##"<line x1="{left}" y1="{y:.1}" x2="{:.1}" y2="{y:.1}" stroke="#ddd"/><text x="{:.1}" y="{:.1}" text-anchor="end">{}</text>"##,
            WIDTH - right,
            left - 6.0,
            y + 4.0,
            short(value)
        );
    }
    for value in ticks(x_range) {
        let (x, _) = place(value, y_range.0);
        let _ = writeln!(
            svg,
            r#"<text x="{x:.1}" y="{:.1}" text-anchor="middle">{}</text>"#,
            HEIGHT - bottom + 18.0,
            short(value)
        );
    }
    for (i, curve) in curves.iter().enumerate() {
        let color = COLORS[i % COLORS.len()];
        let points: Vec<(f64, f64)> = curve.points.iter().filter(finite).copied().collect();
        let line: Vec<String> = averaged(&points)
            .into_iter()
            .map(|(x, y)| place(x, y))
            .map(|(x, y)| format!("{x:.1},{y:.1}"))
            .collect();
        let (x, y) = (WIDTH - right - 110.0, top + 14.0 * i as f64);
        let _ = writeln!(
            svg,
            r#"<polyline fill="none" stroke="{color}" stroke-width="1.5" points="{}"/>
<text x="{x}" y="{y}" fill="{color}">{}</text>"#,
            line.join(" "),
            escaped(curve.name)
        );
    }
    svg + "</svg>\n"
}

/// Means of as many neighbours as it takes.
fn averaged(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let mean = |group: &[(f64, f64)]| {
        let n = group.len() as f64;
        (group.iter().map(|p| p.0).sum::<f64>() / n, group.iter().map(|p| p.1).sum::<f64>() / n)
    };
    points.chunks(points.len().div_ceil(POINTS).max(1)).map(mean).collect()
}

/// Round numbers within a range, about five of them.
fn ticks((low, high): (f64, f64)) -> Vec<f64> {
    let raw = (high - low) / 5.0;
    let power = 10f64.powf(raw.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|s| *s >= raw).unwrap_or(raw);
    let first = (low / step).ceil() as i64;
    (first..).map(|i| i as f64 * step).take_while(|v| *v <= high + 1e-9 * step).take(20).collect()
}

fn short(value: f64) -> String {
    let text = format!("{value:.4}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strange_values_are_drawn_or_left_out() {
        let points = vec![(1.0, f64::NAN), (2.0, 3.0), (3.0, f64::INFINITY)];
        let svg = loss_curve("a < b", &[Curve { name: "x", points }, Curve { name: "none", points: vec![] }]);
        assert!(svg.contains("a &lt; b") && !svg.contains("NaN") && !svg.contains("inf"));
        assert!(loss_curve("", &[]).contains("</svg>"));
        assert_eq!(ticks((0.0, 10.0)), [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
        assert_eq!(averaged(&[(0.0, 1.0); 1000]).len(), 334);
    }
}
