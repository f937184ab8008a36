//! The table, the JSON lines, and the line that says which strategy to use and why.

use super::Outcome;
use crate::{args::CompareArgs, human, out, row::Row};
use comfy_table::{CellAlignment, ColumnConstraint, LineStyle, Table, Width, presets};
use serde::Serialize;
use unladen::{OpenCheckpoint, Strategy};

/// `of_file`: the digest that every load should have.
pub(super) fn print(
    outcomes: &[Outcome],
    of_file: Option<&str>,
    checkpoint: &OpenCheckpoint,
    args: &CompareArgs,
) {
    if args.json {
        outcomes.iter().for_each(|outcome| out::result(&json(outcome, of_file)));
    } else {
        table(outcomes);
    }
    let advice = advice(outcomes, checkpoint);
    // With --json the lines are for programs: the advice goes where people look.
    if args.json { out::words(&advice) } else { out::result(&advice) }
}

/// What `load` says of itself, and beside its digest that of the file.
#[derive(Serialize)]
struct Line<'a> {
    #[serde(flatten)]
    row: &'a Row,
    file_digest: Option<&'a str>,
}

fn json(outcome: &Outcome, file_digest: Option<&str>) -> String {
    match &outcome.result {
        Ok(row) => serde_json::to_string(&Line { row, file_digest }).expect("strings and numbers"),
        Err(error) => {
            serde_json::json!({ "strategy": outcome.strategy.name(), "error": error.words }).to_string()
        }
    }
}

/// A GPU has a figure more: its driver's.
fn header(has_gpu: bool) -> [&'static str; 9] {
    [
        "strategy",
        "load s",
        "GB/s",
        if has_gpu { "GPU peak:\npredicted / ledger / driver" } else { "device peak:\npredicted / ledger" },
        "host peak:\npredicted / measured",
        "mapped\npeak",
        "notebook's\nRSS",
        "page cache\nleft",
        "logits s",
    ]
}

fn table(outcomes: &[Outcome]) {
    let mut table = Table::new();
    table
        .load_style(presets::UTF8_HORIZONTAL_ONLY.row_separator(LineStyle::none()))
        .set_header(header(rows_of(outcomes).any(|row| row.driver_peak_bytes.is_some())));
    for outcome in outcomes {
        match &outcome.result {
            Ok(row) => table.add_row(cells(row)),
            Err(_) => table.add_row([outcome.strategy.name(), "failed", "-", "-", "-", "-", "-", "-", "-"]),
        };
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 1));
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
        column.set_constraint(ColumnConstraint::LowerBoundary(Width::Fixed(8)));
    }
    out::result(&table.trim_fmt());
    for outcome in outcomes {
        if let Err(error) = &outcome.result {
            out::result(&format!("`{}` failed: {}", outcome.strategy, error.words));
        }
    }
    if rows_of(outcomes).any(|row| row.is_mapped) {
        out::result(
            "* views of the mapped file, read when they are touched: no load; its mapped peak includes the forward pass",
        );
    }
}

fn rows_of(outcomes: &[Outcome]) -> impl Iterator<Item = &Row> {
    outcomes.iter().filter_map(|it| it.result.as_ref().ok())
}

/// Of all GPUs together, if there are any: the part of a model that stays on the host is in the host's peak.
fn device_peak(row: &Row) -> String {
    let Some(driver_bytes) = row.driver_peak_bytes else {
        return side_by_side(&[row.predicted_device_peak_bytes, row.device_peak_bytes]);
    };
    let on_gpus = || row.devices.iter().filter(|it| it.driver_peak_bytes.is_some());
    let predicted_bytes = on_gpus().map(|it| it.predicted_peak_bytes).sum();
    let ledger_bytes = on_gpus().map(|it| it.peak_bytes).sum();
    side_by_side(&[predicted_bytes, ledger_bytes, driver_bytes])
}

fn side_by_side(figures: &[u64]) -> String {
    figures.iter().map(|it| human::bytes(*it)).collect::<Vec<_>>().join(" / ")
}

fn cells(row: &Row) -> Vec<String> {
    let star = if row.is_mapped { "*" } else { "" };
    let speed = match row.is_mapped {
        false => format!("{:.2}", row.bytes as f64 / row.load_s / 1e9),
        true => "-".to_owned(),
    };
    vec![
        row.strategy.clone(),
        format!("{}{star}", human::seconds(row.load_s)),
        speed,
        device_peak(row),
        side_by_side(&[row.predicted_host_peak_anon_bytes, row.host_peak_anon_bytes]),
        if row.predicted_mapped_peak_bytes > 0 {
            human::bytes(row.mapped_peak_bytes)
        } else {
            "-".to_owned()
        },
        human::bytes(row.notebook_rss_bytes),
        row.page_cache_after_bytes.map_or("unknown".to_owned(), human::bytes),
        row.forward_s.map_or("-".to_owned(), human::seconds),
    ]
}

