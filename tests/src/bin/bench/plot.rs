//! Which part of the requests was answered within which time: one curve for each set-up, as SVG.
//!
//! Pure: values in, text out. The background is drawn as well, because the document is read
//! on dark pages too; where curves lie on one another, their dashes and widths still show both.
#![forbid(unsafe_code)]

use std::fmt::Write as _;

use crate::statistics::quantile;

/// One curve.
pub(crate) struct Curve<'a> {
    pub(crate) name: String,
    pub(crate) look: Look,
    /// Sorted, in milliseconds.
    pub(crate) values: &'a [f64],
}

/// How a curve is drawn. The colours are told apart by the colour-blind too (Okabe and Ito).
#[derive(Clone, Copy)]
pub(crate) enum Look {
    Thin,
    Dashed,
    Thick,
}

impl Look {
    fn attributes(self) -> &'static str {
        match self {
            Self::Thin => r##"stroke="#d55e00" stroke-width="2""##,
            Self::Dashed => r##"stroke="#0072b2" stroke-width="2" stroke-dasharray="7 4""##,
            Self::Thick => r##"stroke="#4fc3a1" stroke-width="5""##,
        }
    }
}

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 480.0;
/// A line of the legend.
const LEGEND: f64 = 22.0;
/// The edges of the area with the curves.
const LEFT: f64 = 72.0;
const RIGHT: f64 = WIDTH - 24.0;
const TOP: f64 = 124.0;
const BOTTOM: f64 = HEIGHT - 62.0;

/// Points of a curve. More would not be seen.
const POINTS: usize = 250;

/// The curves from the bottom to the top one; each has at least one value.
pub(crate) fn cumulative(title: &str, curves: &[Curve<'_>]) -> String {
    // The slowest thousandth would squeeze all others to the left.
    let slowest = curves.iter().map(|curve| quantile(curve.values, 0.999)).fold(0.0, f64::max);
    let step = step(slowest);
    let end = (slowest / step).ceil() * step;
    let x = |value: f64| LEFT + value / end * (RIGHT - LEFT);
    let y = |part: f64| BOTTOM - part * (BOTTOM - TOP);

    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"{WIDTH}\" \
         height=\"{HEIGHT}\" font-family=\"sans-serif\" font-size=\"14\" fill=\"#222\" role=\"img\">\n\
         <title>{title}</title>\n\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"#fff\"/>\n\
         <text x=\"{LEFT}\" y=\"32\" font-size=\"16\" font-weight=\"bold\">{title}</text>\n"
    );
    let mut line = |text: String| {
        svg.push_str(&text);
        svg.push('\n');
    };
    for percent in [0, 25, 50, 75, 100] {
        let y = y(f64::from(percent) / 100.0);
        line(format!(r##"<path d="M{LEFT} {y}H{RIGHT}" stroke="#ddd"/>"##));
        let (x, y) = (LEFT - 8.0, y + 5.0);
        line(format!(r#"<text x="{x}" y="{y}" text-anchor="end">{percent} %</text>"#));
    }
    let mut tick = 0.0;
    while tick <= end + step / 2.0 {
        let x = x(tick);
        line(format!(r##"<path d="M{x:.1} {TOP}V{BOTTOM}" stroke="#ddd"/>"##));
        let y = BOTTOM + 20.0;
        line(format!(r#"<text x="{x:.1}" y="{y}" text-anchor="middle">{tick}</text>"#));
        tick += step;
    }
    line(format!(r##"<path d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}" fill="none" stroke="#222"/>"##));
    let (middle, below) = ((LEFT + RIGHT) / 2.0, BOTTOM + 46.0);
    line(format!(r#"<text x="{middle}" y="{below}" text-anchor="middle">latency in milliseconds</text>"#));
    let middle = (TOP + BOTTOM) / 2.0;
    line(format!(
        r#"<text x="20" y="{middle}" text-anchor="middle" transform="rotate(-90 20 {middle})">requests answered by then</text>"#
    ));

    for curve in curves {
        let mut path = format!("M{:.1} {BOTTOM}", x(quantile(curve.values, 0.0)));
        for point in 0..=POINTS {
            let part = point as f64 / POINTS as f64;
            let value = quantile(curve.values, part);
            // What is beyond the end is left out, not drawn on the edge.
            if value <= end {
                let _ = write!(path, "L{:.1} {:.1}", x(value), y(part));
            }
        }
        let look = curve.look.attributes();
        line(format!(r#"<path d="{path}" fill="none" stroke-linejoin="round" {look}/>"#));
    }

    // Above the curves, where none of them can be.
    for (number, curve) in curves.iter().enumerate() {
        let y = 54.0 + LEGEND * number as f64;
        let (to, text) = (LEFT + 48.0, LEFT + 60.0);
        let look = curve.look.attributes();
        line(format!(r#"<path d="M{LEFT} {y}H{to}" {look}/>"#));
        line(format!(r#"<text x="{text}" y="{}">{}</text>"#, y + 5.0, curve.name));
    }
    line("</svg>".to_owned());
    svg
}

/// How far the marks of an axis to this end are apart: a round number, for at most ten marks.
fn step(end: f64) -> f64 {
    let steps = (-1..9).flat_map(|power| [1.0, 2.0, 5.0].map(|digit| digit * 10f64.powi(power)));
    steps.into_iter().find(|step| end / step <= 10.0).unwrap_or(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_axis_has_round_marks_and_not_too_many() {
        for (end, apart) in [(0.4, 0.1), (10.0, 1.0), (10.1, 2.0), (72.65, 10.0), (144.55, 20.0)] {
            assert_eq!(step(end), apart, "to {end}");
        }
    }

    #[test]
    fn every_curve_has_its_name_and_the_background_is_drawn_first() {
        let curves = [
            Curve { name: "one".to_owned(), look: Look::Thin, values: &[1.0, 2.0] },
            Curve { name: "two".to_owned(), look: Look::Thick, values: &[1.5] },
        ];
        let svg = cumulative("both", &curves);
        assert!(svg.find("<rect").unwrap() < svg.find("<path").unwrap());
        assert!(svg.contains(">one<") && svg.contains(">two<") && svg.ends_with("</svg>\n"), "{svg}");
    }
}
