//! What was verified, as text and as JSON.

use super::speed;
use crate::out;
use serde::Serialize;
use std::time::Duration;
use unladen::{
    Checkpoint,
    verify::{Checked, Comparison, Difference, Elements, Finding, Made},
};

/// Tensors that a line names; JSON names all.
const MAX_NAMED: usize = 5;

/// What was seen of one checkpoint.
#[derive(Serialize)]
pub(super) struct CheckReport<'a> {
    path: String,
    format: &'static str,
    is_right: bool,
    records: Records,
    tensors: usize,
    /// Null without a manifest; false: it is one of version 1, which does not have them.
    composites_compared: Option<bool>,
    bytes: u64,
    seconds: f64,
    faults: Vec<Fault<'a>>,
}

#[derive(Serialize)]
struct Records {
    compared: u64,
    without_checksum: u64,
    packed: u64,
}

#[derive(Serialize)]
struct Fault<'a> {
    kind: &'static str,
    path: String,
    record: Option<&'a str>,
    tensors: &'a [String],
    expected: &'a str,
    found: &'a str,
}

impl<'a> CheckReport<'a> {
    pub(super) fn new(
        checkpoint: &Checkpoint,
        checked: &'a Checked,
        composites_compared: Option<bool>,
        took: Duration,
    ) -> CheckReport<'a> {
        CheckReport {
            path: checkpoint.path.display().to_string(),
            format: checkpoint.format.name(),
            is_right: checked.findings.is_empty(),
            records: Records {
                compared: checked.n_compared,
                without_checksum: checked.n_without_checksum,
                packed: checked.n_packed,
            },
            tensors: checkpoint.tensors.len(),
            composites_compared,
            bytes: checked.read_bytes,
            seconds: took.as_secs_f64(),
            faults: checked.findings.iter().map(Fault::new).collect(),
        }
    }

    pub(super) fn json(&self) -> String {
        serde_json::to_string(self).expect("strings and numbers")
    }

    pub(super) fn print(&self) {
        for fault in &self.faults {
            out::result(&fault.line());
        }
        let Records { compared, without_checksum, packed } = self.records;
        let mut parts = vec![format!("{}: {}", self.path.escape_debug(), self.format)];
        parts.push(match self.faults.len() {
            0 => "no fault".to_owned(),
            1 => "1 fault".to_owned(),
            n => format!("{n} faults"),
        });
        if compared + without_checksum + packed > 0 {
            parts.push(format!("{compared} records compared with their checksums"));
        }
        for (n, what) in [(without_checksum, "without one"), (packed, "unpacked for it")] {
            if n > 0 {
                parts.push(format!("{n} {what}"));
            }
        }
        parts.push(format!("{} tensors", self.tensors));
        parts.push(speed(self.bytes, self.seconds));
        out::result(&parts.join(", "));
    }
}