/// Peaks that are closer than this, or than 5 %, are the same as far as they can be measured.
const PEAK_NOISE_BYTES: u64 = 16 << 20;

/// Seconds that are closer than this share are the same in a single run, and so are all below the second figure.
const TIME_NOISE: f64 = 0.1;
const TIME_NOISE_S: f64 = 0.05;

/// Which strategy to use and why: of the leanest, the fastest, and of equals `stream`. A mapping is named beside it, not
/// against it, because its weights are not the caller's own.
fn advice(outcomes: &[Outcome], checkpoint: &OpenCheckpoint) -> String {
    let rows = || outcomes.iter().filter_map(|it| Some((it.strategy, it.result.as_ref().ok()?)));
    let private = || rows().filter(|(_, row)| !row.is_mapped);
    // RSS counts the pages of a mapping too: a copy from a mapped file holds the bytes twice for a while.
    let peak_bytes = |row: &Row| row.host_peak_rss_bytes;
    let Some(least_bytes) = private().map(|(_, row)| peak_bytes(row)).min() else {
        return match rows().next() {
            Some((strategy, _)) => {
                format!("`{strategy}` is for inference on the host; add `stream` for weights of your own")
            }
            None => "no strategy loaded the checkpoint".to_owned(),
        };
    };
    let is_lean = |row: &Row| peak_bytes(row) <= least_bytes + (least_bytes / 20).max(PEAK_NOISE_BYTES);
    let lean = || private().filter(|(_, row)| is_lean(row));
    let least_s = lean().map(|(_, row)| row.load_s).fold(f64::INFINITY, f64::min);
    let is_fast = |row: &Row| row.load_s <= (least_s * (1.0 + TIME_NOISE)).max(TIME_NOISE_S);
    let best =
        lean().filter(|(_, row)| is_fast(row)).max_by_key(|(strategy, _)| *strategy == Strategy::Stream);
    let Some((best, row)) = best else { return String::new() };

    let mut words = format!("use `{best}`: {} s", human::seconds(row.load_s));
    if checkpoint.len_bytes() > PEAK_NOISE_BYTES {
        let share = peak_bytes(row) as f64 / checkpoint.len_bytes() as f64;
        let peak = human::bytes(peak_bytes(row));
        words += &format!(", and a host peak of {peak} is {share:.2} times the checkpoint");
        let slowest = private().max_by(|(_, one), (_, other)| one.load_s.total_cmp(&other.load_s));
        if let Some((slowest, slow)) = slowest.filter(|(it, _)| *it != best) {
            let times = slow.load_s / row.load_s;
            let more = peak_bytes(slow) as f64 / peak_bytes(row) as f64;
            words += &format!(" (`{slowest}`: {times:.1} times the time, {more:.2} times the peak)");
        }
    }
    if rows().any(|(_, row)| row.is_mapped) {
        words += "; `mmap` if the weights are only read, on the host, and the file stays as it is";
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn row(devices: &serde_json::Value, driver_peak_bytes: Option<u64>) -> Row {
        let bytes = [
            "bytes",
            "weights_bytes",
            "weights_on_host_bytes",
            "host_peak_anon_bytes",
            "host_peak_rss_bytes",
            "device_peak_bytes",
            "mapped_peak_bytes",
            "predicted_host_peak_anon_bytes",
            "predicted_host_peak_rss_bytes",
            "predicted_device_peak_bytes",
            "predicted_mapped_peak_bytes",
            "notebook_rss_bytes",
        ];
        let mut row = json!({
            "strategy": "stream", "load_s": 1.0, "tensors": 1, "is_mapped": false, "io": "buffered",
            "devices": devices, "driver_peak_bytes": driver_peak_bytes, "measured_by": "the kernel",
        });
        bytes.iter().for_each(|name| row[*name] = json!(7 << 20));
        serde_json::from_value(row).unwrap()
    }

    fn device(name: &str, mib: u64, driver_mib: Option<u64>) -> serde_json::Value {
        json!({
            "device": name, "weights_bytes": 0, "predicted_peak_bytes": mib << 20, "peak_bytes": (mib + 1) << 20,
            "driver_peak_bytes": driver_mib.map(|it| it << 20),
            "predicted_driver_peak_bytes": driver_mib.map(|it| it << 20),
        })
    }

    #[test]
    fn the_drivers_figure_stands_beside_the_ledgers_where_there_are_gpus() {
        let on_host = row(&json!([device("host", 7, None)]), None);
        assert_eq!(device_peak(&on_host), "7.00 MiB / 7.00 MiB");
        let devices = json!([
            device("host", 500, None),
            device("cuda:0", 10, Some(12)),
            device("cuda:1", 20, Some(22)),
        ]);
        assert_eq!(device_peak(&row(&devices, Some(34 << 20))), "30.0 MiB / 32.0 MiB / 34.0 MiB");
        assert!(header(true)[3].contains("driver") && !header(false)[3].contains("driver"));
    }
}
