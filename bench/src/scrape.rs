//! Prometheus' text, as far as a benchmark reads it: counters by label, and histograms.
//!
//! Invariant: what is not there is zero, or no answer; nothing panics on what a process says.

/// The sum of a counter's samples that carry `label`, such as `result="failed"`; all of them with none.
pub(crate) fn counted(text: &str, name: &str, label: &str) -> f64 {
    samples(text, name, label).map(|(_, value)| value).sum()
}

/// A histogram's mean; none before the first sample.
pub(crate) fn mean(text: &str, name: &str, label: &str) -> Option<f64> {
    let count = counted(text, &format!("{name}_count"), label);
    (count > 0.0).then(|| counted(text, &format!("{name}_sum"), label) / count)
}

/// The upper edge of the bucket in which a share of a histogram's samples ends; infinite in the last one.
pub(crate) fn at_most(text: &str, name: &str, label: &str, share: f64) -> Option<f64> {
    let wanted = counted(text, &format!("{name}_count"), label) * share;
    let bucket = format!("{name}_bucket");
    let mut buckets = samples(text, &bucket, label);
    let (labels, _) = buckets.find(|(_, below)| wanted > 0.0 && *below >= wanted)?;
    let (_, edge) = labels.split_once("le=\"")?;
    edge.split('"').next()?.parse().ok()
}

/// (labels, value) of each sample of that name.
fn samples<'a>(text: &'a str, name: &'a str, label: &'a str) -> impl Iterator<Item = (&'a str, f64)> {
    text.lines().filter_map(move |line| {
        let (key, value) = line.rsplit_once(' ')?;
        let (found, labels) = key.split_once('{').unwrap_or((key, ""));
        let is_it = found == name && labels.contains(label);
        is_it.then_some((labels, value.parse().ok()?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# TYPE s_seconds histogram\ns_seconds_bucket{stage=\"a\",le=\"0.1\"} 90\n\
        s_seconds_bucket{stage=\"a\",le=\"0.5\"} 99\ns_seconds_bucket{stage=\"a\",le=\"+Inf\"} 100\n\
        s_seconds_sum{stage=\"a\"} 7\ns_seconds_count{stage=\"a\"} 100\ns_seconds_count{stage=\"b\"} 0\n\
        tries_total{result=\"ok\"} 4\ntries_total{result=\"failed\"} 3\nplain_total 2\n";

    #[test]
    fn counters_and_histograms_are_read() {
        assert!((counted(TEXT, "tries_total", "") - 7.0).abs() < 1e-9);
        assert!((counted(TEXT, "tries_total", "result=\"failed\"") - 3.0).abs() < 1e-9);
        assert!((counted(TEXT, "plain_total", "") - 2.0).abs() < 1e-9);
        assert!((mean(TEXT, "s_seconds", "stage=\"a\"").unwrap() - 0.07).abs() < 1e-9);
        assert!((at_most(TEXT, "s_seconds", "stage=\"a\"", 0.5).unwrap() - 0.1).abs() < 1e-9);
        assert!((at_most(TEXT, "s_seconds", "stage=\"a\"", 0.99).unwrap() - 0.5).abs() < 1e-9);
        assert!(at_most(TEXT, "s_seconds", "stage=\"a\"", 1.0).unwrap().is_infinite());
        assert_eq!((mean(TEXT, "s_seconds", "stage=\"b\""), at_most(TEXT, "other", "", 0.5)), (None, None));
    }
}