impl<'a> Fault<'a> {
    fn new(finding: &'a Finding) -> Fault<'a> {
        Fault {
            kind: finding.kind.name(),
            path: finding.path.display().to_string(),
            record: finding.record.as_deref(),
            tensors: &finding.tensors,
            expected: &finding.expected,
            found: &finding.found,
        }
    }

    fn line(&self) -> String {
        let place = match self.record {
            Some(record) => format!("{}: record `{record}`", self.path.escape_debug()),
            None => self.path.escape_debug().to_string(),
        };
        let tensors = match self.tensors.len() {
            0 => String::new(),
            _ => format!(" ({})", named(self.tensors)),
        };
        format!("{place}: expected {}, found {}{tensors}", self.expected, self.found)
    }
}

/// `tensors `a`, `b` and 7 more`.
fn named(names: &[String]) -> String {
    let shown: Vec<String> =
        names.iter().take(MAX_NAMED).map(|it| format!("`{}`", it.escape_debug())).collect();
    let more = match names.len().saturating_sub(MAX_NAMED) {
        0 => String::new(),
        n => format!(" and {n} more"),
    };
    let word = if names.len() == 1 { "tensor" } else { "tensors" };
    format!("{word} {}{more}", shown.join(", "))
}

/// How two checkpoints compare.
#[derive(Serialize)]
pub(super) struct CompareReport<'a> {
    paths: [String; 2],
    formats: [&'static str; 2],
    /// Below which root either side was opened; null: whole.
    roots: [Option<&'a str>; 2],
    same: bool,
    in_both: u64,
    only_in: &'a [Vec<String>; 2],
    different: Vec<Different<'a>>,
    ties_differ: bool,
    bytes: u64,
    seconds: f64,
}

/// A tensor that is not the same on both sides. What is null is alike, or was not looked at.
#[derive(Serialize)]
struct Different<'a> {
    name: &'a str,
    dtypes: Option<[&'static str; 2]>,
    shapes: Option<&'a [Vec<u64>; 2]>,
    has_data: Option<[bool; 2]>,
    elements: Option<DifferentElements<'a>>,
    /// What the tensor is made of on either side; null in a side's place: plain tensors.
    made: Option<[Option<&'a Made>; 2]>,
}

#[derive(Serialize)]
struct DifferentElements<'a> {
    n: u64,
    different: u64,
    first_index: &'a [u64],
    values: &'a [String; 2],
    max_abs_difference: Option<f64>,
    not_finite: u64,
}

impl<'a> CompareReport<'a> {
    pub(super) fn new(
        sides: [&Checkpoint; 2],
        roots: [Option<&'a str>; 2],
        comparison: &'a Comparison,
        took: Duration,
    ) -> CompareReport<'a> {
        CompareReport {
            paths: sides.map(|it| it.path.display().to_string()),
            formats: sides.map(|it| it.format.name()),
            roots,
            same: comparison.is_same(),
            in_both: comparison.n_in_both,
            only_in: &comparison.only_in,
            different: comparison.different.iter().map(Different::new).collect(),
            ties_differ: comparison.ties_differ,
            bytes: comparison.compared_bytes,
            seconds: took.as_secs_f64(),
        }
    }

    pub(super) fn json(&self) -> String {
        serde_json::to_string(self).expect("strings and numbers")
    }

    pub(super) fn print(&self) {
        for (path, names) in self.paths.iter().zip(self.only_in) {
            for name in names {
                out::result(&format!("only in {}: `{}`", path.escape_debug(), name.escape_debug()));
            }
        }
        self.different.iter().for_each(|it| out::result(&it.line()));
        let n_different = self.different.len();
        let n_alone: usize = self.only_in.iter().map(Vec::len).sum();
        let told = match self.same {
            true => "the same".to_owned(),
            false => format!("{n_different} tensors differ, {n_alone} are only in one of them"),
        };
        out::result(&format!(
            "{} ({}) and {} ({}): {told}, {} tensors in both, {}",
            self.paths[0].escape_debug(),
            self.formats[0],
            self.paths[1].escape_debug(),
            self.formats[1],
            self.in_both,
            speed(self.bytes, self.seconds),
        ));
    }
}

impl<'a> Different<'a> {
    fn new((name, difference): &'a (String, Difference)) -> Different<'a> {
        let mut different =
            Different { name, dtypes: None, shapes: None, has_data: None, elements: None, made: None };
        match difference {
            Difference::Kind { dtypes, shapes } => {
                different.dtypes = (dtypes[0] != dtypes[1]).then(|| dtypes.map(|it| it.name()));
                different.shapes = (shapes[0] != shapes[1]).then_some(shapes);
            }
            Difference::Data { has_data } => different.has_data = Some(*has_data),
            Difference::Elements(elements) => different.elements = Some(DifferentElements::new(elements)),
            Difference::Made { made: [one, other] } => {
                different.made = Some([one.as_ref(), other.as_ref()]);
            }
            _ => {}
        }
        different
    }

    fn line(&self) -> String {
        let mut parts = Vec::new();
        if let Some([one, other]) = self.dtypes {
            parts.push(format!("{one} and {other}"));
        }
        if let Some([one, other]) = self.shapes {
            parts.push(format!("{one:?} and {other:?}"));
        }
        if let Some(has_data) = self.has_data {
            let [one, other] = has_data.map(|it| if it { "data" } else { "no data" });
            parts.push(format!("{one} and {other}"));
        }
        if let Some(elements) = &self.elements {
            parts.push(elements.words());
        }
        if let Some(made) = self.made {
            let [one, other] =
                made.map(|it| it.map_or_else(|| "plain tensors".to_owned(), |it| it.to_string()));
            parts.push(format!("{one}, and {other}"));
        }
        format!("`{}` differs: {}", self.name.escape_debug(), parts.join(", "))
    }
}

impl<'a> DifferentElements<'a> {
    fn new(elements: &'a Elements) -> DifferentElements<'a> {
        DifferentElements {
            n: elements.n_elems,
            different: elements.n_different,
            first_index: &elements.first_index,
            values: &elements.values,
            max_abs_difference: elements.max_abs_difference,
            not_finite: elements.n_not_finite,
        }
    }

    fn words(&self) -> String {
        let [one, other] = self.values;
        let mut words = format!(
            "{} of {} elements, first at {:?}: {one} and {other}",
            self.different, self.n, self.first_index
        );
        if let Some(apart) = self.max_abs_difference {
            words += &format!(", {apart:e} apart at most");
        }
        if self.not_finite > 0 {
            words += &format!(", {} infinite or not a number", self.not_finite);
        }
        words
    }
}
