//! What a run under fault came to: each fault with the requests that it met, and the laws that were broken.
//!
//! Owns the laws of this command. Invariants: a request counts for every fault in whose time it was under way; a turn is compared only where
//! everything said before it was the same. Nothing is measured here.

use super::fault::{Fault, Sight, Victim};
use crate::demo::load::{Answer, How};
use crate::failure::Failure;
use crate::report::percentile;
use serde::Serialize;
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// What a list may take beyond the time to live.
const SLACK: Duration = Duration::from_secs(1);
/// How many reasons are shown.
const WHY_MAX: usize = 5;

/// How requests ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(super) struct Ends {
    whole: usize,
    busy: usize,
    refused: usize,
    cut: usize,
    improper: usize,
}

/// One fault's row.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Row {
    victim: String,
    at_s: f64,
    /// Under way when it was killed.
    struck: Ends,
    /// Under way at any time until everything was right again.
    met: Ends,
    ttft_max_ms: Option<f64>,
    /// From the kill: the others know.
    gone_ms: Vec<(&'static str, Option<u64>)>,
    /// From when it served again: everybody knows.
    back_ms: Vec<(&'static str, Option<u64>)>,
    missed: u64,
    looks: u64,
}

/// All of it.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Summary {
    bench: &'static str,
    seconds: u64,
    ttl_ms: u32,
    requests: Ends,
    ttft_p50_ms: f64,
    ttft_p99_ms: f64,
    faults: Vec<Row>,
    /// Attempts of the router that no worker answered, so that another was asked.
    failed_tries: u64,
    wrong_blocks: u64,
    compared_answers: usize,
    different_answers: usize,
    /// Whether all nodes agree at the end on what each has.
    index_agrees: bool,
    /// Laws that were broken, in words.
    broken: Vec<String>,
    why: Vec<String>,
}

/// What was measured.
pub(super) struct Run<'a> {
    pub(super) start: Instant,
    pub(super) seconds: u64,
    pub(super) ttl_ms: u32,
    pub(super) faults: &'a [Fault],
    pub(super) answers: &'a [Answer],
    /// Of the same conversations without a fault.
    pub(super) reference: &'a [Answer],
    pub(super) wrong_blocks: u64,
    pub(super) failed_tries: u64,
    pub(super) index_agrees: bool,
}

impl Ends {
    fn of<'a>(answers: impl Iterator<Item = &'a Answer>) -> Self {
        let mut ends = Self::default();
        for answer in answers {
            let count = match &answer.came {
                Ok(_) => &mut ends.whole,
                Err(lost) => match lost.how {
                    How::Busy => &mut ends.busy,
                    How::Refused => &mut ends.refused,
                    How::Cut => &mut ends.cut,
                    How::Improper => &mut ends.improper,
                },
            };
            *count += 1;
        }
        ends
    }

    fn line(self) -> String {
        let Self { whole, busy, refused, cut, improper } = self;
        format!("{whole} whole, {cut} cut, {busy} busy, {refused} refused, {improper} improper")
    }
}

impl Run<'_> {
    /// What it came to.
    pub(super) fn summary(&self) -> Summary {
        let ttft: Vec<f64> = self.answers.iter().filter_map(ttft_ms).collect();
        let of = |share| if ttft.is_empty() { 0.0 } else { percentile(ttft.clone(), share) };
        let (compared_answers, different_answers) = compare(self.answers, self.reference);
        let lost = self.answers.iter().chain(self.reference).filter_map(|answer| answer.came.as_ref().err());
        let mut summary = Summary {
            bench: "chaos",
            seconds: self.seconds,
            ttl_ms: self.ttl_ms,
            requests: Ends::of(self.answers.iter()),
            ttft_p50_ms: of(0.5),
            ttft_p99_ms: of(0.99),
            faults: self.faults.iter().map(|fault| self.row(fault)).collect(),
            failed_tries: self.failed_tries,
            wrong_blocks: self.wrong_blocks,
            compared_answers,
            different_answers,
            index_agrees: self.index_agrees,
            broken: Vec::new(),
            why: lost.take(WHY_MAX).map(|lost| lost.why.clone()).collect(),
        };
        summary.broken = self.broken(&summary);
        summary
    }

    fn row(&self, fault: &Fault) -> Row {
        let under_way = |from: Instant, to: Instant| {
            self.answers.iter().filter(move |answer| answer.under_way.0 < to && answer.under_way.1 > from)
        };
        let met = || under_way(fault.killed, fault.over);
        let ms = |sights: &[Sight]| {
            let ms = |after: Duration| after.as_millis() as u64;
            sights.iter().map(|sight| (sight.what, sight.after.map(ms))).collect()
        };
        Row {
            victim: fault.victim.name(),
            at_s: (fault.killed - self.start).as_secs_f64(),
            struck: Ends::of(under_way(fault.killed, fault.killed)),
            met: Ends::of(met()),
            ttft_max_ms: met().filter_map(ttft_ms).max_by(f64::total_cmp),
            gone_ms: ms(&fault.gone),
            back_ms: ms(&fault.back),
            missed: fault.missed,
            looks: fault.looks,
        }
    }

    fn broken(&self, summary: &Summary) -> Vec<String> {
        let mut broken: Vec<String> = self.faults.iter().flat_map(|fault| self.too_late(fault)).collect();
        let mut law = |is_broken: bool, text: String| broken.extend(is_broken.then_some(text));
        let Ends { refused, improper, .. } = summary.requests;
        law(improper > 0, format!("{improper} requests did not end as the API says"));
        law(refused > 0, format!("{refused} requests were refused"));
        let cuts = self.cuts_without_cause();
        law(cuts > 0, format!("{cuts} answers were cut off though no engine died under them"));
        let missed: u64 = self.faults.iter().map(|fault| fault.missed).sum();
        law(missed > 0, format!("{missed} looks found somebody missing who was there"));
        law(summary.wrong_blocks > 0, format!("{} wrong blocks", summary.wrong_blocks));
        law(summary.different_answers > 0, format!("{} different answers", summary.different_answers));
        law(summary.compared_answers == 0, "no answer could be compared".to_owned());
        law(!summary.index_agrees, "the nodes do not agree on what each has".to_owned());
        broken
    }

    fn too_late(&self, fault: &Fault) -> Vec<String> {
        let limit = Duration::from_millis(u64::from(self.ttl_ms)) + SLACK;
        let late = |sight: &&Sight| sight.after.is_none_or(|after| after > limit);
        let sights =
            fault.gone.iter().map(|it| ("death", it)).chain(fault.back.iter().map(|it| ("return", it)));
        sights
            .filter(|(_, sight)| late(sight))
            .map(|(of, sight)| {
                let took = sight.after.map_or("never".to_owned(), |after| format!("after {after:?}"));
                format!(
                    "the {of} of {}: {} was right {took}, not within {limit:?}",
                    fault.victim.name(),
                    sight.what
                )
            })
            .collect()
    }

    fn cuts_without_cause(&self) -> usize {
        let died = || self.faults.iter().filter(|fault| matches!(fault.victim, Victim::Engine(_)));
        let cause = |answer: &Answer| {
            died().any(|fault| answer.under_way.0 < fault.killed && answer.under_way.1 > fault.killed)
        };
        let cut = |answer: &&Answer| answer.came.as_ref().is_err_and(|lost| lost.how == How::Cut);
        self.answers.iter().filter(cut).filter(|answer| !cause(answer)).count()
    }
}

fn ttft_ms(answer: &Answer) -> Option<f64> {
    answer.came.as_ref().ok().map(|came| came.ttft_ms)
}

/// Turns that both answered after the same words, and those of them with different answers.
fn compare(answers: &[Answer], reference: &[Answer]) -> (usize, usize) {
    let texts: HashMap<_, _> =
        reference.iter().filter_map(|it| Some((it.place, &it.came.as_ref().ok()?.text))).collect();
    let (mut compared, mut different, mut apart) = (0, 0, None);
    for answer in answers {
        let talk = answer.place.0;
        match (&answer.came, texts.get(&answer.place)) {
            _ if apart == Some(talk) => {}
            (Ok(came), Some(text)) => {
                compared += 1;
                different += usize::from(came.text != **text);
            }
            // what follows was asked after other words
            _ => apart = Some(talk),
        }
    }
    (compared, different)
}

impl Victim {
    fn name(self) -> String {
        match self {
            Self::Engine(at) => format!("engine-{at}"),
            Self::Node(at) => format!("kvd-{at}"),
            Self::Etcd => "etcd".to_owned(),
        }
    }
}

impl Row {
    fn line(&self) -> String {
        let took = |sights: &[(&str, Option<u64>)]| {
            let took = |ms: &Option<u64>| ms.map_or("never".to_owned(), |ms| format!("{ms} ms"));
            sights.iter().map(|(what, ms)| format!("{what} {}", took(ms))).collect::<Vec<_>>().join(", ")
        };
        format!(
            "at {:.1} s; gone: {}; back: {}; at the kill: {}; until all was right: {}; first token at most {}",
            self.at_s,
            took(&self.gone_ms),
            took(&self.back_ms),
            self.struck.line(),
            self.met.line(),
            self.ttft_max_ms.map_or("-".to_owned(), |ms| format!("{ms:.0} ms"))
        )
    }
}

impl Summary {
    /// For people.
    pub(super) fn lines(&self) -> Vec<(&str, String)> {
        let faults = self.faults.iter().map(|row| (row.victim.as_str(), row.line()));
        let compared = format!("{} of {} compared", self.different_answers, self.compared_answers);
        let last = [
            ("requests", self.requests.line()),
            ("first token", format!("p50 {:.0} ms, p99 {:.0} ms", self.ttft_p50_ms, self.ttft_p99_ms)),
            ("different answers", compared),
            ("asked another", format!("{} times", self.failed_tries)),
            ("wrong blocks", self.wrong_blocks.to_string()),
            ("index agrees", self.index_agrees.to_string()),
        ];
        faults.chain(last).collect()
    }

    /// An error if a law was broken.
    pub(super) fn verdict(&self) -> Result<(), Failure> {
        if self.broken.is_empty() {
            return Ok(());
        }
        Err(format!("{}. Of requests: {}", self.broken.join("; "), self.why.join("; ")).into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::load::{Came, Lost};

    fn answer(place: (usize, usize), from: Instant, came: Result<&str, How>) -> Answer {
        let came = match came {
            Ok(text) => Ok(Came { ttft_ms: 1.0, itl_ms: None, text: text.to_owned() }),
            Err(how) => Err(Lost { how, why: "why".to_owned() }),
        };
        Answer { place, under_way: (from, from + Duration::from_secs(2)), came }
    }

    fn fault(victim: Victim, killed: Instant, after_ms: u64) -> Fault {
        let sight = Sight { what: "workers", after: Some(Duration::from_millis(after_ms)) };
        let over = killed + Duration::from_secs(1);
        Fault { victim, killed, over, gone: vec![sight], back: vec![sight], missed: 0, looks: 1 }
    }

    fn broken(faults: &[Fault], answers: &[Answer], reference: &[Answer]) -> String {
        let start = answers[0].under_way.0;
        let run = Run {
            start,
            seconds: 1,
            ttl_ms: 2000,
            faults,
            answers,
            reference,
            wrong_blocks: 0,
            failed_tries: 0,
            index_agrees: true,
        };
        run.summary().broken.join("; ")
    }

    #[test]
    fn a_cut_needs_an_engine_that_died_under_it() {
        let start = Instant::now();
        let kill = start + Duration::from_secs(1);
        let answers = [answer((0, 0), start, Ok("a")), answer((1, 0), start, Err(How::Cut))];
        assert_eq!(broken(&[fault(Victim::Engine(0), kill, 10)], &answers, &answers), "");
        assert!(
            broken(&[fault(Victim::Node(0), kill, 10)], &answers, &answers).contains("1 answers were cut")
        );
        let late = broken(&[fault(Victim::Engine(0), kill, 3100)], &answers, &answers);
        assert!(late.contains("the death of engine-0: workers was right after 3.1s"), "{late}");
    }

    #[test]
    fn words_are_compared_until_a_conversation_went_apart() {
        let start = Instant::now();
        let reference: Vec<Answer> = (0..3).map(|turn| answer((0, turn), start, Ok("a"))).collect();
        let lost =
            [reference[0].clone(), answer((0, 1), start, Err(How::Busy)), answer((0, 2), start, Ok("b"))];
        assert_eq!(compare(&lost, &reference), (1, 0));
        let other = [reference[0].clone(), answer((0, 1), start, Ok("b"))];
        assert_eq!(compare(&other, &reference), (2, 1));
        let improper = [answer((0, 0), start, Ok("a")), answer((0, 1), start, Err(How::Improper))];
        assert!(broken(&[], &improper, &reference).contains("1 requests did not end"));
    }
}
